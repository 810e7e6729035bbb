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

from ._norms import (
    input_gradient,
    moments,
    moments_from_sums,
    scale_and_shift,
    scaled,
    store_partial,
)
from ._wide_norms import wide_norm_gradients
from .configs import Configs, cdiv
from .launch import launch
from .precision import loaded, stored
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
        row_offs = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
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
        (cdiv(rows, constants["BLOCK_ROWS"]),),
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
    block_cols, whole = block_of(cols, WIDEST_BACKWARD)
    if not whole:
        return dinput, *wide_norm_gradients(dout, input, weight, bias, mean, rstd, dinput, cols)
    dy, *dy_strides = matrix(dout, cols)
    x, *x_strides = matrix(input, cols)
    constants = BACKWARD.of(input, block_cols)
    count = programs(input, cdiv(rows, constants["BLOCK_ROWS"]), constants["num_warps"])
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
        *dy_strides,
        *x_strides,
        rows,
        cols,
        HAS_BIAS=bias is not None,
        BLOCK_COLS=block_cols,
        **constants,
    )
    sum_partials(partials, *gradients)
    return dinput, *gradients


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
