"""What the blocks of a Transformer are made of: each piece fused where calling its modules would do nothing else."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import choose
from . import _bypass as bypass

_apart: ContextVar[bool] = ContextVar("pytorch_ext.nn.activations_apart", default=False)
_ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: ops.gelu(x, "tanh"),
}


@contextlib.contextmanager
def activations_apart() -> Iterator[None]:
    """An activation is an op of its own here, so that it can be computed once more without the product before it."""
    before = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(before)


def linear_activation(linear: nn.Module, activation: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """``activation(linear(x))``, as one op where ``linear`` is plain and the activation known."""
    if bypass.plain_linear(linear):
        return activated(x, linear.weight, linear.bias, activation)
    x = linear(x)
    return x if activation is None else activation(x)


def activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``activation(x @ weight.T + bias)``, as one op where the activation is known."""
    if activation is None:
        return ops.linear(x, weight, bias)
    name = bypass.activation_name(activation)
    if name is None:
        return activation(ops.linear(x, weight, bias))
    if not torch.compiler.is_compiling() and _apart.get():
        return _ACTIVATIONS[name](ops.linear(x, weight, bias))
    return ops.linear(x, weight, bias, name)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """``x @ weight.T``, and the bias if :func:`add_norm` is still to add it.

    PyTorch adds the bias within the product; a kernel of ours takes it on the way to the sum.
    """
    if bias is not None and _adds_bias(residual, dropout, norm):
        return ops.linear(x, weight), bias
    return ops.linear(x, weight, bias), None


def linear_product(
    x: Tensor, linear: nn.Module, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """:func:`product` for a module, which may be no plain linear layer."""
    if bypass.plain_linear(linear):
        return product(x, linear.weight, linear.bias, residual, dropout, norm)
    return linear(x), None


def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    dropout: nn.Module,
    norm: nn.Module,
    *,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``norm(residual + dropout(x + bias))``; with ``prenorm`` the sum comes second."""
    if bypass.plain_norm(norm) and bypass.plain_dropout(dropout):
        return ops.dropout_add_layer_norm(
            x,
            residual,
            norm.weight,
            norm.bias,
            input_bias=bias,
            dropout_p=bypass.dropout_rate(dropout),
            training=dropout.training,
            eps=norm.eps,
            prenorm=prenorm,
        )
    total = residual + dropout(x if bias is None else x + bias)
    return (norm(total), total) if prenorm else norm(total)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if bypass.plain_norm(norm):
        return ops.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return norm(x)


def _adds_bias(residual: Tensor, dropout: nn.Module, norm: nn.Module) -> bool:
    plain = bypass.plain_norm(norm) and bypass.plain_dropout(dropout)
    return plain and choose("dropout_add_layer_norm", residual) != "native"
