"""How the attention kernels are called: what they are given, and with which tiles."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_backward_keys import _attention_bwd_keys_kernel
from ._attention_backward_queries import _attention_bwd_queries_kernel
from ._attention_configs import (
    BACKWARD_AT_ONCE,
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    FORWARD_AT_ONCE,
    at_once,
)
from ._attention_forward import _attention_fwd_kernel
from .configs import Configs, size_class
from .launch import launch
from .philox import dropout_arguments

WIDEST_HEAD = 256
# A softmax over minus infinity makes NaN with a scale of zero: with the smallest there is, it makes what zero should.
LEAST_SCALE = 2.0**-126


class Lengths(NamedTuple):
    """The sequences of a call: a batch of equal lengths, or laid end to end as ``cu_q`` and ``cu_k`` say."""

    sequences: int
    q_len: int  # of each sequence; or all tokens
    k_len: int
    longest_q: int
    longest_k: int
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    def programs(self, blocks: int, heads: int) -> tuple[int]:
        """The grid: blocks, heads, sequences; and one more sequence for tokens behind the last one."""
        return (blocks * heads * (self.sequences + (self.cu_q is not None)),)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lengths: Lengths,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> None:
    """Fills ``out``, rows of elements side by side, and ``lse``, contiguous."""
    heads_at = 1 if lengths.cu_q is None else -2
    heads, key_heads = query.shape[heads_at], key.shape[heads_at]
    q, k, v = dense_rows(query), dense_rows(key), dense_rows(value)
    form = _form(q, v, attn_mask, rng, lengths, is_causal, scale)
    keys, head_dim = size_class(lengths.longest_k), max(form["BLOCK_D"], form["BLOCK_DV"])
    drops = int(rng is not None)
    if at_once(keys, head_dim, q.itemsize, backward=False):
        tiles = {"BLOCK_N": keys, **FORWARD_AT_ONCE.of(q, head_dim, keys, q.itemsize, drops)}
        form["AT_ONCE"] = True
    else:
        tiles = FORWARD.of(q, head_dim, q.itemsize, drops)
        form["AT_ONCE"] = False
    q_blocks = -(-lengths.longest_q // tiles["BLOCK_M"])
    threshold, dropout_scale = dropout_arguments(dropout_p)
    launch(
        _attention_fwd_kernel,
        lengths.programs(q_blocks, heads),
        q,
        k,
        v,
        attn_mask,
        rng,
        lengths.cu_q,
        lengths.cu_k,
        out,
        lse,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        *mask_strides(attn_mask),
        lengths.sequences,
        heads,
        heads // key_heads,
        q_blocks,
        lengths.q_len,
        lengths.k_len,
        lse.shape[-1],
        max(abs(scale), LEAST_SCALE),
        threshold,
        dropout_scale,
        **form,
        **tiles,
    )


def differentiate(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    dscores: Tensor | None,
    lengths: Lengths,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> None:
    """Fills ``dquery``, ``dkey`` and ``dvalue``, contiguous, and ``dscores`` ``(B, H, L, S)`` where a score counts."""
    heads_at = 1 if lengths.cu_q is None else -2
    heads, key_heads = query.shape[heads_at], key.shape[heads_at]
    q, k, v, do = dense_rows(query), dense_rows(key), dense_rows(value), dense_rows(dout)
    lse = lse.contiguous()
    form = _form(q, v, attn_mask, rng, lengths, is_causal, scale)
    keys, head_dim = size_class(lengths.longest_k), max(form["BLOCK_D"], form["BLOCK_DV"])
    drops = int(rng is not None)
    whole = at_once(keys, head_dim, q.itemsize, backward=True)
    threshold, dropout_scale = dropout_arguments(dropout_p)
    numbers = (lengths.q_len, lengths.k_len, lse.shape[-1], max(abs(scale), LEAST_SCALE), scale)
    numbers = (*numbers, threshold, dropout_scale)
    delta = None
    if not whole:
        delta = torch.empty_like(lse)
        o = dense_rows(out)
        tiles = BACKWARD_QUERIES.of(q, head_dim, q.itemsize, drops)
        q_blocks = -(-lengths.longest_q // tiles["BLOCK_M"])
        launch(
            _attention_bwd_queries_kernel,
            lengths.programs(q_blocks, heads),
            q,
            k,
            v,
            attn_mask,
            rng,
            lengths.cu_q,
            lengths.cu_k,
            do,
            o,
            lse,
            delta,
            dquery,
            dscores,
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(do),
            *strides(o),
            *strides(dquery),
            *mask_strides(attn_mask),
            lengths.sequences,
            heads,
            heads // key_heads,
            q_blocks,
            *numbers,
            **form,
            **tiles,
        )
    if whole:
        tiles = {"BLOCK_N": keys, **BACKWARD_AT_ONCE.of(q, head_dim, keys, q.itemsize, drops)}
    else:
        tiles = BACKWARD_KEYS.of(q, head_dim, q.itemsize, drops)
    k_blocks = 1 if whole else -(-lengths.longest_k // tiles["BLOCK_N"])
    launch(
        _attention_bwd_keys_kernel,
        lengths.programs(k_blocks, key_heads),
        q,
        k,
        v,
        attn_mask,
        rng,
        lengths.cu_q,
        lengths.cu_k,
        do,
        lse,
        delta,
        dquery if whole else None,
        dscores if whole else None,
        dkey,
        dvalue,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(do),
        *strides(dquery),
        *strides(dkey),
        *strides(dvalue),
        *mask_strides(attn_mask),
        lengths.sequences,
        key_heads,
        heads // key_heads,
        k_blocks,
        *numbers,
        **form,
        WHOLE=whole,
        **tiles,
    )


def tables_for(query: Tensor, longest_k: int) -> tuple[list[Configs], list[Configs]]:
    """Whose configurations forward and backward take; heads of one width."""
    sizes = size_class(longest_k), size_class(query.shape[-1]), query.itemsize
    forward, backward = at_once(*sizes, backward=False), at_once(*sizes, backward=True)
    return (
        [FORWARD_AT_ONCE if forward else FORWARD],
        [BACKWARD_AT_ONCE] if backward else [BACKWARD_QUERIES, BACKWARD_KEYS],
    )


def _form(
    query: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    lengths: Lengths,
    is_causal: bool,
    scale: float,
) -> dict[str, Any]:
    """The constants that the kernels share."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    for name, dim in (("query", head_dim), ("value", value_dim)):
        if dim > WIDEST_HEAD:
            raise RuntimeError(
                f"{name}: expected heads of at most {WIDEST_HEAD} for the backend triton, got {dim}"
            )
    mask = 0 if attn_mask is None else 1 if attn_mask.dtype == torch.bool else 2
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": size_class(head_dim),
        "BLOCK_DV": size_class(value_dim),
        "VARLEN": lengths.cu_q is not None,
        "CAUSAL": is_causal,
        "MASK": mask,
        "PER_QUERY": mask > 0 and mask_strides(attn_mask)[2] != 0,
        "DROPS": rng is not None,
        "NEGATIVE": scale < 0.0,
    }


def dense_rows(t: Tensor) -> Tensor:
    """``t`` with the elements of a head side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def strides(t: Tensor) -> tuple[int, ...]:
    """Of batches, heads and rows: in ``(B, H, L, D)``, or in tokens ``(L, H, D)``."""
    found = t.stride()
    return found[:3] if len(found) == 4 else (0, found[1], found[0])


def mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Of batches, heads, queries and keys; 0 where one element stands for all."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True))
