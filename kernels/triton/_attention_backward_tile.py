"""Attention backward, one tile of the kernel that owns keys: their gradients from one block of queries.

The tile has keys along the first axis: so what is multiplied with queries and incoming gradients stays in registers.
"""

import triton
import triton.language as tl

from ._attention_tiles import FLOAT_MASK, LOG2E, add_allowed, masked_scores, rows_at
from .philox import dropped, keep_attention
from .precision import narrowed, product


@triton.jit
def add_queries(
    dk,  # (BLOCK_N, BLOCK_D) sums so far
    dv,  # (BLOCK_N, BLOCK_DV)
    first,  # of the queries
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_DV)
    keys,  # (BLOCK_N) counted within the sequence
    visible,  # (BLOCK_N)
    WHOLE: tl.constexpr,  # all keys of the sequence are in the tile
    MASKED: tl.constexpr,  # some query may not attend some key
    EXACT: tl.constexpr,  # queries and gradients that are not finite are kept from keys that they may not attend
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    # What follows is the same for all tiles of a head.
    q_in,  # pointer to (q_len, HEAD_DIM) of this sequence and head, stride of its rows
    do_in,  # pointer to (q_len, VALUE_DIM), stride of its rows
    lse_ptr,  # (q_len)
    delta_ptr,  # (q_len), None with WHOLE
    q_len,
    first_key,  # of the tile
    unit,
    mask_in,  # pointer to the mask of this sequence and head, or None, and its strides
    drop_in,  # rng or None, threshold, scale, and the head counted through the batch
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    PER_QUERY: tl.constexpr,
    DROPS: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """``(dk, dv, ds, allowed)`` with one more block of queries, and the gradients of its scores (BLOCK_N, BLOCK_M)."""
    q_ptr, q_row_stride = q_in
    do_ptr, do_row_stride = do_in
    queries = first + tl.arange(0, BLOCK_M)
    there = queries < q_len
    q = rows_at(q_ptr, first, q_row_stride, there, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    lse = tl.load(lse_ptr + queries, mask=there, other=0.0)
    x = product(k, tl.trans(q), None)  # (BLOCK_N, BLOCK_M)
    if NEGATIVE:
        x = -x
    allowed = visible[:, None] & there[None, :]
    if MASKED:
        x, allowed = masked_scores(
            x,
            queries[None, :],
            keys[:, None],
            there[None, :],
            visible[:, None],
            mask_in,
            unit,
            CAUSAL,
            MASK,
            PER_QUERY,
        )
    if MASK != FLOAT_MASK:
        x = x * unit
    p = tl.exp2((x - lse[None, :]) * LOG2E)
    do = rows_at(do_ptr, first, do_row_stride, there, VALUE_DIM, BLOCK_DV, BLOCK_M, True)
    dp = product(v, tl.trans(do), None)  # (BLOCK_N, BLOCK_M)
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    p_kept = p
    if DROPS:
        rng_ptr, threshold, dropout_scale, head = drop_in
        keep = tl.trans(keep_attention(rng_ptr, threshold, dropout_scale, queries, head, first_key, BLOCK_N))
        dp = dropped(dp, keep, dropout_scale)
        p_kept = dropped(p, keep, dropout_scale)
    if WHOLE:
        # The weights of the whole row: they add up to one even where lse, the logarithm of their sum, has lost digits
        # (all of them, where a mask has added -3e38).
        total = tl.sum(p, 0)
        over_total = 1.0 / tl.where(total == 0.0, 1.0, total)
        delta = tl.sum(tl.where(allowed, p * dp, 0.0), 0) * over_total
        p_kept = p_kept * over_total[None, :]
        ds = p * over_total[None, :] * (dp - delta[None, :])
    else:
        delta = tl.load(delta_ptr + queries, mask=there, other=0.0)
        ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)
    if EXACT:
        dv = add_allowed(
            dv, p_kept, allowed, do_ptr, first, do_row_stride, there, VALUE_DIM, BLOCK_DV, BLOCK_M
        )
        dk = add_allowed(dk, ds, allowed, q_ptr, first, q_row_stride, there, HEAD_DIM, BLOCK_D, BLOCK_M)
    else:
        dv = product(narrowed(p_kept, do.dtype), do, dv)
        dk = product(narrowed(ds, q.dtype), q, dk)
    return dk, dv, ds, allowed
