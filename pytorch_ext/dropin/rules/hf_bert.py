"""BERT of Hugging Face's transformers: ``BertModel`` and all its heads."""

from .._swap import Rule
from ._bert_shaped import bert_shaped_rules

_MODELS = "transformers.models.bert.modeling_bert"
_STANDINS = "pytorch_ext.dropin.standins.hf_bert"

# Heads that weigh all positions against each other: what stands at padded ones is part of their loss.
WEIGH_POSITIONS = [f"{_MODELS}.BertForQuestionAnswering"]

RULES = [
    *bert_shaped_rules(_MODELS, "Bert", _STANDINS),
    Rule(
        target=f"{_MODELS}.BertPredictionHeadTransform",
        standin=f"{_STANDINS}:FusedBertPredictionHeadTransform",
        does="linear + activation, LayerNorm",
        ops=("linear", "layer_norm"),
    ),
]
