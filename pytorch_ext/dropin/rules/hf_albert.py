"""ALBERT of Hugging Face's transformers: ``AlbertModel`` and all its heads."""

from torch import nn

from .._encoder import layers_are
from ._bert_shaped import asks_for_attentions, post_norm_rules

_MODELS = "transformers.models.albert.modeling_albert"
_STANDINS = "pytorch_ext.dropin.standins.hf_albert"

WEIGH_POSITIONS = [f"{_MODELS}.AlbertForQuestionAnswering"]


def _encoder_unfit(encoder: nn.Module) -> str | None:
    layers = [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]
    unfit = asks_for_attentions(encoder.config) or layers_are(f"{_MODELS}.AlbertLayer", layers)
    return unfit or next(filter(None, map(_layer_unfit, layers)), None)


def _layer_unfit(layer: nn.Module) -> str | None:
    return "its config chunks the feed-forward block" if layer.chunk_size_feed_forward else None


RULES = post_norm_rules(
    _MODELS,
    _STANDINS,
    ("AlbertTransformer", "PaddingFreeAlbertTransformer"),
    ("AlbertLayer", "FusedAlbertLayer"),
    ("AlbertEmbeddings", "FusedAlbertEmbeddings"),
    encoder_unfit=_encoder_unfit,
    layer_unfit=_layer_unfit,
)
