"""Modules of ``torch.nn`` in any model, and those of ``pytorch_ext.nn``, which then heed what ``optimize`` was told."""

from ...nn.multihead_attention import why_original
from .._swap import Rule

_THEIRS = "torch.nn.modules"
_OURS = "pytorch_ext.nn"
_SIMPLE = "pytorch_ext.dropin.standins.torch_nn"
_STANDINS = "pytorch_ext.dropin.standins.torch_transformer"
_ATTENTION = ("linear", "scaled_dot_product_attention")
_LAYER = (*_ATTENTION, "dropout_add_layer_norm")
_FUSED = "fused QKV, linear + activation, bias + dropout + residual + LayerNorm"


def _both(file: str, name: str, standin: str, **rest) -> list[Rule]:
    """For PyTorch's class and for ours of that name."""
    paths = f"{_THEIRS}.{file}.{name}", f"{_OURS}.{_stem(name)}.{name}"
    return [Rule(target=path, standin=f"{_STANDINS}:{standin}", **rest) for path in paths]


def _stem(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


RULES = [
    Rule(
        target=f"{_THEIRS}.normalization.LayerNorm",
        standin=f"{_SIMPLE}:FusedLayerNorm",
        does="layer_norm",
        ops=("layer_norm",),
    ),
    Rule(
        target=f"{_THEIRS}.activation.GELU",
        standin=f"{_SIMPLE}:FusedGELU",
        does="gelu",
        ops=("gelu",),
    ),
    *_both(
        "activation",
        "MultiheadAttention",
        "FusedMultiheadAttention",
        does="fused QKV, attention without transposes",
        ops=_ATTENTION,
        unfit=why_original,
    ),
    *_both(
        "transformer",
        "TransformerEncoderLayer",
        "FusedTransformerEncoderLayer",
        does=_FUSED,
        ops=("linear", "varlen_attention", *_LAYER[1:], "encoder_layer"),
    ),
    *_both(
        "transformer",
        "TransformerEncoder",
        "PaddingFreeTransformerEncoder",
        does="padding removed once for all layers",
        ops=("unpad_input", "pad_input"),
    ),
    *_both(
        "transformer",
        "TransformerDecoderLayer",
        "FusedTransformerDecoderLayer",
        does=_FUSED,
        ops=_LAYER,
    ),
    *_both(
        "transformer",
        "TransformerDecoder",
        "FusedTransformerDecoder",
        does="masks worked out once for all layers",
    ),
    *_both(
        "transformer",
        "Transformer",
        "FusedTransformer",
        does="padding of the source removed where the decoder cannot see it",
    ),
]
