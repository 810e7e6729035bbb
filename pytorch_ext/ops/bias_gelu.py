"""GELU of a sum with a bias."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.bias_gelu import bias_gelu as native
from . import _checks as check
from ._direct import direct
from ._raw import apply, call, define, first_order, wants_grad


def bias_gelu(input: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """``gelu(input + bias)``.

    Args:
        input: ``(*, features)``, floating.
        bias: ``(features,)``; added in the dtype of ``input``.
        approximate: ``"none"`` (by the error function) or ``"tanh"``.

    Returns:
        A tensor of the shape and dtype of ``input``.
    """
    out = direct("bias_gelu", input, bias, approximate)
    if out is not None:
        return out
    check.floating("input", input)
    if input.dim() == 0:
        raise RuntimeError("input: expected at least one dimension, got a scalar")
    check.tensor("bias", bias)
    check.parameter("input", input, "bias", bias, input.shape[-1:])
    check.approximate(approximate)
    backend = choose("bias_gelu", input, bias)
    if backend == "native":
        return native(input, bias, approximate)
    if wants_grad(input, bias):
        return apply(BiasGeluFunction, "bias_gelu", input, bias, approximate, backend)
    return call(bias_gelu_fwd, input, bias, approximate, backend)


def _fwd_fake(input, bias, approximate):
    return input.new_empty(input.shape)


def _bwd_fake(dout, input, bias, approximate):
    return input.new_empty(input.shape), bias.new_empty(bias.shape)


bias_gelu_fwd = define(
    "bias_gelu_fwd(Tensor input, Tensor bias, str approximate, str backend) -> Tensor", _fwd_fake
)
bias_gelu_bwd = define(
    "bias_gelu_bwd(Tensor dout, Tensor input, Tensor bias, str approximate, str backend)"
    " -> (Tensor dinput, Tensor dbias)",
    _bwd_fake,
)


class BiasGeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, approximate, backend):
        ctx.save_for_backward(input, bias)
        ctx.approximate, ctx.backend = approximate, backend
        return call(bias_gelu_fwd, input, bias, approximate, backend)

    @staticmethod
    @first_order
    def backward(ctx, dout):
        input, bias = ctx.saved_tensors
        return *call(bias_gelu_bwd, dout, input, bias, ctx.approximate, ctx.backend), None, None
