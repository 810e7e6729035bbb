"""Bias, dropout, residual connection and layer normalisation in one pass."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.dropout_add_layer_norm import dropout_add_layer_norm as native
from . import _checks as check
from ._autocast import raised
from ._direct import direct
from ._raw import (
    apply,
    call,
    define,
    draw_rng,
    first_order,
    like_or_empty,
    none_if_absent,
    statistics_dtype,
    wants_grad,
)
from .layer_norm import layer_norm_bwd


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    eps: float = 1e-5,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(residual + dropout(input + input_bias))`` over the last dimension.

    Args:
        input, residual: ``(*, hidden)`` of one shape, floating.
        weight, bias: ``(hidden,)``, of the normalisation.
        input_bias: ``(hidden,)``: the bias of the linear layer that made ``input``, added in the dtype of ``input``.
        dropout_p: the probability of zeroing an element of ``input + input_bias``; ignored unless ``training``.
        prenorm: also return the sum, for blocks that normalise first and hand the sum on.

    Returns:
        The normalised sum, or with ``prenorm`` the pair ``(normalised, sum)``, in the wider dtype of ``input`` and
        ``residual``.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1].
        RuntimeError: a shape, dtype or device that does not fit.
    """
    options = (dropout_p, training, eps, prenorm)
    outs = direct("dropout_add_layer_norm", input, residual, weight, bias, input_bias, *options)
    if outs is not None:
        return outs if prenorm else outs[0]
    check.floating("input", input)
    if input.dim() == 0:
        raise RuntimeError("input: expected shape (*, hidden), got a scalar")
    check.tensor("residual", residual)
    check.parameter("input", input, "residual", residual, input.shape)
    hidden = input.shape[-1:]
    check.tensor("weight", weight)
    check.norm_parameter("input", input, "weight", weight, hidden)
    check.norm_parameter("input", input, "bias", bias, hidden)
    check.parameter("input", input, "input_bias", input_bias, hidden)
    check.probability("dropout_p", dropout_p)
    if not training:
        dropout_p = 0.0
    backend = choose("dropout_add_layer_norm", input, residual, weight, bias, input_bias)
    if backend == "native":
        return native(input, residual, weight, bias, input_bias, dropout_p, eps, prenorm)
    if input_bias is not None:
        input_bias = input_bias.to(input.dtype)
    input, residual, weight, bias, input_bias = raised(input, residual, weight, bias, input_bias)
    rng = draw_rng(input) if dropout_p > 0.0 else None
    if wants_grad(input, residual, weight, bias, input_bias):
        inputs = (input, residual, weight, bias, input_bias, rng, dropout_p, eps, prenorm, backend)
        out, sum = apply(DropoutAddLayerNormFunction, "dropout_add_layer_norm", *inputs)
    else:
        out, sum, _, _ = call(
            dropout_add_layer_norm_fwd,
            input,
            residual,
            weight,
            bias,
            input_bias,
            rng,
            dropout_p,
            eps,
            backend,
        )
    return (out, sum) if prenorm else out


def _fwd_fake(input, residual, weight, bias, input_bias, rng, dropout_p, eps):
    dtype = torch.promote_types(input.dtype, residual.dtype)
    out = input.new_empty(input.shape, dtype=dtype)
    mean = input.new_empty(input.shape[:-1], dtype=statistics_dtype(input, residual, weight))
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


def _bwd_fake(dout, dsum, sum, input, residual, weight, bias, input_bias, mean, rstd, rng, dropout_p):
    return (
        input.new_empty(input.shape),
        residual.new_empty(residual.shape),
        weight.new_empty(weight.shape),
        like_or_empty(bias, dout),
        like_or_empty(input_bias, dout),
    )


dropout_add_layer_norm_fwd = define(
    "dropout_add_layer_norm_fwd(Tensor input, Tensor residual, Tensor weight, Tensor? bias, Tensor? input_bias,"
    " Tensor? rng, float dropout_p, float eps, str backend) -> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)",
    _fwd_fake,
)
dropout_add_layer_norm_bwd = define(
    "dropout_add_layer_norm_bwd(Tensor dout, Tensor? dsum, Tensor sum, Tensor input, Tensor residual, Tensor weight,"
    " Tensor? bias, Tensor? input_bias, Tensor mean, Tensor rstd, Tensor? rng, float dropout_p, str backend)"
    " -> (Tensor dinput, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dinput_bias)",
    _bwd_fake,
)


class DropoutAddLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, input_bias, rng, dropout_p, eps, prenorm, backend):
        out, sum, mean, rstd = call(
            dropout_add_layer_norm_fwd,
            input,
            residual,
            weight,
            bias,
            input_bias,
            rng,
            dropout_p,
            eps,
            backend,
        )
        # Without prenorm nobody sees the sum, and a gradient of zeros need not be made for it.
        ctx.set_materialize_grads(False)
        if not prenorm:
            ctx.mark_non_differentiable(sum)
        ctx.save_for_backward(sum, input, residual, weight, bias, input_bias, mean, rstd, rng)
        ctx.dropout_p, ctx.backend = dropout_p, backend
        return out, sum

    @staticmethod
    @first_order
    def backward(ctx, dout, dsum):
        sum, input, residual, weight, bias, input_bias, mean, rstd, rng = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(sum)
        if dsum is None and input_bias is None and rng is None and input.dtype == residual.dtype:
            # Both summands have the gradient of the sum: one tensor for both, as from PyTorch's addition.
            dsum, dweight, dbias = call(
                layer_norm_bwd, dout, sum, sum.shape[-1:], weight, bias, mean, rstd, ctx.backend
            )
            return dsum, dsum, dweight, none_if_absent(dbias, bias), None, None, None, None, None, None
        dinput, dresidual, dweight, dbias, dinput_bias = call(
            dropout_add_layer_norm_bwd,
            *(
                dout,
                dsum,
                sum,
                input,
                residual,
                weight,
                bias,
                input_bias,
                mean,
                rstd,
                rng,
                ctx.dropout_p,
                ctx.backend,
            ),
        )
        parameters = (dweight, none_if_absent(dbias, bias), none_if_absent(dinput_bias, input_bias))
        return dinput, dresidual, *parameters, None, None, None, None, None
