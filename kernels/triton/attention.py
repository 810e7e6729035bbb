"""Scaled dot-product attention over dense batches (Vaswani et al. 2017, arXiv 1706.03762) and its gradients."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._attention_call import Lengths, attend, differentiate, tables_for
from .configs import Configs
from .sizes import Sizes


def scaled_dot_product_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    if lse.numel():
        lengths = _lengths(query, key)
        attend(query, key, value, attn_mask, out, lse, lengths, rng, dropout_p, is_causal, scale)
    return out, lse


def scaled_dot_product_attention_bwd(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (t.new_empty(t.shape) for t in (query, key, value))
    dscores = None
    if need_dmask:
        # Only in the shape of the mask if that is the shape of the scores; float32 where it is summed up yet.
        shape = (*query.shape[:3], key.shape[2])
        dtype = attn_mask.dtype if attn_mask.shape == shape else torch.float32
        dscores = query.new_zeros(shape, dtype=dtype)
    if lse.numel():
        differentiate(
            dout,
            query,
            key,
            value,
            attn_mask,
            out,
            lse,
            dquery,
            dkey,
            dvalue,
            dscores,
            _lengths(query, key),
            rng,
            dropout_p,
            is_causal,
            scale,
        )
    else:
        dkey.zero_(), dvalue.zero_()
    if not need_dmask:
        return dquery, dkey, dvalue, dout.new_empty(0)
    return dquery, dkey, dvalue, dscores.sum_to_size(attn_mask.shape).to(attn_mask.dtype).contiguous()


def _lengths(query: Tensor, key: Tensor) -> Lengths:
    q_len, k_len = query.shape[2], key.shape[2]
    return Lengths(query.shape[0], q_len, k_len, q_len, k_len)


# --- What is compiled ahead and what is tuned -------------------------------------------------------------------

_BERT = {"heads": 12, "hidden": 768}
_WIDE = {"heads": 6, "hidden": 768}
AHEAD = [
    Sizes(seqlen=64, **_BERT),
    Sizes(seqlen=128, **_BERT, dropout_p=0.1),
    Sizes(seqlen=256, **_BERT),
    Sizes(seqlen=256, **_BERT, dropout_p=0.1),
    Sizes(seqlen=1024, **_BERT),
    Sizes(seqlen=1024, **_BERT, dropout_p=0.1),
    Sizes(seqlen=128, **_WIDE),
    Sizes(seqlen=1024, **_WIDE),
    Sizes(seqlen=1024, heads=3, hidden=768),
    Sizes(seqlen=64, **_BERT, dtype=torch.float32),
    Sizes(seqlen=1024, **_BERT, dtype=torch.float32),
]


def calls(sizes: Sizes, empty: Callable[..., Tensor]) -> Iterator[tuple[Configs, Callable[[], object]]]:
    """A padded batch, its mask given as one."""
    batch, heads, length, dtype = sizes.batch, sizes.heads, sizes.seqlen, sizes.dtype
    q, k, v, dout = (
        empty(batch, length, heads, sizes.head_dim, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    mask = empty(batch, 1, 1, length, dtype=torch.bool)
    rng = empty(2, dtype=torch.int64) if sizes.dropout_p else None
    constants = (rng, sizes.dropout_p, False, sizes.head_dim**-0.5)

    @functools.cache
    def forward() -> tuple[Tensor, Tensor]:
        return scaled_dot_product_attention_fwd(q, k, v, mask, *constants)

    tables = tables_for(q, length)
    for configs in tables[0]:
        yield configs, lambda: scaled_dot_product_attention_fwd(q, k, v, mask, *constants)
    for configs in tables[1]:
        yield (
            configs,
            lambda: scaled_dot_product_attention_bwd(dout, q, k, v, mask, *forward(), *constants, False),
        )
