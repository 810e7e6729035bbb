"""``gelu(input + bias)`` and its gradients; that of the bias is added up in a fixed order, in two steps."""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Configs, cdiv, size_class
from .gelu import gelu, gelu_derivative
from .launch import launch
from .precision import loaded, stored
from .rows import matrix, parameter_gradients, programs, sum_partials, vector
from .sizes import Sizes


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (rows, cols)
    bias_ptr,  # (cols,)
    out_ptr,  # (rows, cols), contiguous
    x_row_stride,
    x_col_stride,
    rows,
    cols,
    TANH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program ``(i, j)`` takes row block ``i`` and column block ``j``."""
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    mask = (row_offs < rows)[:, None] & col_mask[None, :]
    x = loaded(
        x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :].to(tl.int64) * x_col_stride, mask
    )
    x += loaded(bias_ptr + col_offs, col_mask)[None, :]
    stored(out_ptr + row_offs[:, None] * cols + col_offs[None, :], gelu(x, TANH), mask)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_bwd_kernel(
    dout_ptr,  # (rows, cols)
    x_ptr,  # (rows, cols)
    bias_ptr,  # (cols,)
    dx_ptr,  # (rows, cols), contiguous
    partial_ptr,  # (programs, cols), float32
    dout_row_stride,
    dout_col_stride,
    x_row_stride,
    x_col_stride,
    rows,
    cols,
    TANH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program ``(i, j)`` takes every ``num_programs(0)``-th row block from ``i`` on, in column block ``j``."""
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    wide_offs = col_offs[None, :].to(tl.int64)
    bias = loaded(bias_ptr + col_offs, col_mask)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row_offs = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row_offs < rows)[:, None] & col_mask[None, :]
        dout = loaded(dout_ptr + row_offs[:, None] * dout_row_stride + wide_offs * dout_col_stride, mask)
        x = loaded(x_ptr + row_offs[:, None] * x_row_stride + wide_offs * x_col_stride, mask)
        dx = dout * gelu_derivative(x + bias[None, :], TANH)
        stored(dx_ptr + row_offs[:, None] * cols + col_offs[None, :], dx, mask)
        dbias += tl.where(mask, dx, 0.0)
    row = tl.program_id(0).to(tl.int64)
    tl.store(partial_ptr + row * cols + col_offs, tl.sum(dbias, 0), mask=col_mask)


# --- Configurations ---------------------------------------------------------------------------------------------

_FORWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 8, "BLOCK_COLS": 256, "num_warps": 4}),
    ((None,), {"BLOCK_ROWS": 2, "BLOCK_COLS": 1024, "num_warps": 4}),
]
_BACKWARD_ROWS = [
    ((256,), {"BLOCK_ROWS": 8, "BLOCK_COLS": 256, "num_warps": 4}),
    ((None,), {"BLOCK_ROWS": 4, "BLOCK_COLS": 512, "num_warps": 4}),
]


def _configs(name: str, rows: list, kernel: Callable) -> Configs:
    return Configs(
        name,
        by=("cols",),
        table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), rows),
        wider={"BLOCK_ROWS": (1, 2, 4, 8), "BLOCK_COLS": (128, 256, 512, 1024), "num_warps": (2, 4, 8)},
        kernels=lambda: [kernel],
        fits=lambda c, sizes: 2 <= c["BLOCK_ROWS"] * c["BLOCK_COLS"] // (32 * c["num_warps"]) <= 32,
    )


FORWARD = _configs("bias_gelu_fwd", _FORWARD_ROWS, _bias_gelu_fwd_kernel)
BACKWARD = _configs("bias_gelu_bwd", _BACKWARD_ROWS, _bias_gelu_bwd_kernel)


# --- The ops ----------------------------------------------------------------------------------------------------


def bias_gelu_fwd(input: Tensor, bias: Tensor, approximate: str) -> Tensor:
    out = input.new_empty(input.shape)
    if input.numel() == 0:
        return out
    rows, cols = math.prod(input.shape[:-1]), input.shape[-1]
    x, x_row_stride, x_col_stride = matrix(input, cols)
    constants = FORWARD.of(input, size_class(cols))
    # Grid: blocks of rows × blocks of columns.
    launch(
        _bias_gelu_fwd_kernel,
        (cdiv(rows, constants["BLOCK_ROWS"]), cdiv(cols, constants["BLOCK_COLS"])),
        x,
        vector(bias),
        out,
        x_row_stride,
        x_col_stride,
        rows,
        cols,
        TANH=approximate == "tanh",
        **constants,
    )
    return out


def bias_gelu_bwd(dout: Tensor, input: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    dinput = input.new_empty(input.shape)
    rows, cols = math.prod(input.shape[:-1]), input.shape[-1]
    if input.numel() == 0:
        return dinput, bias.new_zeros(bias.shape)
    dy, dy_row_stride, dy_col_stride = matrix(dout, cols)
    x, x_row_stride, x_col_stride = matrix(input, cols)
    constants = BACKWARD.of(input, size_class(cols))
    col_blocks = cdiv(cols, constants["BLOCK_COLS"])
    row_blocks = cdiv(rows, constants["BLOCK_ROWS"])
    count = cdiv(programs(input, row_blocks * col_blocks, constants["num_warps"]), col_blocks)
    partials, (dbias,) = parameter_gradients(dout, count, cols, bias)
    # Grid: programs that share the row blocks × blocks of columns.
    launch(
        _bias_gelu_bwd_kernel,
        (count, col_blocks),
        dy,
        x,
        vector(bias),
        dinput,
        partials,
        dy_row_stride,
        dy_col_stride,
        x_row_stride,
        x_col_stride,
        rows,
        cols,
        TANH=approximate == "tanh",
        **constants,
    )
    sum_partials(partials, dbias)
    return dinput, dbias


# --- What to compile ahead of time, and to tune -----------------------------------------------------------------


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable]]:
    x, dout = (empty(sizes.tokens, sizes.intermediate, dtype=sizes.dtype) for _ in range(2))
    bias = empty(sizes.intermediate, dtype=sizes.dtype)
    for approximate in ("none", "tanh"):
        yield FORWARD, lambda approximate=approximate: bias_gelu_fwd(x, bias, approximate)
        yield BACKWARD, lambda approximate=approximate: bias_gelu_bwd(dout, x, bias, approximate)


AHEAD = [Sizes(intermediate=256), Sizes(), Sizes(dtype=torch.float32)]
