"""A layer that normalises after each residual sum as one op, where that is all that calling its modules would do."""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends._registry import direct_function
from ..ops.encoder_layer import backend_of, encoder_layer, encoder_layer_direct
from . import _bypass as bypass
from ._padding import Packed
from ._parts import Parts


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

    def ends(self) -> list[Tensor | None]:
        """Weight and bias of each module behind Q, K and V, in their order."""
        return [t for m in (self.out, self.norm1, self.up, self.down, self.norm2) for t in (m.weight, m.bias)]


class _Known(NamedTuple):
    """A layer that ran as one op: what it was made of then, and the op's arguments around those of a batch."""

    parts: Parts
    causal: bool
    weights: tuple
    options: tuple


# Looking at each part of a layer takes as long as a product of some 50 rows.
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def as_before(module: nn.Module, x: Tensor, packed: Packed | None, causal: bool = False) -> Tensor | None:
    """The layer ``module`` on ``x``, if it ran as one op before and nothing about it has changed since.

    What changes without a trace in its modules is looked at here and by the op: modes, hooks on all modules, tensors.
    """
    if _is_cast_or_traced() or bypass.hooked_everywhere():
        return None
    known = _known.get(module)
    if known is None or known.causal is not causal or not known.parts.unchanged():
        return None
    where = (None, x.shape[1]) if packed is None else (packed.cu_seqlens, packed.max_seqlen)
    return encoder_layer_direct(x, *known.weights, *where, *known.options)


def as_one(
    module: nn.Module,
    x: Tensor,
    packed: Packed | None,
    parts: Callable[[], PostNorm | None],
    head_dim: int,
    causal: bool = False,
) -> Tensor | None:
    """The layer ``module`` on ``x``; None where it has to run op by op.

    Args:
        x: tokens ``(total_tokens, hidden)`` beside ``packed``; else ``(batch, seqlen, hidden)``, without any mask.
        parts: asked for only where a backend has the op; None if they are not what they were.
    """
    if _is_cast_or_traced():
        return None
    hidden = x.shape[-1]
    heads = hidden // max(head_dim, 1)
    tokens = x if packed is not None else x.flatten(0, -2)
    backend = backend_of(tokens, heads, head_dim) if heads * head_dim == hidden and x.numel() else None
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
    ends = layer.ends()
    tensors = [*layer.in_weights, *layer.in_biases, *ends]
    needed = [*layer.in_biases, *(m.bias for m in (layer.out, *linears))]
    if any(t is None for t in needed) or not _fit(layer, hidden):
        return None
    if not _alike(x, [t for t in tensors if t is not None]):
        return None
    weights = (layer.in_weights, layer.in_biases, *ends)
    options = (heads, activation, causal, head_dim**-0.5, layer.norm1.eps, layer.norm2.eps)
    # (Who replaces `forward` keeps the method of old in the module, which would then never be let go.)
    if direct_function(backend, "encoder_layer") and "forward" not in vars(module):
        known = _Known(Parts(module), causal, weights, options)
        if known.parts.hindrance is None:
            _known[module] = known
    if packed is None:
        longest = x.shape[-2]
        cu_seqlens = torch.arange(0, tokens.shape[0] + 1, longest, dtype=torch.int32, device=x.device)
    else:
        cu_seqlens, longest = packed.cu_seqlens, packed.max_seqlen
    return encoder_layer(tokens, *weights, cu_seqlens, longest, *options, backend).view(x.shape)


def _is_cast_or_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def _fit(layer: PostNorm, hidden: int) -> bool:
    """Whether each tensor has the shape that its place asks for: where one has not, the modules have to say so."""
    inner = layer.up.weight.shape[0]
    linears = ((layer.out, hidden, hidden), (layer.up, inner, hidden), (layer.down, hidden, inner))
    each = 3 * hidden // len(layer.in_weights)
    return (
        all(w.shape == (each, hidden) for w in layer.in_weights)
        and all(b.shape == (each,) for b in layer.in_biases)
        and all(m.weight.shape == (rows, cols) and m.bias.shape == (rows,) for m, rows, cols in linears)
        and all(
            t is None or t.shape == (hidden,) for m in (layer.norm1, layer.norm2) for t in (m.weight, m.bias)
        )
    )


def _alike(x: Tensor, tensors: list[Tensor]) -> bool:
    """Whether they are ordinary, like ``x``, and want no gradient."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype is x.dtype and t.device == x.device for t in tensors
    )
