"""XLM-RoBERTa of Hugging Face's transformers: ``XLMRobertaModel`` and all its heads."""

from ._bert_shaped import bert_shaped_rules

_MODELS = "transformers.models.xlm_roberta.modeling_xlm_roberta"

WEIGH_POSITIONS = [f"{_MODELS}.XLMRobertaForQuestionAnswering"]

RULES = bert_shaped_rules(_MODELS, "XLMRoberta", "pytorch_ext.dropin.standins.hf_xlm_roberta")
