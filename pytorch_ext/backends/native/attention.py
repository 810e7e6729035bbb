import torch
import torch.nn.functional as F
from torch import Tensor

from .._exporting import exporting

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    if attn_mask is not None and attn_mask.dim() < 2:
        attn_mask = attn_mask.reshape(1, -1)  # SDPA counts on two dimensions
    if attn_mask is not None and _hides_keys(attn_mask, key):
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        hidden = hidden[..., :1, :].mT  # (..., k_len, 1)
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    grouped = query.dim() > 2 and query.shape[-3] != key.shape[-3]
    gqa = {"enable_gqa": True} if grouped else {}
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **gqa
    )


def _hides_keys(attn_mask: Tensor, key: Tensor) -> bool:
    """Whether the mask is the same for every query and head, as one that marks padding is.

    SDPA multiplies a hidden value by a weight of zero, so that a NaN in padding would reach every query. Under a mask
    that differs between queries PyTorch's own behaviour stays. An exported graph has the attention alone: the padding
    of a dense batch is finite.
    """
    if exporting():
        return False
    if attn_mask.dim() > key.dim() or attn_mask.shape[-2] == 0:
        return False
    one_for_all_queries = attn_mask.shape[-2] == 1 or attn_mask.stride(-2) == 0
    one_for_all_heads = attn_mask.dim() < 3 or attn_mask.shape[-3] == 1 or attn_mask.stride(-3) == 0
    return one_for_all_queries and one_for_all_heads
