"""Scaled dot-product attention over dense batches (Vaswani et al. 2017, arXiv 1706.03762) and its gradients."""

import torch
from torch import Tensor

from ._attention_call import Lengths, attend, differentiate


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
