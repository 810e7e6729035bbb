"""Attention backward, the kernel that owns queries (Dao et al. 2022, arXiv 2205.14135).

For sequences whose keys do not fit into one tile. A program makes the gradients of a block of queries of one head and,
if it is asked for, those of their scores; and leaves behind what the kernel that owns keys needs of each query.
"""

import triton
import triton.language as tl

from ._attention_tiles import (
    EXACT_BLOCK,
    FLOAT_MASK,
    LOG2E,
    NO_MASK,
    add_allowed,
    any_not_finite,
    key_range,
    masked_scores,
    rows_at,
    store_rows,
    tokens_of,
    visible_keys,
    zero_rows,
)
from .philox import dropped, keep_attention
from .precision import narrowed, product, stored


@triton.jit
def _add_keys(
    dq,  # (BLOCK_M, BLOCK_D) sums so far
    start,  # of the keys
    end,  # behind the keys that any query may attend
    MASKED: tl.constexpr,  # some query may not attend some key
    EXACT: tl.constexpr,  # keys that are not finite are kept from the queries that may not attend them
    BLOCK_N: tl.constexpr,
    # What follows is the same for all tiles of a program.
    q,  # (BLOCK_M, BLOCK_D)
    do,  # (BLOCK_M, BLOCK_DV)
    lse,  # (BLOCK_M)
    delta,  # (BLOCK_M)
    queries,  # (BLOCK_M) counted within the sequence
    q_len,
    unit,
    k_in,  # pointer to (k_len, HEAD_DIM) of this sequence and head, stride of its rows
    v_in,  # pointer to (k_len, VALUE_DIM), stride of its rows
    mask_in,  # pointer to the mask of this sequence and head, or None, and its strides
    drop_in,  # rng or None, threshold, scale, and the head counted through the batch
    dscores_in,  # pointer to (q_len, k_len), or None, stride of its rows
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
    """``dq`` with one more tile of keys."""
    k_ptr, k_row_stride = k_in
    v_ptr, v_row_stride = v_in
    mask_ptr, _, mask_k_stride = mask_in
    dscores_ptr, dscores_row_stride = dscores_in
    keys = start + tl.arange(0, BLOCK_N)
    visible = keys < end
    if MASKED:
        visible = visible_keys(mask_ptr, mask_k_stride, keys, end, MASK, PER_QUERY)
    k = rows_at(k_ptr, start, k_row_stride, visible, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    x = product(q, tl.trans(k), None)  # (BLOCK_M, BLOCK_N)
    if NEGATIVE:
        x = -x
    allowed = visible[None, :]
    there = (queries < q_len)[:, None]
    if MASKED:
        x, allowed = masked_scores(
            x, queries[:, None], keys[None, :], there, allowed, mask_in, unit, CAUSAL, MASK, PER_QUERY
        )
    if MASK != FLOAT_MASK:
        x = x * unit
    p = tl.exp2((x - lse[:, None]) * LOG2E)
    v = rows_at(v_ptr, start, v_row_stride, visible, VALUE_DIM, BLOCK_DV, BLOCK_N, MASKED)
    dp = product(do, tl.trans(v), None)  # (BLOCK_M, BLOCK_N)
    if DROPS:
        rng_ptr, threshold, dropout_scale, head = drop_in
        keep = keep_attention(rng_ptr, threshold, dropout_scale, queries, head, start, BLOCK_N)
        dp = dropped(dp, keep, dropout_scale)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)
    if dscores_ptr is not None:
        at = dscores_ptr + queries.to(tl.int64)[:, None] * dscores_row_stride + keys[None, :]
        stored(at, ds, there & visible[None, :])
    if EXACT:
        return add_allowed(dq, ds, allowed, k_ptr, start, k_row_stride, visible, HEAD_DIM, BLOCK_D, BLOCK_N)
    else:
        return product(narrowed(ds, k.dtype), k, dq)


@triton.jit
def _own_queries(
    plain,  # behind the keys that every query of the block may attend
    end,
    inputs,
    form,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if EXACT:
        for start in range(0, end, EXACT_BLOCK):
            dq = _add_keys(dq, start, end, True, True, EXACT_BLOCK, *inputs, *form)
    else:
        # First the whole blocks that need no look at masks, then the others.
        split = plain // BLOCK_N * BLOCK_N
        for start in range(0, split, BLOCK_N):
            dq = _add_keys(dq, start, end, False, False, BLOCK_N, *inputs, *form)
        for start in range(split, end, BLOCK_N):
            dq = _add_keys(dq, start, end, True, False, BLOCK_N, *inputs, *form)
    return dq


@triton.jit(do_not_specialize=["sequences", "q_blocks", "q_len", "k_len", "lse_stride", "threshold"])
def _attention_bwd_queries_kernel(
    q_ptr,  # (B, H, L, HEAD_DIM); of sequences laid end to end (1, H, tokens, HEAD_DIM), and so with those below
    k_ptr,  # (B, H_k, S, HEAD_DIM)
    v_ptr,  # (B, H_k, S, VALUE_DIM)
    mask_ptr,  # broadcasts to (B, H, L, S), or None
    rng_ptr,  # (2)
    cu_q_ptr,  # (B + 1)
    cu_k_ptr,  # (B + 1)
    do_ptr,  # (B, H, L, VALUE_DIM)
    out_ptr,  # (B, H, L, VALUE_DIM)
    lse_ptr,  # (B, H, L) contiguous
    delta_ptr,  # (B, H, L) contiguous; written, for the kernel that owns keys
    dq_ptr,  # (B, H, L, HEAD_DIM)
    dscores_ptr,  # (B, H, L, S) contiguous, or None; written where a query may attend a key
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    do_batch_stride,
    do_head_stride,
    do_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    dq_batch_stride,
    dq_head_stride,
    dq_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_q_stride,
    mask_k_stride,
    sequences,  # B
    heads,  # H
    group,  # query heads that share a key head
    q_blocks,  # of the longest sequence
    q_len,  # L; of sequences laid end to end all tokens
    k_len,  # S
    lse_stride,  # of a head: L, or all tokens
    unit,  # the scale without its sign
    scale,
    threshold,
    dropout_scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VARLEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    PER_QUERY: tl.constexpr,
    DROPS: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Programs: blocks of queries, fastest, of heads of sequences."""
    program = tl.program_id(0)
    block = program % q_blocks
    head = program // q_blocks % heads
    sequence = program // q_blocks // heads
    if CAUSAL:
        block = q_blocks - 1 - block  # what takes longest starts first
    head_of_all = sequence * heads + head
    batch = sequence.to(tl.int64)
    key_head = (head // group).to(tl.int64)
    dq_ptr += head.to(tl.int64) * dq_head_stride
    if VARLEN:
        if sequence == sequences:  # tokens behind the last sequence
            first = tl.load(cu_q_ptr + sequences) + block * BLOCK_M
            zero_rows(dq_ptr, first, q_blocks * BLOCK_M, q_len, dq_row_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
            return
        first_q, q_len = tokens_of(cu_q_ptr, sequence)
        first_k, k_len = tokens_of(cu_k_ptr, sequence)
        q_ptr += first_q * q_row_stride
        k_ptr += first_k * k_row_stride
        v_ptr += first_k * v_row_stride
        do_ptr += first_q * do_row_stride
        out_ptr += first_q * out_row_stride
        dq_ptr += first_q * dq_row_stride
        lse_row = first_q
    else:
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        do_ptr += batch * do_batch_stride
        out_ptr += batch * out_batch_stride
        dq_ptr += batch * dq_batch_stride
        lse_row = batch * heads * lse_stride
    first = block * BLOCK_M
    if first >= q_len:
        return
    q_ptr += head.to(tl.int64) * q_head_stride
    k_ptr += key_head * k_head_stride
    v_ptr += key_head * v_head_stride
    do_ptr += head.to(tl.int64) * do_head_stride
    out_ptr += head.to(tl.int64) * out_head_stride
    lse_row += head.to(tl.int64) * lse_stride
    if MASK != NO_MASK:
        mask_ptr += batch * mask_batch_stride + head.to(tl.int64) * mask_head_stride
    if dscores_ptr is not None:
        dscores_ptr += head_of_all.to(tl.int64) * q_len * k_len

    queries = first + tl.arange(0, BLOCK_M)
    there = queries < q_len
    q = rows_at(q_ptr, first, q_row_stride, there, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    do = rows_at(do_ptr, first, do_row_stride, there, VALUE_DIM, BLOCK_DV, BLOCK_M, True)
    out = rows_at(out_ptr, first, out_row_stride, there, VALUE_DIM, BLOCK_DV, BLOCK_M, True)
    lse = tl.load(lse_ptr + lse_row + queries, mask=there, other=0.0)
    # What the gradients of a row's scores have in common (Dao et al. 2022, section 3.1 and appendix B).
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + lse_row + queries, delta, mask=there)
    end, plain = key_range(mask_ptr, mask_k_stride, k_len, MASK, PER_QUERY)
    if CAUSAL:
        end = tl.minimum(end, first + BLOCK_M)
        plain = tl.minimum(plain, first + 1)
    inputs = (
        q,
        do,
        lse,
        delta,
        queries,
        q_len,
        unit,
        (k_ptr, k_row_stride),
        (v_ptr, v_row_stride),
        (mask_ptr, mask_q_stride, mask_k_stride),
        (rng_ptr, threshold, dropout_scale, head_of_all),
        (dscores_ptr, k_len),
    )
    dq = _own_queries(
        plain,
        end,
        inputs,
        (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CAUSAL, MASK, PER_QUERY, DROPS, NEGATIVE),
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    if CAUSAL or PER_QUERY:
        if any_not_finite(dq):
            dq = _own_queries(
                plain,
                end,
                inputs,
                (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CAUSAL, MASK, PER_QUERY, DROPS, NEGATIVE),
                True,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
    store_rows(dq_ptr, first, dq_row_stride, there, dq * scale, HEAD_DIM, BLOCK_D, BLOCK_M)
