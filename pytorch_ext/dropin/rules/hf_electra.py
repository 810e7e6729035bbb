"""ELECTRA of Hugging Face's transformers: ``ElectraModel`` and all its heads."""

from ._bert_shaped import bert_shaped_rules

_MODELS = "transformers.models.electra.modeling_electra"

WEIGH_POSITIONS = [f"{_MODELS}.ElectraForQuestionAnswering"]

RULES = bert_shaped_rules(_MODELS, "Electra", "pytorch_ext.dropin.standins.hf_electra")

# By default it reads position 0; these two read the padding too.
WEIGH_POSITIONS_IF = {
    f"{_MODELS}.ElectraForMultipleChoice": lambda head: head.config.summary_type in ("mean", "last")
}
