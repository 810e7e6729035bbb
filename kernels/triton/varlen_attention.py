"""Attention over sequences laid end to end and told apart by ``cu_seqlens`` (Dao 2023, arXiv 2307.08691).

No padding is looked at. Tokens behind the last sequence, as in a batch that is filled up to a bucket, get zeros.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._attention_call import Lengths, attend, differentiate, tables_for
from .configs import Configs
from .sizes import Sizes


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


# --- What is compiled ahead -------------------------------------------------------------------------------------

# The configurations are those of dense attention, which is tuned; here they are seen to fit this use of them too.
AHEAD = [Sizes(seqlen=128, dropout_p=0.1), Sizes(seqlen=256)]


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable[[], object]]]:
    """Sequences of one length, laid end to end."""
    q, k, v, dout = (empty(sizes.tokens, sizes.heads, sizes.head_dim, dtype=sizes.dtype) for _ in range(4))
    cu = torch.arange(sizes.batch + 1, dtype=torch.int32, device=q.device) * sizes.seqlen
    rng = empty(2, dtype=torch.int64) if sizes.dropout_p else None
    lengths = (cu, cu, sizes.seqlen, sizes.seqlen)
    constants = (rng, sizes.dropout_p, False, sizes.head_dim**-0.5)

    @functools.cache
    def forward() -> tuple[Tensor, Tensor]:
        return varlen_attention_fwd(q, k, v, *lengths, *constants)

    tables = tables_for(q, sizes.seqlen)
    for configs in tables[0]:
        yield configs, lambda: varlen_attention_fwd(q, k, v, *lengths, *constants)
    for configs in tables[1]:
        yield configs, lambda: varlen_attention_bwd(dout, q, k, v, *forward(), *lengths, *constants)
