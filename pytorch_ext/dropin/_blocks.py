"""What the layers of every family are made of: products, residual sums, attention with and without padding.

Each takes the modules that a layer owns and computes with their weights where calling them would do just that; a module
that is something else by now (an adapter, a parametrization) is called as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import choose
from ..nn._blocks import add_norm, layer_norm, linear_activation, linear_product
from . import _bypass as bypass
from ._layouts import can_lay_out, laid_out
from ._swap import scope

__all__ = [
    "NO_DROPOUT",
    "fused_head_transform",
    "layer_norm",
    "linear_activation",
    "needs_grad",
    "query_key_value",
    "residual_norm",
    "residual_sum",
]

NO_DROPOUT = nn.Identity()  # of a layer that has none


def query_key_value(
    owner: nn.Module, three: tuple[nn.Module, nn.Module, nn.Module], head_dim: int, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each ``(*, heads, head_dim)``, from one product where that can be had without a gradient."""
    # Where PyTorch multiplies: kernels of ours lay each weight out by themselves.
    together = choose("linear", x) == "native"
    if together and all(map(bypass.plain_linear, three)) and all(m.bias is not None for m in three):
        tensors = (*(m.weight for m in three), *(m.bias for m in three))
        if not needs_grad(x, *tensors) and not torch.compiler.is_compiling() and can_lay_out(*tensors):
            weight, bias = laid_out(owner, "qkv", tensors, _concatenated)
            fused = ops.linear(x, weight, bias)
            return fused.unflatten(-1, (3, -1, head_dim)).unbind(-3)
    return tuple(linear_activation(m, None, x).unflatten(-1, (-1, head_dim)) for m in three)


def residual_norm(
    dense: nn.Module,
    dropout: nn.Module,
    norm: nn.Module,
    x: Tensor,
    residual: Tensor,
    *,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``norm(dropout(dense(x)) + residual)``; with ``prenorm`` the sum comes second."""
    x, bias = linear_product(x, dense, residual, dropout, norm)
    return add_norm(x, bias, residual, dropout, norm, prenorm=prenorm)


def residual_sum(dense: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return residual + dropout(linear_activation(dense, None, x))


def fused_head_transform(
    owner: nn.Module, dense: nn.Module, activation: Callable, norm: nn.Module, x: Tensor
) -> Tensor:
    """``norm(activation(dense(x)))``, with which the masked-LM heads begin."""
    with scope(owner):
        if bypass.hooked_everywhere():
            return norm(activation(dense(x)))
        return norm(linear_activation(dense, activation, x))


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _concatenated(
    wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor, bk: Tensor, bv: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.cat((wq, wk, wv)), torch.cat((bq, bk, bv))
