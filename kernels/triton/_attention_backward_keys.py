"""Attention backward, the kernel that owns keys (Dao et al. 2022, arXiv 2205.14135).

Where the keys of a sequence fit into one tile, a program owns a key head and makes all three gradients in one pass.
Else it owns a block of the keys of a key head and makes their gradients, and another kernel those of the queries.
"""

import triton
import triton.language as tl

from ._attention_backward_tile import add_queries
from ._attention_tiles import (
    EXACT_BLOCK,
    NO_MASK,
    add_allowed,
    any_not_finite,
    key_range,
    rows_at,
    store_rows,
    tokens_of,
    visible_keys,
    zero_rows,
)
from .precision import narrowed, product, stored


@triton.jit
def _own_keys(
    first_key,  # of the tile
    end,  # behind the keys that any query may attend
    plain,  # behind the keys that every query may attend
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    k_in,  # pointer to (k_len, HEAD_DIM) of this sequence and key head, stride of its rows
    v_in,  # pointer to (k_len, VALUE_DIM), stride of its rows
    heads_in,  # how many query heads share the keys, and of each input of theirs the strides between them
    q_in,  # of the first of them: pointer to (q_len, HEAD_DIM), stride of its rows
    do_in,  # pointer to (q_len, VALUE_DIM), stride of its rows
    dq_in,  # pointer to (q_len, HEAD_DIM), stride of its rows; written with WHOLE
    dscores_ptr,  # (q_len, k_len) contiguous, and so for each head; written with WHOLE if not None
    k_len,
    lse_ptr,  # (q_len)
    delta_ptr,  # (q_len), None with WHOLE
    q_len,
    unit,
    scale,
    mask_in,  # pointer to the mask of this sequence and head, or None, and its strides
    drop_in,  # rng or None, threshold, scale, and the head counted through the batch
    form,  # what follows, to be handed on
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
    """``(dk, dv)`` of a tile of keys, over all queries of all heads that share them; and whether, under a mask, a
    product was spoiled by what is not finite, and has to be made anew with EXACT.
    """
    k_ptr, k_row_stride = k_in
    v_ptr, v_row_stride = v_in
    group, q_head_stride, do_head_stride, dq_head_stride, lse_stride, mask_head_stride = heads_in
    q_ptr, q_row_stride = q_in
    do_ptr, do_row_stride = do_in
    dq_ptr, dq_row_stride = dq_in
    mask_ptr, mask_q_stride, mask_k_stride = mask_in
    rng_ptr, threshold, dropout_scale, head = drop_in
    keys = first_key + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    spoiled = first_key < 0
    # Queries before `begin` may attend none of the keys, those from `split` on all of them.
    LOOKS: tl.constexpr = WHOLE or EXACT or CAUSAL or MASK != NO_MASK
    begin = first_key // BLOCK_M * BLOCK_M if CAUSAL else first_key * 0
    split = q_len
    if not LOOKS:
        split = begin
    elif not WHOLE and not EXACT:
        if first_key + BLOCK_N <= plain:
            if CAUSAL:
                split = tl.minimum(q_len, (first_key + BLOCK_N - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
            else:
                split = begin
    for _ in range(group):
        visible = visible_keys(mask_ptr, mask_k_stride, keys, end, MASK, PER_QUERY)
        k = rows_at(k_ptr, first_key, k_row_stride, visible, HEAD_DIM, BLOCK_D, BLOCK_N, True)
        v = rows_at(v_ptr, first_key, v_row_stride, visible, VALUE_DIM, BLOCK_DV, BLOCK_N, True)
        inputs = (
            (q_ptr, q_row_stride),
            (do_ptr, do_row_stride),
            lse_ptr,
            delta_ptr,
            q_len,
            first_key,
            unit,
            (mask_ptr, mask_q_stride, mask_k_stride),
            (rng_ptr, threshold, dropout_scale, head),
        )
        if LOOKS:
            for first in range(begin, split, BLOCK_M):
                dk, dv, ds, allowed = add_queries(
                    dk, dv, first, k, v, keys, visible, WHOLE, True, EXACT, BLOCK_M, BLOCK_N, *inputs, *form
                )
                if WHOLE:
                    there = first + tl.arange(0, BLOCK_M) < q_len
                    if EXACT:
                        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                        dq = add_allowed(
                            dq,
                            tl.trans(ds),
                            tl.trans(allowed),
                            k_ptr,
                            first_key,
                            k_row_stride,
                            visible,
                            HEAD_DIM,
                            BLOCK_D,
                            BLOCK_N,
                        )
                    else:
                        dq = product(tl.trans(narrowed(ds, k.dtype)), k, None)
                        if CAUSAL or PER_QUERY:
                            spoiled = spoiled | any_not_finite(dq)
                    store_rows(dq_ptr, first, dq_row_stride, there, dq * scale, HEAD_DIM, BLOCK_D, BLOCK_M)
                    if dscores_ptr is not None:
                        queries = first + tl.arange(0, BLOCK_M)
                        at = dscores_ptr + queries.to(tl.int64)[None, :] * k_len + keys[:, None]
                        stored(at, ds, there[None, :] & visible[:, None])
        if not WHOLE and not EXACT:
            for first in range(tl.maximum(begin, split), q_len, BLOCK_M):
                dk, dv, ds, allowed = add_queries(
                    dk, dv, first, k, v, keys, visible, WHOLE, False, EXACT, BLOCK_M, BLOCK_N, *inputs, *form
                )
        q_ptr += q_head_stride
        do_ptr += do_head_stride
        lse_ptr += lse_stride
        if WHOLE:
            dq_ptr += dq_head_stride
            if dscores_ptr is not None:
                dscores_ptr += tl.cast(q_len, tl.int64) * k_len
        else:
            delta_ptr += lse_stride
        if MASK != NO_MASK:
            mask_ptr += mask_head_stride
        head += 1
    if CAUSAL or MASK != NO_MASK:
        spoiled = spoiled | any_not_finite(dk) | any_not_finite(dv)
    return dk * scale, dv, spoiled


@triton.jit
def _give_keys(
    k_len,
    dk_in,  # pointer to (k_len, HEAD_DIM) of this sequence and key head, stride of its rows
    dv_in,  # pointer to (k_len, VALUE_DIM), stride of its rows
    first_key,
    end,
    plain,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    inputs,
    form,  # what follows, to be handed on
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
    """Writes the gradients of a tile of keys. Returns whether they have to be made anew with EXACT."""
    dk_ptr, dk_row_stride = dk_in
    dv_ptr, dv_row_stride = dv_in
    dk, dv, spoiled = _own_keys(first_key, end, plain, WHOLE, EXACT, BLOCK_M, BLOCK_N, *inputs, form, *form)
    there = first_key + tl.arange(0, BLOCK_N) < k_len
    store_rows(dk_ptr, first_key, dk_row_stride, there, dk, HEAD_DIM, BLOCK_D, BLOCK_N)
    store_rows(dv_ptr, first_key, dv_row_stride, there, dv, VALUE_DIM, BLOCK_DV, BLOCK_N)
    if WHOLE:  # keys behind the tile are such that nothing may attend
        zero_rows(dk_ptr, BLOCK_N, BLOCK_N, k_len, dk_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
        zero_rows(dv_ptr, BLOCK_N, BLOCK_N, k_len, dv_row_stride, VALUE_DIM, BLOCK_DV, BLOCK_N)
    return spoiled


@triton.jit
def _give_keys_by_size(
    gradients,  # k_len, dk_in and dv_in
    first_key,
    end,
    plain,
    inputs,
    form,
    WHOLE: tl.constexpr,
    CHECKED: tl.constexpr,  # there may be something that is not finite and hidden
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = (first_key, end, plain)
    if WHOLE and BLOCK_N >= 32:
        # Of sequences laid end to end many are much shorter than the longest.
        if end <= BLOCK_N // 2:
            spoiled = _give_keys(*gradients, *tile, WHOLE, False, BLOCK_M, BLOCK_N // 2, inputs, form, *form)
        else:
            spoiled = _give_keys(*gradients, *tile, WHOLE, False, BLOCK_M, BLOCK_N, inputs, form, *form)
    else:
        spoiled = _give_keys(*gradients, *tile, WHOLE, False, BLOCK_M, BLOCK_N, inputs, form, *form)
    if CHECKED:
        if spoiled:
            _give_keys(*gradients, *tile, WHOLE, True, EXACT_BLOCK, BLOCK_N, inputs, form, *form)


@triton.jit(do_not_specialize=["sequences", "k_blocks", "q_len", "k_len", "lse_stride", "threshold"])
def _attention_bwd_keys_kernel(
    q_ptr,  # (B, H, L, HEAD_DIM); of sequences laid end to end (1, H, tokens, HEAD_DIM), and so with those below
    k_ptr,  # (B, H_k, S, HEAD_DIM)
    v_ptr,  # (B, H_k, S, VALUE_DIM)
    mask_ptr,  # broadcasts to (B, H, L, S), or None
    rng_ptr,  # (2)
    cu_q_ptr,  # (B + 1)
    cu_k_ptr,  # (B + 1)
    do_ptr,  # (B, H, L, VALUE_DIM)
    lse_ptr,  # (B, H, L) contiguous
    delta_ptr,  # (B, H, L) contiguous; None with WHOLE
    dq_ptr,  # (B, H, L, HEAD_DIM); written with WHOLE, else None
    dscores_ptr,  # (B, H, L, S) contiguous; written with WHOLE where a score counts, or None
    dk_ptr,  # (B, H_k, S, HEAD_DIM)
    dv_ptr,  # (B, H_k, S, VALUE_DIM)
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
    dq_batch_stride,
    dq_head_stride,
    dq_row_stride,
    dk_batch_stride,
    dk_head_stride,
    dk_row_stride,
    dv_batch_stride,
    dv_head_stride,
    dv_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_q_stride,
    mask_k_stride,
    sequences,  # B
    key_heads,  # H_k
    group,  # query heads that share a key head
    k_blocks,  # of the longest sequence
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
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Programs: blocks of keys (with WHOLE one), fastest, of key heads of sequences."""
    program = tl.program_id(0)
    block = program % k_blocks
    key_head = program // k_blocks % key_heads
    sequence = program // k_blocks // key_heads
    head = key_head * group
    batch = sequence.to(tl.int64)
    first_head = head.to(tl.int64)
    q_ptr += first_head * q_head_stride
    do_ptr += first_head * do_head_stride
    lse_ptr += first_head * lse_stride
    k_ptr += key_head.to(tl.int64) * k_head_stride
    v_ptr += key_head.to(tl.int64) * v_head_stride
    dk_ptr += key_head.to(tl.int64) * dk_head_stride
    dv_ptr += key_head.to(tl.int64) * dv_head_stride
    if WHOLE:
        dq_ptr += first_head * dq_head_stride
    else:
        delta_ptr += first_head * lse_stride
    if VARLEN:
        if sequence == sequences:  # tokens behind the last sequence
            first = tl.load(cu_k_ptr + sequences) + block * BLOCK_N
            step = k_blocks * BLOCK_N
            zero_rows(dk_ptr, first, step, k_len, dk_row_stride, HEAD_DIM, BLOCK_D, BLOCK_N)
            zero_rows(dv_ptr, first, step, k_len, dv_row_stride, VALUE_DIM, BLOCK_DV, BLOCK_N)
            if WHOLE:
                first = tl.load(cu_q_ptr + sequences)
                for _ in range(group):
                    zero_rows(dq_ptr, first, BLOCK_M, q_len, dq_row_stride, HEAD_DIM, BLOCK_D, BLOCK_M)
                    dq_ptr += dq_head_stride
            return
        first_q, q_len = tokens_of(cu_q_ptr, sequence)
        first_k, k_len = tokens_of(cu_k_ptr, sequence)
        q_ptr += first_q * q_row_stride
        do_ptr += first_q * do_row_stride
        lse_ptr += first_q
        k_ptr += first_k * k_row_stride
        v_ptr += first_k * v_row_stride
        dk_ptr += first_k * dk_row_stride
        dv_ptr += first_k * dv_row_stride
        if WHOLE:
            dq_ptr += first_q * dq_row_stride
        else:
            delta_ptr += first_q
    else:
        q_ptr += batch * q_batch_stride
        do_ptr += batch * do_batch_stride
        lse_ptr += batch * (key_heads * group) * lse_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        dk_ptr += batch * dk_batch_stride
        dv_ptr += batch * dv_batch_stride
        if WHOLE:
            dq_ptr += batch * dq_batch_stride
            if dscores_ptr is not None:
                dscores_ptr += (batch * (key_heads * group) + first_head) * q_len * k_len
        else:
            delta_ptr += batch * (key_heads * group) * lse_stride
    first_key = block * BLOCK_N
    if not WHOLE:
        if first_key >= k_len:
            return
    if MASK != NO_MASK:
        mask_ptr += batch * mask_batch_stride + first_head * mask_head_stride
    end, plain = key_range(mask_ptr, mask_k_stride, k_len, MASK, PER_QUERY)
    if MASK != NO_MASK:
        for i in range(1, group):  # a mask may differ from head to head
            other_end, other_plain = key_range(
                mask_ptr + i * mask_head_stride, mask_k_stride, k_len, MASK, PER_QUERY
            )
            end = tl.maximum(end, other_end)
            plain = tl.minimum(plain, other_plain)
    if not WHOLE:
        if first_key >= end:
            q_len *= 0  # nothing may attend these keys
    inputs = (
        (k_ptr, k_row_stride),
        (v_ptr, v_row_stride),
        (group, q_head_stride, do_head_stride, dq_head_stride, lse_stride, mask_head_stride),
        (q_ptr, q_row_stride),
        (do_ptr, do_row_stride),
        (dq_ptr, dq_row_stride),
        dscores_ptr,
        k_len,
        lse_ptr,
        delta_ptr,
        q_len,
        unit,
        scale,
        (mask_ptr, mask_q_stride, mask_k_stride),
        (rng_ptr, threshold, dropout_scale, sequence * (key_heads * group) + head),
    )
    _give_keys_by_size(
        (k_len, (dk_ptr, dk_row_stride), (dv_ptr, dv_row_stride)),
        first_key,
        end,
        plain,
        inputs,
        (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CAUSAL, MASK, PER_QUERY, DROPS, NEGATIVE),
        WHOLE,
        CAUSAL or MASK != NO_MASK,
        BLOCK_M,
        BLOCK_N,
    )
