"""A layer that normalises after each residual sum as one op, where that is all that calling its modules would do."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.encoder_layer import backend_of, encoder_layer
from . import _bypass as bypass
from ._padding import Packed


class PostNorm(NamedTuple):
    """What a layer is made of. Weights and biases of Q, K and V: three, or one with the rows of all.

    These and ``out`` are known to be plain.
    """

    in_weights: list[Tensor]
    in_biases: list[Tensor | None]
    out: nn.Module
    norm1: nn.Module
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    norm2: nn.Module
    dropouts: tuple[nn.Module, ...]


def as_one(
    x: Tensor, packed: Packed, parts: Callable[[], PostNorm | None], head_dim: int, causal: bool = False
) -> Tensor | None:
    """The layer on tokens ``(total_tokens, hidden)``; None where it has to run op by op.

    Args:
        parts: asked for only where a backend has the op; None if they are not what they were.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    heads = x.shape[1] // max(head_dim, 1)
    backend = backend_of(x, heads, head_dim) if heads * head_dim == x.shape[1] > 0 else None
    layer = None if backend is None else parts()
    if layer is None:
        return None
    activation = bypass.activation_name(layer.activation)
    linears, norms = (layer.up, layer.down), (layer.norm1, layer.norm2)
    if activation is None or not (
        all(map(bypass.plain_linear, linears)) and all(map(bypass.plain_norm, norms))
    ):
        return None
    if any(d.training and bypass.dropout_rate(d) > 0.0 for d in layer.dropouts):
        return None
    in_turn = (layer.out, layer.norm1, layer.up, layer.down, layer.norm2)
    ends = [t for m in in_turn for t in (m.weight, m.bias)]
    tensors = [*layer.in_weights, *layer.in_biases, *ends]
    needed = [*layer.in_biases, *(m.bias for m in (layer.out, *linears))]
    if any(t is None for t in needed) or not _alike(x, [t for t in tensors if t is not None]):
        return None
    width = sum(w.shape[0] for w in layer.in_weights)
    if width != 3 * x.shape[1] or layer.norm1.weight.shape != x.shape[1:] != layer.down.weight.shape[:1]:
        return None
    return encoder_layer(
        *(
            x,
            layer.in_weights,
            layer.in_biases,
            *ends,
            packed.cu_seqlens,
            packed.max_seqlen,
            heads,
            activation,
        ),
        *(causal, head_dim**-0.5, layer.norm1.eps, layer.norm2.eps, backend),
    )


def _alike(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether they are ordinary, like ``x``, and want no gradient."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype is x.dtype and t.device == x.device for t in tensors
    )
