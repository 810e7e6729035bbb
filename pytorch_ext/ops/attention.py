"""Scaled dot-product attention over dense batches."""

import torch
from torch import Tensor

from ..backends import choose
from ..backends.native.attention import scaled_dot_product_attention as native
from . import _checks as check
from ._autocast import lowered
from ._direct import direct
from ._raw import apply, call, define, draw_rng, first_order, statistics_dtype, wants_grad


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As :func:`torch.nn.functional.scaled_dot_product_attention` (Vaswani et al. 2017, arXiv 1706.03762).

    Args:
        query: ``(*, query_heads, q_len, head_dim)``; without heads ``(*, q_len, head_dim)``.
        key: ``(*, key_heads, k_len, head_dim)``.
        value: ``(*, key_heads, k_len, value_dim)``.
        attn_mask: broadcastable to ``(*, query_heads, q_len, k_len)``: bool, True where a query may attend, or
            or in the dtype of ``query`` or float32, added to the scores; it may require a gradient.
        dropout_p: the probability of zeroing an attention weight, applied whenever it is above 0.
        is_causal: query ``i`` attends keys 0 to ``i`` (upper-left alignment); not together with ``attn_mask``.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        enable_gqa: ``key_heads`` may divide ``query_heads``.

    Returns:
        ``(*, query_heads, q_len, value_dim)``. A query that may attend nothing gets zeros.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1].
        RuntimeError: a shape, dtype or device that does not fit.
    """
    out = direct(
        "scaled_dot_product_attention",
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
    )
    if out is not None:
        return out
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    backend = choose("scaled_dot_product_attention", query, key, value, attn_mask)
    if backend == "native":
        return native(query, key, value, attn_mask, dropout_p, is_causal, scale)
    query, key, value = lowered(query, key, value)
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
        attn_mask = attn_mask.to(query.dtype)
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5
    q, k, v = query, key, value
    leading = query.shape[:-3]
    if query.dim() != 4 or not leading == key.shape[:1] == value.shape[:1]:
        leading = _leading(query, key, value)
        q, k, v = (_four_dimensional(t, leading) for t in (query, key, value))
    mask = None if attn_mask is None else _mask_of_four(attn_mask, query.dim(), leading)
    rng = draw_rng(q) if dropout_p > 0.0 else None
    if wants_grad(q, k, v, mask):
        out = apply(
            AttentionFunction,
            "scaled_dot_product_attention",
            q,
            k,
            v,
            mask,
            rng,
            dropout_p,
            is_causal,
            scale,
            backend,
        )
    else:
        out, _ = call(
            scaled_dot_product_attention_fwd, q, k, v, mask, rng, dropout_p, is_causal, scale, backend
        )
    if query.dim() == 4:
        return out
    heads = query.shape[-3:-2] if query.dim() > 2 else ()
    return out.reshape(*leading, *heads, *out.shape[-2:])


def _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> None:
    check.floating("query", query)
    alike = check.fits(key, query, query.shape) and check.fits(value, query, query.shape)
    if not alike or query.dim() < 2:
        _check_shapes(query, key, value, enable_gqa)
    check.probability("dropout_p", dropout_p)
    if attn_mask is not None:
        _check_mask(query, key, attn_mask, is_causal)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if query.dim() < 2:
        expected = "at least 2 dimensions (*, q_len, head_dim)"
        raise RuntimeError(f"query: expected {expected}, got shape {tuple(query.shape)}")
    for name, t in (("key", key), ("value", value)):
        check.floating(name, t)
        check.same_device("query", query, name, t)
        check.same_dtype("query", query, name, t)
        if t.dim() != query.dim():
            expected = f"as many dimensions as query, {query.dim()}"
            raise RuntimeError(f"{name}: expected {expected}, got shape {tuple(t.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"key: expected head_dim {query.shape[-1]} as query has, got shape {tuple(key.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            f"value: expected k_len {key.shape[-2]} as key has, got shape {tuple(value.shape)}"
        )
    if query.dim() > 2:
        _check_heads(query, key, value, enable_gqa)
    try:
        torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        wanted = f"leading dimensions that broadcast with those of query, {tuple(query.shape[:-3])}"
        found = f"{tuple(key.shape)} and {tuple(value.shape)}"
        raise RuntimeError(f"key, value: expected {wanted}, got shapes {found}") from None


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    heads, key_heads = query.shape[-3], key.shape[-3]
    if value.shape[-3] != key_heads:
        raise RuntimeError(f"value: expected {key_heads} heads as key has, got shape {tuple(value.shape)}")
    if heads != key_heads and (not enable_gqa or key_heads == 0 or heads % key_heads):
        expected = f"a number of heads that divides {heads}" if enable_gqa else f"{heads} heads as query has"
        raise RuntimeError(
            f"key: expected {expected}, got shape {tuple(key.shape)} (enable_gqa={enable_gqa})"
        )


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor, is_causal: bool) -> None:
    check.tensor("attn_mask", attn_mask)
    if is_causal:
        raise RuntimeError("is_causal: expected False beside an attn_mask, got True")
    check.same_device("query", query, "attn_mask", attn_mask)
    allowed = (torch.bool, torch.float32, query.dtype)
    by_autocast = attn_mask.is_floating_point() and torch.is_autocast_enabled(query.device.type)
    if attn_mask.dtype not in allowed and not by_autocast:
        expected = " or ".join(dict.fromkeys(map(str, allowed)))
        raise RuntimeError(f"attn_mask: expected dtype {expected}, got {attn_mask.dtype}")
    leading = _leading(query, key, key)
    expected = torch.Size((*leading, *query.shape[-3:-2], query.shape[-2], key.shape[-2]))
    if not _broadcasts(attn_mask.shape, expected):
        wanted = f"a shape that broadcasts to {tuple(expected)}"
        raise RuntimeError(f"attn_mask: expected {wanted}, got {tuple(attn_mask.shape)}")


def _broadcasts(shape: torch.Size, expected: torch.Size) -> bool:
    if not torch.compiler.is_compiling():
        pairs = zip(reversed(shape), reversed(expected), strict=False)
        return len(shape) <= len(expected) and all(size in (1, wanted) for size, wanted in pairs)
    try:
        return torch.broadcast_shapes(shape, expected) == expected
    except RuntimeError:
        return False


def _leading(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    leading = query.shape[:-3]
    # Broadcasting shapes takes PyTorch longer than small attention does.
    if torch.compiler.is_compiling() or not (leading == key.shape[:-3] == value.shape[:-3]):
        leading = torch.broadcast_shapes(leading, key.shape[:-3], value.shape[:-3])
    return leading


def _four_dimensional(t: Tensor, leading: torch.Size) -> Tensor:
    """``(*, heads, length, dim)`` with any leading dimensions as ``(batch, heads, length, dim)``."""
    if t.dim() == 4 and t.shape[:1] == leading:
        return t
    if t.dim() == 2:
        t = t[None]
    return t.expand(*leading, *t.shape[-3:]).reshape(-1, *t.shape[-3:])


def _mask_of_four(mask: Tensor, query_dims: int, leading: torch.Size) -> Tensor:
    """A mask with four dimensions that broadcasts as ``mask`` does to queries of ``query_dims`` dimensions."""
    if query_dims <= 4:
        return mask[(None,) * (4 - mask.dim())]
    if mask.dim() <= 3:
        return mask[(None,) * (4 - mask.dim())]
    return mask.expand(*leading, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _fwd_fake(query, key, value, attn_mask, rng, dropout_p, is_causal, scale):
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=statistics_dtype(query))


def _bwd_fake(dout, query, key, value, attn_mask, out, lse, rng, dropout_p, is_causal, scale, need_dmask):
    dmask = attn_mask.new_empty(attn_mask.shape) if need_dmask else dout.new_empty(0)
    return *(t.new_empty(t.shape) for t in (query, key, value)), dmask


scaled_dot_product_attention_fwd = define(
    "scaled_dot_product_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? rng,"
    " float dropout_p, bool is_causal, float scale, str backend) -> (Tensor out, Tensor lse)",
    _fwd_fake,
)
scaled_dot_product_attention_bwd = define(
    "scaled_dot_product_attention_bwd(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? attn_mask,"
    " Tensor out, Tensor lse, Tensor? rng, float dropout_p, bool is_causal, float scale, bool need_dmask, str backend)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask)",
    _bwd_fake,
)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask, rng, dropout_p, is_causal, scale, backend):
        out, lse = call(
            scaled_dot_product_attention_fwd,
            query,
            key,
            value,
            attn_mask,
            rng,
            dropout_p,
            is_causal,
            scale,
            backend,
        )
        ctx.save_for_backward(query, key, value, attn_mask, out, lse, rng)
        ctx.constants = dropout_p, is_causal, scale
        ctx.backend = backend
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout):
        need_dmask = ctx.needs_input_grad[3]
        dquery, dkey, dvalue, dmask = call(
            scaled_dot_product_attention_bwd,
            dout,
            *ctx.saved_tensors,
            *ctx.constants,
            need_dmask,
            ctx.backend,
        )
        return dquery, dkey, dvalue, dmask if need_dmask else None, None, None, None, None, None
