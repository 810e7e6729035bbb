"""BERT of ``pytorch_ext.models``."""

from .._encoder import ENCODER_OPS, LAYER_OPS, layers_fit
from .._swap import Rule
from ._bert_shaped import EMBEDDINGS_FUSED, LAYER_FUSED, PADDING_REMOVED

_MODELS = "pytorch_ext.models.bert"
_HEADS = "pytorch_ext.models.bert_heads"
_STANDINS = "pytorch_ext.dropin.standins.px_bert"

RULES = [
    Rule(
        target=f"{_MODELS}.BertEncoder",
        standin=f"{_STANDINS}:PaddingFreeBertEncoder",
        does=PADDING_REMOVED,
        ops=ENCODER_OPS,
        unfit=layers_fit(f"{_MODELS}.BertLayer"),
    ),
    Rule(
        target=f"{_MODELS}.BertLayer",
        standin=f"{_STANDINS}:FusedBertLayer",
        does=LAYER_FUSED,
        ops=LAYER_OPS,
    ),
    Rule(
        target=f"{_MODELS}.BertEmbeddings",
        standin=f"{_STANDINS}:FusedBertEmbeddings",
        does=EMBEDDINGS_FUSED,
        ops=("embedding_layer_norm",),
    ),
    Rule(
        target=f"{_HEADS}.BertPredictionHeadTransform",
        standin=f"{_STANDINS}:FusedBertPredictionHeadTransform",
        does="linear + activation, LayerNorm",
        ops=("linear", "layer_norm"),
    ),
]
