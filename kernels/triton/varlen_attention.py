"""Attention over sequences laid end to end and told apart by ``cu_seqlens`` (Dao 2023, arXiv 2307.08691).

No padding is looked at. Tokens behind the last sequence, as in a batch that is filled up to a bucket, get zeros.
"""

import torch
from torch import Tensor

from ._attention_call import Lengths, attend, differentiate


def varlen_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    total, heads, _ = query.shape
    out = query.new_empty(total, heads, value.shape[2])
    lse = query.new_empty(heads, total, dtype=torch.float32)
    if lse.numel():
        lengths = _lengths(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        attend(query, key, value, None, out, lse, lengths, rng, dropout_p, is_causal, scale)
    return out, lse


def varlen_attention_bwd(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (t.new_empty(t.shape) for t in (query, key, value))
    if lse.numel():
        differentiate(
            dout,
            query,
            key,
            value,
            None,
            out,
            lse,
            dquery,
            dkey,
            dvalue,
            None,
            _lengths(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            rng,
            dropout_p,
            is_causal,
            scale,
        )
    else:
        dkey.zero_(), dvalue.zero_()
    return dquery, dkey, dvalue


def _lengths(
    query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int
) -> Lengths:
    # Even where every sequence is empty there is a block that fills what is behind them.
    return Lengths(
        cu_q.shape[0] - 1,
        query.shape[0],
        key.shape[0],
        max(longest_q, 1),
        max(longest_k, 1),
        cu_q.contiguous(),
        cu_k.contiguous(),
    )
