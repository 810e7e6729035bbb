"""Gradients of normalised rows that are wider than a block: each row is read in two passes, the parameters' gradients
are a kernel of their own, and what lies behind the normalisation is another.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._norms import store_partial
from .configs import cdiv
from .launch import launch
from .philox import dropout_arguments, dropped, keep_rows
from .precision import loaded, stored
from .rows import STREAMED, matrix, parameter_gradients, sum_partials, vector

# Of the kernels that add up columns.
ROWS, COLS = 8, 128


@triton.jit
def _layer_norm_bwd_wide_kernel(
    dout_ptr,  # (rows, cols)
    x_ptr,  # (rows, cols)
    w_ptr,  # (cols,) or None
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    dx_ptr,  # (rows, cols), contiguous
    dout_row_stride,
    dout_col_stride,
    x_row_stride,
    x_col_stride,
    cols,
    BLOCK_COLS: tl.constexpr,
):
    """Each program makes the input gradient of one row, in two passes over it."""
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    block_offs = tl.arange(0, BLOCK_COLS)
    along_one = tl.zeros((BLOCK_COLS,), tl.float32)
    along_x_hat = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        offs = start + block_offs
        mask = offs < cols
        dx_hat = loaded(dout_ptr + row * dout_row_stride + offs.to(tl.int64) * dout_col_stride, mask)
        x = loaded(x_ptr + row * x_row_stride + offs.to(tl.int64) * x_col_stride, mask)
        if w_ptr is not None:
            dx_hat = dx_hat * loaded(w_ptr + offs, mask)
        along_one += dx_hat
        along_x_hat += tl.where(mask, dx_hat * (x - mean) * rstd, 0.0)
    mean_dx_hat, mean_product = tl.sum(along_one, 0) / cols, tl.sum(along_x_hat, 0) / cols
    for start in range(0, cols, BLOCK_COLS):
        offs = start + block_offs
        mask = offs < cols
        dx_hat = loaded(dout_ptr + row * dout_row_stride + offs.to(tl.int64) * dout_col_stride, mask)
        x = loaded(x_ptr + row * x_row_stride + offs.to(tl.int64) * x_col_stride, mask)
        if w_ptr is not None:
            dx_hat = dx_hat * loaded(w_ptr + offs, mask)
        dx = (dx_hat - mean_dx_hat - (x - mean) * rstd * mean_product) * rstd
        stored(dx_ptr + row * cols + offs, dx, mask)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_parameters_kernel(
    dout_ptr,  # (rows, cols)
    x_ptr,  # (rows, cols)
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    partial_ptr,  # (sums, programs, cols), float32
    dout_row_stride,
    dout_col_stride,
    x_row_stride,
    x_col_stride,
    rows,
    cols,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program ``(i, j)`` adds up every ``num_programs(0)``-th block of rows from ``i`` on, in column block ``j``."""
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    wide_offs = col_offs[None, :].to(tl.int64)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_offs = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = row_offs < rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = loaded(dout_ptr + row_offs[:, None] * dout_row_stride + wide_offs * dout_col_stride, mask)
        if HAS_WEIGHT:
            x = loaded(x_ptr + row_offs[:, None] * x_row_stride + wide_offs * x_col_stride, mask)
            mean = tl.load(mean_ptr + row_offs, mask=row_mask, other=0.0)
            rstd = tl.load(rstd_ptr + row_offs, mask=row_mask, other=0.0)
            dw += dy * (x - mean[:, None]) * rstd[:, None]
        if HAS_BIAS:
            db += dy
    if HAS_WEIGHT:
        store_partial(partial_ptr, 0, dw, cols, col_offs, col_mask)
        if HAS_BIAS:
            store_partial(partial_ptr, 1, db, cols, col_offs, col_mask)
    else:
        store_partial(partial_ptr, 0, db, cols, col_offs, col_mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def _dropout_add_bwd_kernel(
    dy_ptr,  # (rows, cols), float32, contiguous
    dsum_ptr,  # (rows, cols) or None
    rng_ptr,  # (2,), int64, or None
    dx_ptr,  # (rows, cols), contiguous
    dr_ptr,  # (rows, cols), contiguous
    partial_ptr,  # (1, programs, cols), float32, or None
    dsum_row_stride,
    dsum_col_stride,
    rows,
    cols,
    threshold,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """What is behind the normalisation where rows are wide: program ``(i, j)`` takes every ``num_programs(0)``-th row
    block from ``i`` on, in column block ``j``.
    """
    first_col = tl.program_id(1) * BLOCK_COLS
    col_offs = first_col + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    dx_bias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_offs = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row_offs < rows)[:, None] & col_mask[None, :]
        offs = row_offs[:, None] * cols + col_offs[None, :]
        dx = loaded(dy_ptr + offs, mask)
        if dsum_ptr is not None:
            wide_offs = col_offs[None, :].to(tl.int64)
            dx += loaded(
                dsum_ptr + row_offs[:, None] * dsum_row_stride + wide_offs * dsum_col_stride, mask
            )
        stored(dr_ptr + offs, dx, mask)
        if rng_ptr is not None:
            dx = dropped(dx, keep_rows(rng_ptr, threshold, scale, row_offs, first_col, BLOCK_COLS), scale)
        stored(dx_ptr + offs, dx, mask)
        dx_bias += tl.where(mask, dx, 0.0)
    if partial_ptr is not None:
        store_partial(partial_ptr, 0, dx_bias, cols, col_offs, col_mask)


def _sharing(rows: int) -> int:
    """How many programs share the rows of a block of columns; there are many blocks of columns."""
    return min(cdiv(rows, ROWS), 32)


def wide_norm_gradients(
    dout: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dinput: Tensor,
    cols: int,
) -> tuple[Tensor, Tensor]:
    """Fills ``dinput`` (contiguous) and returns ``(dweight, dbias)``, empty where there is no parameter."""
    rows = mean.numel()
    dy, *dy_strides = matrix(dout, cols)
    x, *x_strides = matrix(input, cols)
    # Grid: rows.
    launch(
        _layer_norm_bwd_wide_kernel,
        (rows,),
        dy,
        x,
        vector(weight),
        mean,
        rstd,
        dinput,
        *dy_strides,
        *x_strides,
        cols,
        BLOCK_COLS=STREAMED,
        num_warps=8,
    )
    partials, gradients = parameter_gradients(dout, _sharing(rows), cols, weight, bias)
    if partials is not None:
        # Grid: programs that share the rows × blocks of columns.
        launch(
            _layer_norm_bwd_parameters_kernel,
            (_sharing(rows), cdiv(cols, COLS)),
            dy,
            x,
            mean,
            rstd,
            partials,
            *dy_strides,
            *x_strides,
            rows,
            cols,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=ROWS,
            BLOCK_COLS=COLS,
            num_warps=4,
        )
    sum_partials(partials, *gradients)
    return gradients[0], gradients[1]


def wide_dropout_add_gradients(
    dx: Tensor,
    dsum: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    dinput: Tensor,
    dresidual: Tensor,
    input_bias: Tensor | None,
) -> Tensor:
    """Fills ``dinput`` and ``dresidual`` from the gradient ``dx`` (rows, cols) of the sum; returns ``dinput_bias``."""
    cols = dx.shape[-1]
    rows = dx.numel() // cols
    ds, *ds_strides = (None, 0, 0) if dsum is None else matrix(dsum, cols)
    partials, (dinput_bias,) = parameter_gradients(dinput, _sharing(rows), cols, input_bias)
    # Grid: programs that share the rows × blocks of columns.
    launch(
        _dropout_add_bwd_kernel,
        (_sharing(rows), cdiv(cols, COLS)),
        dx,
        ds,
        rng,
        dinput,
        dresidual,
        partials,
        *ds_strides,
        rows,
        cols,
        *dropout_arguments(dropout_p),
        BLOCK_ROWS=ROWS,
        BLOCK_COLS=COLS,
        num_warps=4,
    )
    sum_partials(partials, dinput_bias)
    return dinput_bias
