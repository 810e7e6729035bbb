"""Layer normalisation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.layer_norm import layer_norm as native
from . import _checks as check
from ._autocast import raised
from ._direct import direct
from ._raw import (
    apply,
    call,
    define,
    first_order,
    like_or_empty,
    none_if_absent,
    statistics_dtype,
    wants_grad,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`torch.nn.functional.layer_norm` (Ba et al. 2016, arXiv 1607.06450).

    Args:
        input: ``(*, *normalized_shape)``, floating.
        normalized_shape: the trailing sizes that are normalised together.
        weight, bias: ``normalized_shape``, in the dtype of ``input`` or float32.

    Returns:
        A tensor of the shape and dtype of ``input``. Statistics are in float32 (float64 for float64).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.
    """
    out = direct("layer_norm", input, normalized_shape, weight, bias, eps)
    if out is not None:
        return out
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    check.floating("input", input)
    if not shape or input.shape[-len(shape) :] != shape:
        expected = ", ".join(map(str, shape)) or "at least one size"
        raise RuntimeError(f"input: expected shape (*, {expected}), got {tuple(input.shape)}")
    check.norm_parameter("input", input, "weight", weight, shape)
    check.norm_parameter("input", input, "bias", bias, shape)
    backend = choose("layer_norm", input, weight, bias)
    if backend == "native":
        return native(input, shape, weight, bias, eps)
    input, weight, bias = raised(input, weight, bias)
    if wants_grad(input, weight, bias):
        return apply(LayerNormFunction, "layer_norm", input, list(shape), weight, bias, eps, backend)
    return call(layer_norm_fwd, input, list(shape), weight, bias, eps, backend)[0]


def _fwd_fake(input, normalized_shape, weight, bias, eps):
    rows = input.shape[: input.dim() - len(normalized_shape)]
    mean = input.new_empty(rows, dtype=statistics_dtype(input, weight, bias))
    return input.new_empty(input.shape), mean, torch.empty_like(mean)


def _bwd_fake(dout, input, normalized_shape, weight, bias, mean, rstd):
    return input.new_empty(input.shape), like_or_empty(weight, dout), like_or_empty(bias, dout)


layer_norm_fwd = define(
    "layer_norm_fwd(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, str backend)"
    " -> (Tensor out, Tensor mean, Tensor rstd)",
    _fwd_fake,
)
layer_norm_bwd = define(
    "layer_norm_bwd(Tensor dout, Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, Tensor mean,"
    " Tensor rstd, str backend) -> (Tensor dinput, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, normalized_shape, weight, bias, eps, backend):
        out, mean, rstd = call(layer_norm_fwd, input, normalized_shape, weight, bias, eps, backend)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.normalized_shape, ctx.backend = normalized_shape, backend
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        input, weight, bias, mean, rstd = ctx.saved_tensors
        dinput, dweight, dbias = call(
            layer_norm_bwd, dout, input, ctx.normalized_shape, weight, bias, mean, rstd, ctx.backend
        )
        return dinput, None, none_if_absent(dweight, weight), none_if_absent(dbias, bias), None, None
