"""RoBERTa of Hugging Face's transformers: ``RobertaModel`` and all its heads."""

from ._bert_shaped import bert_shaped_rules

_MODELS = "transformers.models.roberta.modeling_roberta"

WEIGH_POSITIONS = [f"{_MODELS}.RobertaForQuestionAnswering"]

RULES = bert_shaped_rules(_MODELS, "Roberta", "pytorch_ext.dropin.standins.hf_roberta")
