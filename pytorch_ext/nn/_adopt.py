"""Modules of ours in place of those that PyTorch's constructors make."""

from collections.abc import Iterable

from torch import nn

from .gelu import GELU
from .layer_norm import LayerNorm
from .multihead_attention import MultiheadAttention

# PyTorch's class -> ours, which adds only ``forward`` to it.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GELU: GELU,
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
}


def adopt(modules: Iterable[nn.Module]) -> None:
    """Makes modules that nobody else has yet ours, where their class is exactly one of PyTorch's that we have."""
    for module in modules:
        module.__class__ = OURS.get(type(module), type(module))
