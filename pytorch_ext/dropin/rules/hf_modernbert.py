"""ModernBERT of Hugging Face's transformers: ``ModernBertModel`` and all its heads."""

from torch import nn

from .._encoder import LAYER_OPS
from .._swap import Rule
from ._bert_shaped import asks_for_attentions

_MODELS = "transformers.models.modernbert.modeling_modernbert"
_STANDINS = "pytorch_ext.dropin.standins.hf_modernbert"

WEIGH_POSITIONS = [f"{_MODELS}.ModernBertForQuestionAnswering"]


def _layer_unfit(layer: nn.Module) -> str | None:
    return asks_for_attentions(layer.config)


RULES = [
    Rule(
        target=f"{_MODELS}.ModernBertEncoderLayer",
        standin=f"{_STANDINS}:FusedModernBertEncoderLayer",
        does="padding removed in each layer; rotary Q and K, windows, residual + LayerNorm",
        ops=LAYER_OPS,
        unfit=_layer_unfit,
    ),
    Rule(
        target=f"{_MODELS}.ModernBertPredictionHead",
        standin=f"{_STANDINS}:FusedModernBertPredictionHead",
        does="linear + activation, LayerNorm",
        ops=("linear", "layer_norm"),
    ),
]
