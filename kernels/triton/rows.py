"""What the kernels that work row by row share: matrices of any layout, grids, and sums over rows in a fixed order."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv, processors
from .launch import launch
from .precision import INTERPRETED, stored

# A row up to this wide stays in registers; a wider one is read again in each pass over it.
WIDEST_FORWARD = 16384
WIDEST_BACKWARD = 8192
# Columns at a time where a row is wider than that.
STREAMED = 4096


def matrix(x: Tensor, cols: int) -> tuple[Tensor, int, int]:
    """``x`` as rows of ``cols`` elements: something that begins there, its row stride and its column stride.

    Where the leading dimensions do not collapse to one stride, a copy.
    """
    if x.is_contiguous():
        return x, cols, 1
    x = x.reshape(-1, cols)
    return x, x.stride(0), x.stride(1)


def vector(parameter: Tensor | None) -> Tensor | None:
    """A parameter whose elements lie side by side."""
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


@functools.cache
def block_of(cols: int, widest: int) -> tuple[int, bool]:
    """``(BLOCK_COLS, WHOLE)``: the columns that a program has at a time, and whether they are the row."""
    if cols > widest:
        return STREAMED, False
    return max(triton.next_power_of_2(cols), 4), True


def programs(like: Tensor, blocks: int, num_warps: int) -> int:
    """How many programs share ``blocks`` of rows where each leaves a partial sum behind.

    Some warps per processor hide the latency of memory; each program more is a partial sum to write and to read, so
    with few rows there are fewer.
    """
    least = 2 if INTERPRETED else processors(like.device)
    return max(1, min(blocks, max(least, min(least * max(1, 16 // num_warps), blocks // 4))))


@triton.jit(do_not_specialize=["count"])
def _sum_partials_kernel(
    partial_ptr,  # (sums, count, cols), float32
    first_ptr,  # (cols,), each of the three, or None
    second_ptr,
    third_ptr,
    count,
    cols,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program ``(j, i)`` adds up columns ``j * BLOCK_COLS`` and on of the ``i``-th sum."""
    which = tl.program_id(1)
    col_offs = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    part_offs = tl.arange(0, BLOCK_COUNT)
    base = partial_ptr + which.to(tl.int64) * count * cols
    total = tl.zeros((BLOCK_COUNT, BLOCK_COLS), tl.float32)
    for start in range(0, count, BLOCK_COUNT):
        parts = start + part_offs
        mask = (parts < count)[:, None] & col_mask[None, :]
        total += tl.load(base + parts.to(tl.int64)[:, None] * cols + col_offs[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    if which == 0:
        stored(first_ptr + col_offs, total, col_mask)
    if second_ptr is not None:
        if which == 1:
            stored(second_ptr + col_offs, total, col_mask)
    if third_ptr is not None:
        if which == 2:
            stored(third_ptr + col_offs, total, col_mask)


def sum_partials(partials: Tensor | None, *gradients: Tensor) -> None:
    """Adds up ``partials`` (sums, count, cols) over ``count``, each sum into a gradient: one that is not empty."""
    if partials is None:
        return
    sums, count, cols = partials.shape
    first, second, third = (*(g for g in gradients if g.numel()), None, None)[:3]
    # Grid: blocks of columns × sums.
    grid = (cdiv(cols, 32), sums)
    launch(
        _sum_partials_kernel,
        grid,
        partials,
        first,
        second,
        third,
        count,
        cols,
        BLOCK_COUNT=32,
        BLOCK_COLS=32,
        num_warps=4,
    )


def parameter_gradients(
    like: Tensor, count: int, cols: int, *parameters: Tensor | None
) -> tuple[Tensor | None, list[Tensor]]:
    """Room for ``count`` partial sums of each parameter that is there, and the gradients, empty where there is none."""
    outs = [like.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters]
    sums = sum(p is not None for p in parameters)
    partials = like.new_empty((sums, count, cols), dtype=torch.float32) if sums else None
    return partials, outs
