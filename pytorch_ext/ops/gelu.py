"""Gaussian error linear unit."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.gelu import gelu as native
from . import _checks as check
from ._direct import direct
from ._raw import apply, call, define, first_order, wants_grad


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """As :func:`torch.nn.functional.gelu` (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    Args:
        input: any shape, floating.
        approximate: ``"none"`` (by the error function) or ``"tanh"``.

    Returns:
        A tensor of the shape and dtype of ``input``.
    """
    out = direct("gelu", input, approximate)
    if out is not None:
        return out
    check.floating("input", input)
    check.approximate(approximate)
    backend = choose("gelu", input)
    if backend == "native":
        return native(input, approximate)
    if wants_grad(input):
        return apply(GeluFunction, "gelu", input, approximate, backend)
    return call(gelu_fwd, input, approximate, backend)


def _fwd_fake(input, approximate):
    return input.new_empty(input.shape)


def _bwd_fake(dout, input, approximate):
    return input.new_empty(input.shape)


gelu_fwd = define("gelu_fwd(Tensor input, str approximate, str backend) -> Tensor", _fwd_fake)
gelu_bwd = define("gelu_bwd(Tensor dout, Tensor input, str approximate, str backend) -> Tensor", _bwd_fake)


class GeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, approximate, backend):
        ctx.save_for_backward(input)
        ctx.approximate, ctx.backend = approximate, backend
        return call(gelu_fwd, input, approximate, backend)

    @staticmethod
    @first_order
    def backward(ctx, dout):
        (input,) = ctx.saved_tensors
        return call(gelu_bwd, dout, input, ctx.approximate, ctx.backend), None, None
