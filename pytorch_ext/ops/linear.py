"""A linear layer and the activation behind it."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.linear import linear as native
from . import _checks as check
from ._autocast import lowered
from ._direct import direct
from ._raw import apply, call, define, first_order, like_or_empty, none_if_absent, wants_grad

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh")


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``activation(input @ weight.T + bias)``, as :func:`torch.nn.functional.linear` followed by an activation.

    Args:
        input: ``(*, in_features)``, floating.
        weight: ``(out_features, in_features)``, in the dtype of ``input``.
        bias: ``(out_features,)``.
        activation: ``None``, ``"relu"``, ``"gelu"`` (by the error function) or ``"gelu_tanh"``.

    Returns:
        ``(*, out_features)``; under autocast in its dtype.
    """
    out = direct("linear", input, weight, bias, activation)
    if out is not None:
        return out
    check.floating("input", input)
    check.floating("weight", weight)
    check.dims("weight", weight, 2, "(out_features, in_features)")
    out_features, in_features = weight.shape
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise RuntimeError(f"input: expected shape (*, {in_features}), got {tuple(input.shape)}")
    check.parameter("input", input, "bias", bias, (out_features,))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype is not input.dtype or t.device != input.device):
            check.same_device("input", input, name, t)
            check.same_dtype("input", input, name, t)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    backend = choose("linear", input, weight, bias)
    if backend == "native":
        return native(input, weight, bias, activation)
    input, weight, bias = lowered(input, weight, bias)
    if wants_grad(input, weight, bias):
        return apply(LinearFunction, "linear", input, weight, bias, activation or "none", backend)
    return call(linear_fwd, input, weight, bias, activation or "none", False, True, backend)[0]


def _fwd_fake(input, weight, bias, activation, keep_preactivation, frozen):
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out) if keep_preactivation else input.new_empty(0)


def _bwd_fake(dout, input, weight, bias, preactivation, activation):
    return input.new_empty(input.shape), weight.new_empty(weight.shape), like_or_empty(bias, dout)


linear_fwd = define(
    "linear_fwd(Tensor input, Tensor weight, Tensor? bias, str activation, bool keep_preactivation, bool frozen,"
    " str backend) -> (Tensor out, Tensor preactivation)",
    _fwd_fake,
)
linear_bwd = define(
    "linear_bwd(Tensor dout, Tensor input, Tensor weight, Tensor? bias, Tensor preactivation, str activation,"
    " str backend) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, activation, backend):
        out, preactivation = call(
            linear_fwd, input, weight, bias, activation, activation != "none", False, backend
        )
        ctx.save_for_backward(input, weight, bias, preactivation)
        ctx.activation, ctx.backend = activation, backend
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        input, weight, bias, preactivation = ctx.saved_tensors
        dinput, dweight, dbias = call(
            linear_bwd, dout, input, weight, bias, preactivation, ctx.activation, ctx.backend
        )
        return dinput, dweight, none_if_absent(dbias, bias), None, None
