"""MPNet of Hugging Face's transformers: ``MPNetModel`` and all its heads."""

from torch import nn

from .._encoder import layers_fit
from ._bert_shaped import LAYER_FUSED, asks_for_attentions, post_norm_rules

_MODELS = "transformers.models.mpnet.modeling_mpnet"
_STANDINS = "pytorch_ext.dropin.standins.hf_mpnet"

WEIGH_POSITIONS = [f"{_MODELS}.MPNetForQuestionAnswering"]


def _encoder_unfit(encoder: nn.Module) -> str | None:
    return asks_for_attentions(encoder.config) or layers_fit(f"{_MODELS}.MPNetLayer")(encoder)


RULES = post_norm_rules(
    _MODELS,
    _STANDINS,
    ("MPNetEncoder", "PaddingFreeMPNetEncoder"),
    ("MPNetLayer", "FusedMPNetLayer"),
    ("MPNetEmbeddings", "FusedMPNetEmbeddings"),
    encoder_unfit=_encoder_unfit,
    layer_does=f"{LAYER_FUSED}; attention with its bias of distances, sequence by sequence",
    layer_ops=("linear", "scaled_dot_product_attention", "dropout_add_layer_norm"),
)
