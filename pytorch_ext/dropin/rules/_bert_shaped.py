"""The rules that the families of BERT's shape share: one encoder, its layers, and their embeddings."""

from torch import nn

from .._encoder import ENCODER_OPS, LAYER_OPS, layers_fit
from .._swap import Rule

# What the stand-ins do, in the words that explain prints.
PADDING_REMOVED = "padding removed once for all layers"
LAYER_FUSED = "fused QKV, linear + activation, bias + dropout + residual + LayerNorm"
EMBEDDINGS_FUSED = "embedding sum + LayerNorm + dropout"


def bert_shaped_rules(models: str, prefix: str, standins: str) -> list[Rule]:
    """For a family whose classes are ``models.<prefix>Encoder``, ``…Layer`` and ``…Embeddings``."""
    return [
        Rule(
            target=f"{models}.{prefix}Encoder",
            standin=f"{standins}:PaddingFree{prefix}Encoder",
            does=PADDING_REMOVED,
            ops=ENCODER_OPS,
            unfit=_encoder_unfit(f"{models}.{prefix}Layer"),
        ),
        Rule(
            target=f"{models}.{prefix}Layer",
            standin=f"{standins}:Fused{prefix}Layer",
            does=LAYER_FUSED,
            ops=LAYER_OPS,
            unfit=_layer_unfit,
        ),
        Rule(
            target=f"{models}.{prefix}Embeddings",
            standin=f"{standins}:Fused{prefix}Embeddings",
            does=EMBEDDINGS_FUSED,
            ops=("embedding_layer_norm",),
        ),
    ]


def asks_for_attentions(config) -> str | None:
    asks = getattr(config, "output_attentions", False)
    return "its config asks for attention weights at every call" if asks else None


def _encoder_unfit(layer: str):
    fit = layers_fit(layer)

    def unfit(encoder: nn.Module) -> str | None:
        config = encoder.config
        if config.is_decoder or config.add_cross_attention:
            return "it is a decoder; padding removal is for encoders"
        return (
            asks_for_attentions(config)
            or fit(encoder)
            or next(filter(None, map(_layer_unfit, encoder.layer)), None)
        )

    return unfit


def _layer_unfit(layer: nn.Module) -> str | None:
    if layer.is_decoder or layer.add_cross_attention:
        return "it is a decoder's"
    if layer.chunk_size_feed_forward:
        return "its config chunks the feed-forward block"
    if getattr(layer.attention.self, "position_embedding_type", "absolute") != "absolute":
        return "it has relative positions"
    return None
