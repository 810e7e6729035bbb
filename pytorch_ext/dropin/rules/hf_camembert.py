"""CamemBERT of Hugging Face's transformers: ``CamembertModel`` and all its heads."""

from ._bert_shaped import bert_shaped_rules

_MODELS = "transformers.models.camembert.modeling_camembert"

WEIGH_POSITIONS = [f"{_MODELS}.CamembertForQuestionAnswering"]

RULES = bert_shaped_rules(_MODELS, "Camembert", "pytorch_ext.dropin.standins.hf_camembert")
