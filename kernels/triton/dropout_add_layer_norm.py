"""``layer_norm(residual + dropout(input + input_bias))`` in one pass, and its gradients.

The sum is rounded to the dtype in which it is stored before it is normalised: that is all that backward sees of it.
Backward draws the mask of dropout again. See ``layer_norm.py`` for how rows are shared out.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._norms import (
    input_gradient,
    moments,
    moments_from_sums,
    scale_and_shift,
    scaled,
    store_partial,
)
from ._wide_norms import wide_dropout_add_gradients, wide_norm_gradients
from .configs import Configs, cdiv
from .launch import launch
from .philox import dropout_arguments, dropped, keep_rows
from .precision import loaded, narrowed, stored
from .rows import (
    WIDEST_BACKWARD,
    WIDEST_FORWARD,
    block_of,
    matrix,
    parameter_gradients,
    programs,
    sum_partials,
    vector,
)
from .sizes import Sizes

# --- Kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _summed(
    x_row_ptrs,
    r_row_ptrs,
    x_bias_ptr,
    rng_ptr,
    threshold,
    scale,
    x_col_stride,
    r_col_stride,
    row_offs,
    start,
    row_mask,
    cols,
    dtype: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Columns ``start`` and on of the sum (R, C), as it is stored: rounded to ``dtype``, here in float32."""
    col_offs = start + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    mask = row_mask[:, None] & col_mask[None, :]
    wide_offs = col_offs[None, :].to(tl.int64)
    x = loaded(x_row_ptrs + wide_offs * x_col_stride, mask)
    if x_bias_ptr is not None:
        x += loaded(x_bias_ptr + col_offs, col_mask)[None, :]
    if rng_ptr is not None:
        keep = keep_rows(rng_ptr, threshold, scale, row_offs, start, BLOCK_COLS)
        x = dropped(x, keep, scale)
    x += loaded(r_row_ptrs + wide_offs * r_col_stride, mask)
    return tl.where(mask, narrowed(x, dtype).to(tl.float32), 0.0), mask


@triton.jit(do_not_specialize=["rows", "threshold"])
def _dropout_add_layer_norm_fwd_kernel(
    x_ptr,  # (rows, cols)
    r_ptr,  # (rows, cols), the residual
    w_ptr,  # (cols,)
    b_ptr,  # (cols,) or None
    x_bias_ptr,  # (cols,) or None
    rng_ptr,  # (2,), int64, or None
    out_ptr,  # (rows, cols), contiguous
    sum_ptr,  # (rows, cols), contiguous
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    x_row_stride,
    x_col_stride,
    r_row_stride,
    r_col_stride,
    rows,
    cols,
    threshold,
    scale,
    eps,
    BLOCK_COLS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program takes BLOCK_ROWS rows."""
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_offs < rows
    col_offs = tl.arange(0, BLOCK_COLS)
    x_row_ptrs = x_ptr + row_offs[:, None] * x_row_stride  # (R, 1)
    r_row_ptrs = r_ptr + row_offs[:, None] * r_row_stride
    out_row_ptrs = out_ptr + row_offs[:, None] * cols
    sum_row_ptrs = sum_ptr + row_offs[:, None] * cols
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    if WHOLE:
        x, mask = _summed(
            x_row_ptrs,
            r_row_ptrs,
            x_bias_ptr,
            rng_ptr,
            threshold,
            scale,
            x_col_stride,
            r_col_stride,
            row_offs,
            0,
            row_mask,
            cols,
            dtype,
            BLOCK_COLS,
        )
        stored(sum_row_ptrs + col_offs[None, :], x, mask)
        mean, rstd, centred = moments(x, mask, cols, eps)
        out = scale_and_shift(centred * rstd[:, None], w_ptr, b_ptr, col_offs, col_offs < cols)
        stored(out_row_ptrs + col_offs[None, :], out, mask)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        mean = tl.zeros((BLOCK_ROWS,), tl.float32)
        rstd = tl.zeros((BLOCK_ROWS,), tl.float32)
        # Three passes over the row: its mean, what is left over of it and the squares, the output.
        for step in tl.static_range(3):
            for start in range(0, cols, BLOCK_COLS):
                x, mask = _summed(
                    x_row_ptrs,
                    r_row_ptrs,
                    x_bias_ptr,
                    rng_ptr,
                    threshold,
                    scale,
                    x_col_stride,
                    r_col_stride,
                    row_offs,
                    start,
                    row_mask,
                    cols,
                    dtype,
                    BLOCK_COLS,
                )
                offs = start + col_offs
                if step == 0:
                    stored(sum_row_ptrs + offs[None, :], x, mask)
                    total += x
                elif step == 1:
                    centred = tl.where(mask, x - mean[:, None], 0.0)
                    total += centred
                    squares += centred * centred
                else:
                    x_hat = (x - mean[:, None]) * rstd[:, None]
                    out = scale_and_shift(x_hat, w_ptr, b_ptr, offs, offs < cols)
                    stored(out_row_ptrs + offs[None, :], out, mask)
            if step == 0:
                mean = tl.sum(total, 1) / cols
                total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
            elif step == 1:
                mean, rstd = moments_from_sums(mean, total, squares, cols, eps)
    tl.store(mean_ptr + row_offs, mean, mask=row_mask)
    tl.store(rstd_ptr + row_offs, rstd, mask=row_mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def _dropout_add_layer_norm_bwd_kernel(
    dout_ptr,  # (rows, cols)
    dsum_ptr,  # (rows, cols) or None
    sum_ptr,  # (rows, cols), contiguous
    w_ptr,  # (cols,)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    rng_ptr,  # (2,), int64, or None
    dx_ptr,  # (rows, cols), contiguous
    dr_ptr,  # (rows, cols), contiguous
    partial_ptr,  # (sums, programs, cols), float32
    dout_row_stride,
    dout_col_stride,
    dsum_row_stride,
    dsum_col_stride,
    rows,
    cols,
    threshold,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program takes every ``num_programs``-th block of BLOCK_ROWS rows; a row is one block wide."""
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    wide_offs = col_offs[None, :].to(tl.int64)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dx_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_offs = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = row_offs < rows
        mask = row_mask[:, None] & col_mask[None, :]
        offs = row_offs[:, None] * cols + col_offs[None, :]
        dy = loaded(dout_ptr + row_offs[:, None] * dout_row_stride + wide_offs * dout_col_stride, mask)
        x = loaded(sum_ptr + offs, mask)
        mean = tl.load(mean_ptr + row_offs, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row_offs, mask=row_mask, other=0.0)
        x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)  # (R, C)
        dx_hat = scaled(dy, w_ptr, col_offs, col_mask)
        along_one, along_x_hat = tl.sum(dx_hat, 1) / cols, tl.sum(dx_hat * x_hat, 1) / cols
        dx = input_gradient(dx_hat, x_hat, along_one, along_x_hat, rstd)
        if dsum_ptr is not None:
            dx += loaded(
                dsum_ptr + row_offs[:, None] * dsum_row_stride + wide_offs * dsum_col_stride, mask
            )
        stored(dr_ptr + offs, dx, mask)
        if rng_ptr is not None:
            dx = dropped(dx, keep_rows(rng_ptr, threshold, scale, row_offs, 0, BLOCK_COLS), scale)
        stored(dx_ptr + offs, dx, mask)
        dw += dy * x_hat
        if HAS_BIAS:
            db += dy
        if HAS_INPUT_BIAS:
            dx_bias += tl.where(mask, dx, 0.0)
    store_partial(partial_ptr, 0, dw, cols, col_offs, col_mask)
    if HAS_BIAS:
        store_partial(partial_ptr, 1, db, cols, col_offs, col_mask)
    if HAS_INPUT_BIAS:
        store_partial(partial_ptr, 1 + HAS_BIAS, dx_bias, cols, col_offs, col_mask)


# --- Configurations ---------------------------------------------------------------------------------------------

# The mask of dropout takes registers beside the row, so a warp holds less of it than in layer_norm.
_FORWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 4, "num_warps": 4}),
    ((1024,), {"BLOCK_ROWS": 1, "num_warps": 2}),
    ((2048,), {"BLOCK_ROWS": 1, "num_warps": 4}),
    ((4096,), {"BLOCK_ROWS": 1, "num_warps": 8}),
    ((None,), {"BLOCK_ROWS": 1, "num_warps": 16}),
]
_BACKWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 4, "num_warps": 4}),
    ((1024,), {"BLOCK_ROWS": 1, "num_warps": 4}),
    ((2048,), {"BLOCK_ROWS": 1, "num_warps": 8}),
    ((None,), {"BLOCK_ROWS": 1, "num_warps": 16}),
]


def _configs(name: str, rows: list, kernel: Callable, most: int) -> Configs:
    return Configs(
        name,
        by=("BLOCK_COLS",),
        table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), rows),
        wider={"BLOCK_ROWS": (1, 2, 4), "num_warps": (1, 2, 4, 8, 16)},
        kernels=lambda: [kernel],
        fits=lambda c, sizes: 2 <= c["BLOCK_ROWS"] * sizes[0] // (32 * c["num_warps"]) <= most,
    )


FORWARD = _configs("dropout_add_layer_norm_fwd", _FORWARD_ROWS, _dropout_add_layer_norm_fwd_kernel, 64)
BACKWARD = _configs("dropout_add_layer_norm_bwd", _BACKWARD_ROWS, _dropout_add_layer_norm_bwd_kernel, 32)


# --- The ops ----------------------------------------------------------------------------------------------------


def dropout_add_layer_norm_fwd(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cols, leading = input.shape[-1], input.shape[:-1]
    rows = math.prod(leading)
    out = input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, residual.dtype))
    sum = torch.empty_like(out)
    mean = input.new_empty(leading, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return out, sum, mean, rstd
    if cols == 0:
        return out, sum, mean.fill_(math.nan), rstd.fill_(math.nan)
    x, *x_strides = matrix(input, cols)
    r, *r_strides = matrix(residual, cols)
    block_cols, whole = block_of(cols, WIDEST_FORWARD)
    constants = FORWARD.of(input, block_cols)
    # Grid: blocks of rows.
    launch(
        _dropout_add_layer_norm_fwd_kernel,
        (cdiv(rows, constants["BLOCK_ROWS"]),),
        x,
        r,
        vector(weight),
        vector(bias),
        vector(input_bias),
        rng,
        out,
        sum,
        mean,
        rstd,
        *x_strides,
        *r_strides,
        rows,
        cols,
        *dropout_arguments(dropout_p),
        eps,
        BLOCK_COLS=block_cols,
        WHOLE=whole,
        **constants,
    )
    return out, sum, mean, rstd


def dropout_add_layer_norm_bwd(
    dout: Tensor,
    dsum: Tensor | None,
    sum: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rng: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cols, rows = sum.shape[-1], mean.numel()
    dinput, dresidual = input.new_empty(input.shape), residual.new_empty(residual.shape)
    if rows == 0 or cols == 0:
        _, gradients = parameter_gradients(dout, 0, cols, weight, bias, input_bias)
        return dinput, dresidual, *(gradient.zero_() for gradient in gradients)
    sum = sum.contiguous()
    block_cols, whole = block_of(cols, WIDEST_BACKWARD)
    if not whole:
        dx = torch.empty_like(sum, dtype=torch.float32)
        dweight, dbias = wide_norm_gradients(dout, sum, weight, bias, mean, rstd, dx, cols)
        dinput_bias = wide_dropout_add_gradients(dx, dsum, rng, dropout_p, dinput, dresidual, input_bias)
        return dinput, dresidual, dweight, dbias, dinput_bias
    dy, *dy_strides = matrix(dout, cols)
    ds, *ds_strides = (None, 0, 0) if dsum is None else matrix(dsum, cols)
    constants = BACKWARD.of(sum, block_cols)
    count = programs(sum, cdiv(rows, constants["BLOCK_ROWS"]), constants["num_warps"])
    partials, gradients = parameter_gradients(dout, count, cols, weight, bias, input_bias)
    # Grid: as many programs as share the rows.
    launch(
        _dropout_add_layer_norm_bwd_kernel,
        (count,),
        dy,
        ds,
        sum,
        vector(weight),
        mean,
        rstd,
        rng,
        dinput,
        dresidual,
        partials,
        *dy_strides,
        *ds_strides,
        rows,
        cols,
        *dropout_arguments(dropout_p),
        HAS_BIAS=bias is not None,
        HAS_INPUT_BIAS=input_bias is not None,
        BLOCK_COLS=block_cols,
        **constants,
    )
    sum_partials(partials, *gradients)
    return dinput, dresidual, *gradients


# --- What to compile ahead of time, and to tune -----------------------------------------------------------------


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable]]:
    x, residual = (empty(sizes.tokens, sizes.hidden, dtype=sizes.dtype) for _ in range(2))
    weight, bias, input_bias = (empty(sizes.hidden, dtype=sizes.dtype) for _ in range(3))
    mean, rstd = (empty(sizes.tokens, dtype=torch.float32) for _ in range(2))
    rng = empty(2, dtype=torch.int64) if sizes.dropout_p else None
    parameters, p = (weight, bias, input_bias), sizes.dropout_p
    yield FORWARD, lambda: dropout_add_layer_norm_fwd(x, residual, *parameters, rng, p, 1e-5)
    yield (
        BACKWARD,
        lambda: dropout_add_layer_norm_bwd(x, None, x, x, residual, *parameters, mean, rstd, rng, p),
    )


AHEAD = [
    *(Sizes(hidden=hidden, dropout_p=0.1) for hidden in (256, 768, 2048, 4096, 8192, 16384, 20000)),
    Sizes(hidden=768),
    Sizes(hidden=768, dropout_p=0.1, dtype=torch.float32),
]
