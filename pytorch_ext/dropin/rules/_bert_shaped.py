"""The rules that families of post-norm layers share: one encoder, its layers, and their embeddings."""

from collections.abc import Callable

from torch import nn

from .._encoder import ENCODER_OPS, LAYER_OPS, layers_fit
from .._swap import Rule

# What the stand-ins do, in the words that explain prints.
PADDING_REMOVED = "padding removed once for all layers"
LAYER_FUSED = "fused QKV, linear + activation, bias + dropout + residual + LayerNorm"
EMBEDDINGS_FUSED = "embedding sum + LayerNorm + dropout"


Unfit = Callable[[nn.Module], str | None]


def post_norm_rules(
    models: str,
    standins: str,
    encoder: tuple[str, str],
    layer: tuple[str, str],
    embeddings: tuple[str, str],
    *,
    encoder_unfit: Unfit,
    layer_unfit: Unfit = lambda layer: None,
    layer_does: str = LAYER_FUSED,
    layer_ops: tuple[str, ...] = (*LAYER_OPS, "encoder_layer"),
) -> list[Rule]:
    """For an encoder of post-norm layers: what each class is called in ``models``, and its stand-in in ``standins``."""

    def rule(
        names: tuple[str, str], does: str, ops: tuple[str, ...], unfit: Unfit = lambda module: None
    ) -> Rule:
        target, standin = names
        return Rule(f"{models}.{target}", f"{standins}:{standin}", does, ops, unfit)

    return [
        rule(encoder, PADDING_REMOVED, ENCODER_OPS, encoder_unfit),
        rule(layer, layer_does, layer_ops, layer_unfit),
        rule(embeddings, EMBEDDINGS_FUSED, ("embedding_layer_norm",)),
    ]


def bert_shaped_rules(models: str, prefix: str, standins: str) -> list[Rule]:
    """For a family whose classes are ``models.<prefix>Encoder``, ``…Layer`` and ``…Embeddings``."""
    return post_norm_rules(
        models,
        standins,
        (f"{prefix}Encoder", f"PaddingFree{prefix}Encoder"),
        (f"{prefix}Layer", f"Fused{prefix}Layer"),
        (f"{prefix}Embeddings", f"Fused{prefix}Embeddings"),
        encoder_unfit=_encoder_unfit(f"{models}.{prefix}Layer"),
        layer_unfit=_layer_unfit,
    )


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
