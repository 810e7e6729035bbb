"""What the attention kernels share: where a sequence lies, which keys count, and the scores of a tile.

A tile has queries along one axis and keys along the other. Which is which is told by ``q_at`` and ``k_at``, positions
within the sequence of shapes ``(M, 1)`` and ``(1, N)``, or ``(1, M)`` and ``(N, 1)``.
"""

import triton
import triton.language as tl

from .precision import INTERPRET, loaded, stored

# Kinds of masks.
NO_MASK: tl.constexpr = tl.constexpr(0)
BOOL_MASK: tl.constexpr = tl.constexpr(1)
FLOAT_MASK: tl.constexpr = tl.constexpr(2)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Of the tiles where a product was spoiled by what is not finite, and is made anew: small, for it is rare.
EXACT_BLOCK: tl.constexpr = tl.constexpr(16)
SCAN: tl.constexpr = tl.constexpr(1024)  # keys that are looked at together for the end of a padded sequence


@triton.jit
def tokens_of(cu_ptr, sequence):
    """``(first, length)``: the tokens of one of the sequences that are laid end to end."""
    first = tl.load(cu_ptr + sequence)
    return first.to(tl.int64), tl.load(cu_ptr + sequence + 1) - first


@triton.jit
def rows_at(
    ptr,  # to the first row of (length, DIM)
    first,
    row_stride,
    there,  # (COUNT) bool: which rows to read; others are zero
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COUNT: tl.constexpr,
    CHECKED: tl.constexpr,  # without it all rows are read
):
    """The rows ``first`` to ``first + COUNT - 1``: ``(COUNT, BLOCK_DIM)``."""
    dims = tl.arange(0, BLOCK_DIM)
    # Offsets within the tile are the same in every round of a loop; what moves is one number.
    offs = tl.arange(0, COUNT).to(tl.int64)[:, None] * row_stride + dims[None, :]
    at = ptr + tl.cast(first, tl.int64) * row_stride + offs
    if CHECKED:
        return tl.load(at, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM == BLOCK_DIM:
        return tl.load(at)
    else:
        return tl.load(at, mask=(dims < DIM)[None, :] & there[:, None], other=0.0)


@triton.jit
def store_rows(
    ptr,  # to the first row of (length, DIM)
    first,
    row_stride,
    there,  # (COUNT) bool: which rows to write
    rows,  # (COUNT, BLOCK_DIM)
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COUNT: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_DIM)
    at = ptr + (first + tl.arange(0, COUNT)).to(tl.int64)[:, None] * row_stride + dims[None, :]
    stored(at, rows, there[:, None] & (dims < DIM)[None, :])


@triton.jit
def zero_rows(
    ptr,  # to the first row of (length, DIM)
    first,
    step,
    end,
    row_stride,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Zeros in ``COUNT`` rows from ``first`` on, and again after every ``step`` rows, up to ``end``."""
    zeros = tl.zeros([COUNT, BLOCK_DIM], tl.float32)
    for start in range(first, end, step):
        there = start + tl.arange(0, COUNT) < end
        store_rows(ptr, start, row_stride, there, zeros, DIM, BLOCK_DIM, COUNT)


@triton.jit
def visible_keys(mask_ptr, mask_k_stride, keys, end, MASK: tl.constexpr, PER_QUERY: tl.constexpr):
    """Which of ``keys`` any query may attend, as far as one look per key tells: bool, of the shape of ``keys``."""
    visible = keys < end
    if MASK != NO_MASK and not PER_QUERY:
        value = tl.load(mask_ptr + keys.to(tl.int64) * mask_k_stride, mask=visible, other=0)
        if MASK == BOOL_MASK:
            visible = visible & (value != 0)
        else:
            visible = visible & (value.to(tl.float32) != float("-inf"))
    return visible


@triton.jit
def key_range(mask_ptr, mask_k_stride, k_len, MASK: tl.constexpr, PER_QUERY: tl.constexpr):
    """``(end, plain)``: no query may attend a key from ``end`` on, and all may attend those before ``plain``.

    Padding given as a mask becomes a length here, by one look at the mask on the device. Of a mask that differs from
    query to query or adds to the scores nothing is plain.
    """
    end = k_len
    plain = k_len
    if MASK != NO_MASK:
        plain = k_len * 0
        if not PER_QUERY:
            end = k_len * 0
            hidden = k_len
            for first in range(0, k_len, SCAN):
                keys = first + tl.arange(0, SCAN)
                visible = visible_keys(mask_ptr, mask_k_stride, keys, k_len, MASK, PER_QUERY)
                end = tl.maximum(end, tl.max(tl.where(visible, keys + 1, 0), 0))
                hidden = tl.minimum(hidden, tl.min(tl.where(visible, k_len, keys), 0))
            if MASK == BOOL_MASK:
                plain = hidden
    return end, plain


@triton.jit
def masked_scores(
    x,  # the products of queries and keys
    q_at,
    k_at,
    q_inside,  # of the shape of q_at: the queries that are there
    k_visible,  # of the shape of k_at: what visible_keys says
    mask_in,  # pointer to the mask of this sequence and head, or None, and its strides
    unit,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    PER_QUERY: tl.constexpr,
):
    """``(scores, allowed)``: minus infinity where a query may not attend.

    Under a mask of floats the scores are scaled by ``unit`` and hold it; else they are the products as they were.
    """
    mask_ptr, mask_q_stride, mask_k_stride = mask_in
    allowed = q_inside & k_visible
    if CAUSAL:
        allowed = allowed & (q_at >= k_at)
    if MASK == BOOL_MASK and PER_QUERY:
        at = q_at.to(tl.int64) * mask_q_stride + k_at.to(tl.int64) * mask_k_stride
        allowed = allowed & (tl.load(mask_ptr + at, mask=allowed, other=0) != 0)
    if MASK == FLOAT_MASK:
        if PER_QUERY:
            at = q_at.to(tl.int64) * mask_q_stride + k_at.to(tl.int64) * mask_k_stride
            bias = tl.load(mask_ptr + at, mask=allowed, other=0.0).to(tl.float32)
        else:
            bias = tl.load(mask_ptr + k_at.to(tl.int64) * mask_k_stride, mask=k_visible, other=0.0).to(
                tl.float32
            )
        allowed = allowed & (bias != float("-inf"))
        x = x * unit + bias
    return tl.where(allowed, x, float("-inf")), allowed


@triton.jit
def powers(x, shift, factor):
    """``2 ** ((x - shift) * factor)``."""
    if INTERPRET:  # a fused operation is rounded twice there, and what is lost is as large as x
        return tl.exp2((x - shift) * factor)
    else:
        return tl.exp2(tl.fma(x, factor, -(shift * factor)))


@triton.jit
def any_not_finite(x):
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1), 0) > 0


@triton.jit
def add_allowed(
    acc,  # (M, BLOCK_DIM)
    weights,  # (M, COUNT)
    allowed,  # (M, COUNT)
    ptr,  # to the first row of (length, DIM)
    first,
    row_stride,
    there,  # (COUNT) bool
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COUNT: tl.constexpr,
):
    """``acc + weights @ rows`` in which a row that may not be seen adds nothing, be it NaN.

    A product would multiply it by zero, which is NaN. Row by row, and so slow: for what a product has spoiled.
    """
    dims = tl.arange(0, BLOCK_DIM)
    ptr += tl.cast(first, tl.int64) * row_stride
    count = tl.max(tl.where(there, tl.arange(0, COUNT) + 1, 0), 0)
    for j in range(COUNT):
        here = tl.arange(0, COUNT) == j
        weight = tl.sum(tl.where(here[None, :], weights, 0.0), 1)
        sees = tl.max(tl.where((here & there)[None, :] & allowed, 1, 0), 1) > 0
        row = loaded(ptr + dims, dims < tl.where(j < count, DIM, 0))
        acc += tl.where(sees[:, None], weight[:, None] * row[None, :], 0.0)
        ptr += row_stride
    return acc
