"""BERT of ``pytorch_ext.models``."""

from .._encoder import layers_fit
from .._swap import Rule
from ._bert_shaped import post_norm_rules

_MODELS = "pytorch_ext.models.bert"
_HEADS = "pytorch_ext.models.bert_heads"
_STANDINS = "pytorch_ext.dropin.standins.px_bert"

RULES = [
    *post_norm_rules(
        _MODELS,
        _STANDINS,
        ("BertEncoder", "PaddingFreeBertEncoder"),
        ("BertLayer", "FusedBertLayer"),
        ("BertEmbeddings", "FusedBertEmbeddings"),
        encoder_unfit=layers_fit(f"{_MODELS}.BertLayer"),
    ),
    Rule(
        target=f"{_HEADS}.BertPredictionHeadTransform",
        standin=f"{_STANDINS}:FusedBertPredictionHeadTransform",
        does="linear + activation, LayerNorm",
        ops=("linear", "layer_norm"),
    ),
]
