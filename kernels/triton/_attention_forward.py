"""Attention forward (Dao et al. 2022, arXiv 2205.14135; 2023, arXiv 2307.08691), for batches and for sequences laid
end to end.

A program takes a block of queries of one head. Where all keys of a sequence fit into one tile it goes over them once;
else block by block, with a softmax that is corrected as larger scores come (Milakov & Gimelshein 2018,
arXiv 1805.02867).
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
    powers,
    rows_at,
    store_rows,
    tokens_of,
    visible_keys,
    zero_rows,
)
from .philox import dropped, keep_attention
from .precision import narrowed, product


@triton.jit
def _take_keys(
    acc,  # (BLOCK_M, BLOCK_DV) weighted sum of values so far
    m_i,  # (BLOCK_M) largest score so far
    l_i,  # (BLOCK_M) sum of exponentials so far
    start,  # of the keys
    end,  # behind the keys that any query may attend
    FIRST: tl.constexpr,  # nothing was taken before
    MASKED: tl.constexpr,  # some query may not attend some key
    EXACT: tl.constexpr,  # values that are not finite are kept from the queries that may not see them
    BLOCK_N: tl.constexpr,
    # What follows is the same for all tiles of a program.
    q,  # (BLOCK_M, BLOCK_D)
    queries,  # (BLOCK_M) counted within the sequence
    q_len,
    unit,
    k_in,  # pointer to (k_len, HEAD_DIM) of this sequence and head, stride of its rows
    v_in,  # pointer to (k_len, VALUE_DIM), stride of its rows
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
    """``(acc, m_i, l_i)`` with one more tile of keys."""
    k_ptr, k_row_stride = k_in
    v_ptr, v_row_stride = v_in
    mask_ptr, _, mask_k_stride = mask_in
    keys = start + tl.arange(0, BLOCK_N)
    visible = keys < end
    if MASKED:
        visible = visible_keys(mask_ptr, mask_k_stride, keys, end, MASK, PER_QUERY)
    k = rows_at(k_ptr, start, k_row_stride, visible, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED)
    x = product(q, tl.trans(k), None)  # (BLOCK_M, BLOCK_N)
    if NEGATIVE:
        x = -x
    allowed = visible[None, :]
    if MASKED:
        there = (queries < q_len)[:, None]
        x, allowed = masked_scores(
            x, queries[:, None], keys[None, :], there, allowed, mask_in, unit, CAUSAL, MASK, PER_QUERY
        )
    m_ij = tl.max(x, 1)
    if not FIRST:
        m_ij = tl.maximum(m_i, m_ij)
    # A row that has met nothing yet is shifted by nothing: infinity minus infinity is NaN.
    shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    if MASK == FLOAT_MASK:  # a mask may have added -3e38, which multiplied is infinite
        p = tl.exp2((x - shift[:, None]) * LOG2E)
        alpha = tl.exp2((m_i - shift) * LOG2E)
    else:
        p = powers(x, shift[:, None], unit * LOG2E)
        alpha = tl.exp2((m_i - shift) * (unit * LOG2E))
    if FIRST:
        l_i = tl.sum(p, 1)
    else:
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
    if DROPS:
        rng_ptr, threshold, dropout_scale, head = drop_in
        keep = keep_attention(rng_ptr, threshold, dropout_scale, queries, head, start, BLOCK_N)
        p = dropped(p, keep, dropout_scale)
    if EXACT:
        acc = add_allowed(acc, p, allowed, v_ptr, start, v_row_stride, visible, VALUE_DIM, BLOCK_DV, BLOCK_N)
    else:
        v = rows_at(v_ptr, start, v_row_stride, visible, VALUE_DIM, BLOCK_DV, BLOCK_N, MASKED)
        acc = product(narrowed(p, v.dtype), v, acc)
    return acc, m_ij, l_i


@triton.jit
def _attend(
    plain,  # behind the keys that every query of the block may attend
    end,
    inputs,
    form,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """``(acc, m_i, l_i)`` of all keys."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if EXACT:
        for start in range(0, end, EXACT_BLOCK):
            acc, m_i, l_i = _take_keys(
                acc, m_i, l_i, start, end, False, True, True, EXACT_BLOCK, *inputs, *form
            )
    elif AT_ONCE and BLOCK_N >= 32:
        # Of sequences laid end to end many are much shorter than the longest.
        if end <= BLOCK_N // 2:
            acc, m_i, l_i = _take_keys(acc, m_i, l_i, 0, end, True, True, False, BLOCK_N // 2, *inputs, *form)
        else:
            acc, m_i, l_i = _take_keys(acc, m_i, l_i, 0, end, True, True, False, BLOCK_N, *inputs, *form)
    elif AT_ONCE:
        acc, m_i, l_i = _take_keys(acc, m_i, l_i, 0, end, True, True, False, BLOCK_N, *inputs, *form)
    else:
        # First the whole blocks that need no look at masks, then the others.
        split = plain // BLOCK_N * BLOCK_N
        for start in range(0, split, BLOCK_N):
            acc, m_i, l_i = _take_keys(
                acc, m_i, l_i, start, end, False, False, False, BLOCK_N, *inputs, *form
            )
        for start in range(split, end, BLOCK_N):
            acc, m_i, l_i = _take_keys(acc, m_i, l_i, start, end, False, True, False, BLOCK_N, *inputs, *form)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["sequences", "q_blocks", "q_len", "k_len", "lse_stride", "threshold"])
def _attention_fwd_kernel(
    q_ptr,  # (B, H, L, HEAD_DIM); of sequences laid end to end (1, H, tokens, HEAD_DIM), and so with those below
    k_ptr,  # (B, H_k, S, HEAD_DIM)
    v_ptr,  # (B, H_k, S, VALUE_DIM)
    mask_ptr,  # broadcasts to (B, H, L, S), or None
    rng_ptr,  # (2)
    cu_q_ptr,  # (B + 1)
    cu_k_ptr,  # (B + 1)
    out_ptr,  # (B, H, L, VALUE_DIM)
    lse_ptr,  # (B, H, L) contiguous
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
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
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    block = program % q_blocks
    head = program // q_blocks % heads
    sequence = program // q_blocks // heads
    if CAUSAL:
        block = q_blocks - 1 - block  # what takes longest starts first
    head_of_all = sequence * heads + head
    batch = sequence.to(tl.int64)
    key_head = (head // group).to(tl.int64)
    out_ptr += head.to(tl.int64) * out_head_stride
    lse_ptr += head.to(tl.int64) * lse_stride
    if VARLEN:
        if sequence == sequences:  # tokens behind the last sequence
            first = tl.load(cu_q_ptr + sequences) + block * BLOCK_M
            step = q_blocks * BLOCK_M
            zero_rows(out_ptr, first, step, q_len, out_row_stride, VALUE_DIM, BLOCK_DV, BLOCK_M)
            for start in range(first, q_len, step):
                rows = start + tl.arange(0, BLOCK_M)
                tl.store(lse_ptr + rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=rows < q_len)
            return
        first_q, q_len = tokens_of(cu_q_ptr, sequence)
        first_k, k_len = tokens_of(cu_k_ptr, sequence)
        q_ptr += first_q * q_row_stride
        k_ptr += first_k * k_row_stride
        v_ptr += first_k * v_row_stride
        out_ptr += first_q * out_row_stride
        lse_ptr += first_q
    else:
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        out_ptr += batch * out_batch_stride
        lse_ptr += batch * heads * lse_stride
    first = block * BLOCK_M
    if first >= q_len:
        return
    q_ptr += head.to(tl.int64) * q_head_stride
    k_ptr += key_head * k_head_stride
    v_ptr += key_head * v_head_stride
    if MASK != NO_MASK:
        mask_ptr += batch * mask_batch_stride + head.to(tl.int64) * mask_head_stride

    queries = first + tl.arange(0, BLOCK_M)
    there = queries < q_len
    q = rows_at(q_ptr, first, q_row_stride, there, HEAD_DIM, BLOCK_D, BLOCK_M, True)
    end, plain = key_range(mask_ptr, mask_k_stride, k_len, MASK, PER_QUERY)
    if CAUSAL:
        end = tl.minimum(end, first + BLOCK_M)
        plain = tl.minimum(plain, first + 1)
    inputs = (
        q,
        queries,
        q_len,
        unit,
        (k_ptr, k_row_stride),
        (v_ptr, v_row_stride),
        (mask_ptr, mask_q_stride, mask_k_stride),
        (rng_ptr, threshold, dropout_scale, head_of_all),
    )
    acc, m_i, l_i = _attend(
        plain,
        end,
        inputs,
        (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CAUSAL, MASK, PER_QUERY, DROPS, NEGATIVE),
        BLOCK_M,
        BLOCK_N,
        BLOCK_DV,
        AT_ONCE,
        EXACT=False,
    )
    if CAUSAL or PER_QUERY:
        if any_not_finite(acc):
            acc, m_i, l_i = _attend(
                plain,
                end,
                inputs,
                (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CAUSAL, MASK, PER_QUERY, DROPS, NEGATIVE),
                BLOCK_M,
                BLOCK_N,
                BLOCK_DV,
                AT_ONCE,
                EXACT=True,
            )

    # A query that may attend nothing gets zeros.
    nothing = l_i == 0.0
    l_i = tl.where(nothing, 1.0, l_i)
    acc = acc / l_i[:, None]
    store_rows(out_ptr, first, out_row_stride, there, acc, VALUE_DIM, BLOCK_DV, BLOCK_M)
    if MASK != FLOAT_MASK:
        m_i = m_i * unit
    tl.store(lse_ptr + queries, tl.where(nothing, float("-inf"), m_i + tl.log(l_i)), mask=there)
