"""The gradient of an embedding table: the sum, for each entry, of the gradients of the tokens that looked it up.

Deterministic, without atomics and without a look at the ids by the host. The ids are sorted (stably, on the device), so
that the tokens of one entry are a run. A first kernel adds up chunks of sorted tokens: a run that lies within a chunk
goes straight into the table; what a run has in other chunks is left at their edges. A second one adds up the edges of
such runs in order. An entry that every token uses is thus shared by many programs, and so is the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .launch import launch
from .precision import stored

CHUNK = 16
COLS = 256


@triton.jit
def written_cols(entry, entries, skipped, cols):
    """How much of its row an entry gets: nothing if it is skipped, or not in the table at all."""
    return tl.where((entry >= 0) & (entry < entries) & (entry != skipped), cols, 0)


@triton.jit(do_not_specialize=["tokens", "entries", "skipped"])
def _table_bwd_chunks_kernel(
    dx_ptr,  # (tokens, cols), float32
    ids_ptr,  # (tokens,), sorted
    order_ptr,  # (tokens,): which token each of them is of
    table_ptr,  # (entries, cols)
    edge_ptr,  # (2, chunks, cols), float32: of a run that began before the chunk, and of one that goes on behind it
    tokens,
    entries,
    skipped,
    cols,
    CHUNK: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program ``(i, j)`` adds up the runs in chunk ``i`` of sorted tokens, in the columns of block ``j``."""
    chunk = tl.program_id(0).to(tl.int64)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, tokens)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(ids_ptr + last, mask=last < tokens, other=-1)
    began_before = before == tl.load(ids_ptr + first)  # of the run at hand
    total = tl.zeros((BLOCK_COLS,), tl.float32)
    for i in range(first, last):
        entry = tl.load(ids_ptr + i)
        row = tl.load(order_ptr + i).to(tl.int64)
        total += tl.load(dx_ptr + row * cols + col_offs, mask=col_mask, other=0.0)
        following = tl.load(ids_ptr + i + 1, mask=i + 1 < last, other=-1)
        if following != entry:
            goes_on = (i + 1 == last) & (after == entry)
            if began_before:
                tl.store(edge_ptr + chunk * cols + col_offs, total, mask=col_mask)
            elif goes_on:
                row_of_edge = tl.num_programs(0) + chunk
                tl.store(edge_ptr + row_of_edge * cols + col_offs, total, mask=col_mask)
            else:
                written = col_offs < written_cols(entry, entries, skipped, cols)
                stored(table_ptr + entry.to(tl.int64) * cols + col_offs, total, written)
            total = tl.zeros((BLOCK_COLS,), tl.float32)
            began_before = before != before


@triton.jit(do_not_specialize=["tokens", "entries", "skipped"])
def _table_bwd_edges_kernel(
    ids_ptr,  # (tokens,), sorted
    edge_ptr,  # (2, chunks, cols), float32
    table_ptr,  # (entries, cols)
    tokens,
    entries,
    skipped,
    cols,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Program ``(i, j)`` adds up the run that begins in chunk ``i`` and goes on behind it, if there is one."""
    chunk = tl.program_id(0).to(tl.int64)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < cols
    first = chunk * CHUNK
    last = first + CHUNK
    entry = tl.load(ids_ptr + tl.minimum(last, tokens) - 1)
    goes_on = tl.load(ids_ptr + last, mask=last < tokens, other=-1) == entry
    # A run that is older than the chunk fills it, and belongs to an earlier program.
    older = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1) == entry
    if goes_on & (last < tokens) & ((first == 0) | (older == 0)):
        row_of_edge = tl.num_programs(0) + chunk
        total = tl.load(edge_ptr + row_of_edge * cols + col_offs, mask=col_mask, other=0.0)
        at = chunk + 1
        while goes_on:
            chunks = at + tl.arange(0, BLOCK_CHUNKS)
            # Sorted, so these are the first of the block, or all.
            begins = tl.load(ids_ptr + chunks * CHUNK, mask=chunks * CHUNK < tokens, other=-1)
            belongs = (chunks * CHUNK < tokens) & (begins == entry)
            offs = chunks[:, None] * cols + col_offs[None, :]
            mask = belongs[:, None] & col_mask[None, :]
            total += tl.sum(tl.load(edge_ptr + offs, mask=mask, other=0.0), 0)
            goes_on = tl.sum(belongs.to(tl.int32), 0) == BLOCK_CHUNKS
            at += BLOCK_CHUNKS
        written = col_offs < written_cols(entry, entries, skipped, cols)
        stored(table_ptr + entry.to(tl.int64) * cols + col_offs, total, written)


def table_gradient(dx: Tensor, ids: Tensor, table: Tensor, skipped: int = -1) -> Tensor:
    """The gradient of ``table`` (entries, cols) from ``dx`` (tokens, cols), float32, and the tokens' ids (any shape).

    The row ``skipped`` stays zero.
    """
    gradient = table.new_zeros(table.shape)
    entries, cols = table.shape
    ids, order = torch.sort(ids.reshape(-1), stable=True)
    tokens = ids.numel()
    chunks = cdiv(tokens, CHUNK)
    edges = dx.new_empty((2, chunks, cols))
    block_cols = min(triton.next_power_of_2(cols), COLS)
    # Grid, of both: chunks of tokens × blocks of columns.
    grid = (chunks, cdiv(cols, block_cols))
    launch(
        _table_bwd_chunks_kernel,
        grid,
        dx,
        ids,
        order,
        gradient,
        edges,
        tokens,
        entries,
        skipped,
        cols,
        CHUNK=CHUNK,
        BLOCK_COLS=block_cols,
        num_warps=2,
    )
    launch(
        _table_bwd_edges_kernel,
        grid,
        ids,
        edges,
        gradient,
        tokens,
        entries,
        skipped,
        cols,
        CHUNK=CHUNK,
        BLOCK_CHUNKS=16,
        BLOCK_COLS=block_cols,
        num_warps=4,
    )
    return gradient
