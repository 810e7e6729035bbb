"""ALBERT of Hugging Face's transformers: ``AlbertModel`` and all its heads."""

from torch import nn

from .._encoder import ENCODER_OPS, LAYER_OPS, layers_are
from .._swap import Rule
from ._bert_shaped import EMBEDDINGS_FUSED, LAYER_FUSED, PADDING_REMOVED, asks_for_attentions

_MODELS = "transformers.models.albert.modeling_albert"
_STANDINS = "pytorch_ext.dropin.standins.hf_albert"

WEIGH_POSITIONS = [f"{_MODELS}.AlbertForQuestionAnswering"]


def _encoder_unfit(encoder: nn.Module) -> str | None:
    layers = [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]
    unfit = asks_for_attentions(encoder.config) or layers_are(f"{_MODELS}.AlbertLayer", layers)
    return unfit or next(filter(None, map(_layer_unfit, layers)), None)


def _layer_unfit(layer: nn.Module) -> str | None:
    return "its config chunks the feed-forward block" if layer.chunk_size_feed_forward else None


RULES = [
    Rule(
        target=f"{_MODELS}.AlbertTransformer",
        standin=f"{_STANDINS}:PaddingFreeAlbertTransformer",
        does=PADDING_REMOVED,
        ops=ENCODER_OPS,
        unfit=_encoder_unfit,
    ),
    Rule(
        target=f"{_MODELS}.AlbertLayer",
        standin=f"{_STANDINS}:FusedAlbertLayer",
        does=LAYER_FUSED,
        ops=LAYER_OPS,
        unfit=_layer_unfit,
    ),
    Rule(
        target=f"{_MODELS}.AlbertEmbeddings",
        standin=f"{_STANDINS}:FusedAlbertEmbeddings",
        does=EMBEDDINGS_FUSED,
        ops=("embedding_layer_norm",),
    ),
]
