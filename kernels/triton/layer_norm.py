"""Layer normalisation (Ba et al. 2016, arXiv 1607.06450) and its gradient.

Forward keeps a row in registers: it is read once. Backward runs about as many programs as fit on the GPU; each adds up
its rows' share of the parameters' gradients in registers, and a second small kernel adds up the programs' in a fixed
order. Rows wider than a block are read once per pass.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Configs
from .launch import launch
from .precision import loaded, stored
from .rows import (
    STREAMED,
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

# --- Math on loaded rows ----------------------------------------------------------------------------------------


@triton.jit
def moments(x, mask, cols, eps):
    """Of rows ``x`` (R, C), zero where ``mask`` is not: mean (R,), rstd (R,) and ``x - mean`` (R, C)."""
    mean = tl.sum(x, 1) / cols
    # A mean far from zero is rounded in its last bit; what is left over is small and sums exactly enough.
    mean += tl.sum(tl.where(mask, x - mean[:, None], 0.0), 1) / cols
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / cols + eps), centred


@triton.jit
def moments_from_sums(rough_mean, total, squares, cols, eps):
    """The same from what was summed block by block: ``x - rough_mean`` and its squares, each (R, C)."""
    left = tl.sum(total, 1) / cols
    # What is left over of the mean is a rounding error, so nothing cancels here.
    variance = tl.maximum(tl.sum(squares, 1) / cols - left * left, 0.0)
    return rough_mean + left, tl.rsqrt(variance + eps)


@triton.jit
def scale_and_shift(x_hat, w_ptr, b_ptr, col_offs, col_mask):
    if w_ptr is not None:
        x_hat = x_hat * loaded(w_ptr + col_offs, col_mask)[None, :]
    if b_ptr is not None:
        x_hat = x_hat + loaded(b_ptr + col_offs, col_mask)[None, :]
    return x_hat


@triton.jit
def scaled(dy, w_ptr, col_offs, col_mask):
    """The gradient of the normalised row from that of the output."""
    if w_ptr is not None:
        dy = dy * loaded(w_ptr + col_offs, col_mask)[None, :]
    return dy


@triton.jit
def input_gradient(dx_hat, x_hat, along_one, along_x_hat, rstd):
    """``along_one`` and ``along_x_hat`` are the means of ``dx_hat`` and ``dx_hat * x_hat`` in each row (R,).

    ``x_hat`` has mean 0 and variance 1, so the gradient may move it neither along 1 nor along itself.
    """
    return (dx_hat - along_one[:, None] - x_hat * along_x_hat[:, None]) * rstd[:, None]


@triton.jit
def store_partial(partial_ptr, which, total, cols, col_offs, col_mask):
    """Leaves this program's sum over its rows, ``total`` (R, C), in ``partial`` (sums, programs, cols)."""
    row = which * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_ptr + row.to(tl.int64) * cols + col_offs, tl.sum(total, 0), mask=col_mask)


# --- Kernels ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (rows, cols)
    w_ptr,  # (cols,) or None
    b_ptr,  # (cols,) or None
    out_ptr,  # (rows, cols), contiguous
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    x_row_stride,
    x_col_stride,
    rows,
    cols,
    eps,
    BLOCK_COLS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program normalises BLOCK_ROWS rows."""
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_offs < rows
    col_offs = tl.arange(0, BLOCK_COLS)
    x_row_ptrs = x_ptr + row_offs[:, None] * x_row_stride  # (R, 1)
    out_row_ptrs = out_ptr + row_offs[:, None] * cols
    if WHOLE:
        col_mask = col_offs < cols
        mask = row_mask[:, None] & col_mask[None, :]
        x = loaded(x_row_ptrs + col_offs[None, :].to(tl.int64) * x_col_stride, mask)  # (R, C)
        mean, rstd, centred = moments(x, mask, cols, eps)
        out = scale_and_shift(centred * rstd[:, None], w_ptr, b_ptr, col_offs, col_mask)
        stored(out_row_ptrs + col_offs[None, :], out, mask)
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, cols, BLOCK_COLS):
            offs = start + col_offs[None, :]
            total += loaded(
                x_row_ptrs + offs.to(tl.int64) * x_col_stride, row_mask[:, None] & (offs < cols)
            )
        rough_mean = tl.sum(total, 1) / cols
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, cols, BLOCK_COLS):
            offs = start + col_offs[None, :]
            mask = row_mask[:, None] & (offs < cols)
            x = loaded(x_row_ptrs + offs.to(tl.int64) * x_col_stride, mask)
            centred = tl.where(mask, x - rough_mean[:, None], 0.0)
            total += centred
            squares += centred * centred
        mean, rstd = moments_from_sums(rough_mean, total, squares, cols, eps)
        for start in range(0, cols, BLOCK_COLS):
            offs = start + col_offs
            mask = row_mask[:, None] & (offs < cols)[None, :]
            x = loaded(x_row_ptrs + offs[None, :].to(tl.int64) * x_col_stride, mask)
            x_hat = (x - mean[:, None]) * rstd[:, None]
            out = scale_and_shift(x_hat, w_ptr, b_ptr, offs, offs < cols)
            stored(out_row_ptrs + offs[None, :], out, mask)
    tl.store(mean_ptr + row_offs, mean, mask=row_mask)
    tl.store(rstd_ptr + row_offs, rstd, mask=row_mask)


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_bwd_kernel(
    dout_ptr,  # (rows, cols)
    x_ptr,  # (rows, cols)
    w_ptr,  # (cols,) or None
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    dx_ptr,  # (rows, cols), contiguous
    partial_ptr,  # (sums, programs, cols), float32, or None
    dout_row_stride,
    dout_col_stride,
    x_row_stride,
    x_col_stride,
    rows,
    cols,
    HAS_BIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each program takes every ``num_programs``-th block of BLOCK_ROWS rows; a row is one block wide."""
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    wide_offs = col_offs[None, :].to(tl.int64)
    dw = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_offs = start + tl.arange(0, BLOCK_ROWS)
        row_mask = row_offs < rows
        mask = row_mask[:, None] & col_mask[None, :]
        dy = loaded(dout_ptr + row_offs[:, None] * dout_row_stride + wide_offs * dout_col_stride, mask)
        x = loaded(x_ptr + row_offs[:, None] * x_row_stride + wide_offs * x_col_stride, mask)
        mean = tl.load(mean_ptr + row_offs, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row_offs, mask=row_mask, other=0.0)
        x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)  # (R, C)
        dx_hat = scaled(dy, w_ptr, col_offs, col_mask)
        along_one, along_x_hat = tl.sum(dx_hat, 1) / cols, tl.sum(dx_hat * x_hat, 1) / cols
        dx = input_gradient(dx_hat, x_hat, along_one, along_x_hat, rstd)
        stored(dx_ptr + row_offs[:, None] * cols + col_offs[None, :], dx, mask)
        if w_ptr is not None:
            dw += dy * x_hat
        if HAS_BIAS:
            db += dy
    if w_ptr is not None:
        store_partial(partial_ptr, 0, dw, cols, col_offs, col_mask)
        if HAS_BIAS:
            store_partial(partial_ptr, 1, db, cols, col_offs, col_mask)
    elif HAS_BIAS:
        store_partial(partial_ptr, 0, db, cols, col_offs, col_mask)


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
        row_offs = start + tl.arange(0, BLOCK_ROWS)
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


# --- Configurations ---------------------------------------------------------------------------------------------

# A warp holds a row of BERT's width in registers, 16 bytes per load: no exchange between warps at all.
_FORWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 4, "num_warps": 4}),
    ((1024,), {"BLOCK_ROWS": 1, "num_warps": 1}),
    ((2048,), {"BLOCK_ROWS": 1, "num_warps": 2}),
    ((4096,), {"BLOCK_ROWS": 1, "num_warps": 4}),
    ((8192,), {"BLOCK_ROWS": 1, "num_warps": 8}),
    ((None,), {"BLOCK_ROWS": 1, "num_warps": 16}),
]
# Backward holds five values per element, so a row is shared by more warps.
_BACKWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 4, "num_warps": 4}),
    ((1024,), {"BLOCK_ROWS": 1, "num_warps": 4}),
    ((4096,), {"BLOCK_ROWS": 1, "num_warps": 8}),
    ((None,), {"BLOCK_ROWS": 1, "num_warps": 16}),
]
FORWARD = Configs(
    "layer_norm_fwd",
    by=("BLOCK_COLS",),
    table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), _FORWARD_ROWS),
    wider={"BLOCK_ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)},
    kernels=lambda: [_layer_norm_fwd_kernel],
    fits=lambda constants, sizes: _fits(constants, sizes, 64),
)
BACKWARD = Configs(
    "layer_norm_bwd",
    by=("BLOCK_COLS",),
    table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), _BACKWARD_ROWS),
    wider={"BLOCK_ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)},
    kernels=lambda: [_layer_norm_bwd_kernel],
    fits=lambda constants, sizes: _fits(constants, sizes, 32),
)


def _fits(constants: dict[str, int], sizes: tuple[int, ...], most: int) -> bool:
    """At most so many elements per thread, or they do not fit in registers; at least two, or threads idle."""
    return 2 <= constants["BLOCK_ROWS"] * sizes[0] // (32 * constants["num_warps"]) <= most


# --- The ops ----------------------------------------------------------------------------------------------------


def layer_norm_fwd(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    leading = input.shape[: input.dim() - len(normalized_shape)]
    cols, rows = math.prod(normalized_shape), math.prod(leading)
    out = input.new_empty(input.shape)
    mean = input.new_empty(leading, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return out, mean, rstd
    if cols == 0:
        return out, mean.fill_(math.nan), rstd.fill_(math.nan)
    x, x_row_stride, x_col_stride = matrix(input, cols)
    block_cols, whole = block_of(cols, WIDEST_FORWARD)
    constants = FORWARD.of(input, block_cols)
    # Grid: blocks of rows.
    launch(
        _layer_norm_fwd_kernel,
        (triton.cdiv(rows, constants["BLOCK_ROWS"]),),
        x,
        vector(weight),
        vector(bias),
        out,
        mean,
        rstd,
        x_row_stride,
        x_col_stride,
        rows,
        cols,
        eps,
        BLOCK_COLS=block_cols,
        WHOLE=whole,
        **constants,
    )
    return out, mean, rstd


def layer_norm_bwd(
    dout: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    cols, rows = math.prod(normalized_shape), mean.numel()
    dinput = input.new_empty(input.shape)
    if rows == 0 or cols == 0:
        _, gradients = parameter_gradients(dout, 0, cols, weight, bias)
        return dinput, *(gradient.zero_() for gradient in gradients)
    dweight, dbias = norm_gradients(dout, input, weight, bias, mean, rstd, dinput, cols, rows)
    return dinput, dweight, dbias


def norm_gradients(
    dout: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dinput: Tensor,
    cols: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Fills ``dinput`` (contiguous) and returns ``(dweight, dbias)``."""
    dy, dy_row_stride, dy_col_stride = matrix(dout, cols)
    x, x_row_stride, x_col_stride = matrix(input, cols)
    strides = (dy_row_stride, dy_col_stride, x_row_stride, x_col_stride)
    block_cols, whole = block_of(cols, WIDEST_BACKWARD)
    has_weight, has_bias = weight is not None, bias is not None
    if whole:
        constants = BACKWARD.of(input, block_cols)
        count = programs(input, triton.cdiv(rows, constants["BLOCK_ROWS"]), constants["num_warps"])
        partials, gradients = parameter_gradients(dout, count, cols, weight, bias)
        # Grid: as many programs as share the rows.
        launch(
            _layer_norm_bwd_kernel,
            (count,),
            dy,
            x,
            vector(weight),
            mean,
            rstd,
            dinput,
            partials,
            *strides,
            rows,
            cols,
            HAS_BIAS=has_bias,
            BLOCK_COLS=block_cols,
            **constants,
        )
    else:
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
            *strides,
            cols,
            BLOCK_COLS=STREAMED,
            num_warps=8,
        )
        count = min(triton.cdiv(rows, 8), 32)
        partials, gradients = parameter_gradients(dout, count, cols, weight, bias)
        if partials is not None:
            # Grid: programs that share the rows × blocks of columns.
            launch(
                _layer_norm_bwd_parameters_kernel,
                (count, triton.cdiv(cols, 128)),
                dy,
                x,
                mean,
                rstd,
                partials,
                *strides,
                rows,
                cols,
                HAS_WEIGHT=has_weight,
                HAS_BIAS=has_bias,
                BLOCK_ROWS=8,
                BLOCK_COLS=128,
                num_warps=4,
            )
    if partials is not None:
        sum_partials(partials, *(g for g, there in zip(gradients, (has_weight, has_bias), strict=True) if there))
    return gradients[0], gradients[1]


# --- What to compile ahead of time, and to tune -----------------------------------------------------------------


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable]]:
    x = empty(sizes.tokens, sizes.hidden, dtype=sizes.dtype)
    weight, bias = (empty(sizes.hidden, dtype=sizes.dtype) for _ in range(2))
    mean, rstd = (empty(sizes.tokens, dtype=torch.float32) for _ in range(2))
    shape = [sizes.hidden]
    yield FORWARD, lambda: layer_norm_fwd(x, shape, weight, bias, 1e-5)
    yield BACKWARD, lambda: layer_norm_bwd(x, x, shape, weight, bias, mean, rstd)


AHEAD = [
    *(Sizes(hidden=hidden) for hidden in (256, 768, 1024, 2048, 4096, 8192, 16384, 20000)),
    Sizes(hidden=768, dtype=torch.float32),
    Sizes(hidden=8192, dtype=torch.float32),
]
