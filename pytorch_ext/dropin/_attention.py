"""Attention of a layer, over a padded batch or over tokens without padding, and what varlen attention alone cannot do.

A bias per pair of positions (MPNet's) or a window (ModernBERT's) is applied sequence by sequence on the CPU, where a
call costs microseconds and the work is what the real tokens need; elsewhere the rows are padded for the time of the
attention alone. All else in the layer stays without padding either way.
"""

import torch
from torch import Tensor

from .. import ops
from ._padding import Packed

TILE = 256  # queries that are attended at once where a window is narrower than the sequence


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    packed: Packed | None,
    dropout_p: float = 0.0,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Self-attention of ``q``, ``k``, ``v`` ``(*, heads, head_dim)`` -> ``(*, heads * head_dim)``.

    Args:
        mask: for a padded batch, bool or added as dense attention takes it; None with ``packed``.
        packed: where the tokens are, if they come without padding, ``(total_tokens, heads, head_dim)``.
        causal: a query attends no key after it.
        bias: ``(1, heads, seqlen, seqlen)``, added to the scores of a sequence's first positions.
        window: a query attends keys at most so far away.
    """
    if packed is None:
        seqlen = q.shape[-3]
        narrow = window is not None and seqlen > window + 1
        if narrow and mask is None and bias is None and q.is_cpu and not torch.compiler.is_compiling():
            # As many sequences of one length: what lies outside the windows is not computed.
            tokens = (t.flatten(0, 1) for t in (q, k, v))
            context = _one_by_one(*tokens, [seqlen] * q.shape[0], dropout_p, scale, None, window)
            return context.unflatten(0, q.shape[:2])
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        near = band(seqlen, seqlen, 0, window, q.device) if narrow else None
        ordered = causal and mask is not None
        before = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).tril() if ordered else None
        for limit in (near, before):
            if limit is not None:
                mask = limit if mask is None else limited(mask, limit)
        if bias is not None:
            mask = biased(bias, mask)
        causal = causal and mask is None
        context = ops.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale)
        return context.transpose(-2, -3).flatten(-2)
    if bias is None and (window is None or _all_within(window, packed)):
        cu_seqlens, longest = packed.cu_seqlens, packed.max_seqlen
        context = ops.varlen_attention(
            *(q, k, v, cu_seqlens, cu_seqlens, longest, longest),
            dropout_p=dropout_p,
            is_causal=causal,
            scale=scale,
        )
        return context.flatten(-2)
    if causal:
        raise ValueError("causal: expected False beside a bias or a window, got True")
    # Tokens that stood apart have other distances than their places say.
    if q.is_cpu and packed.lengths is not None and packed.gapless():
        return _one_by_one(q, k, v, packed.lengths, dropout_p, scale, bias, window)
    return _within_padding(q, k, v, packed, dropout_p, scale, bias, window)


def _all_within(window: int, packed: Packed) -> bool:
    """Whether no two tokens of a sequence are further apart than the window."""
    span = packed.max_seqlen if packed.mask is None else packed.mask.shape[1]
    return span <= window + 1 or (packed.max_seqlen <= window + 1 and packed.gapless())


def biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias of the scores and a mask, bool or added, as one added mask."""
    if mask is None:
        return bias
    # The lowest number and not -inf: a row that may attend nothing would have NaN for the gradient of its bias.
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def limited(mask: Tensor, allowed: Tensor) -> Tensor:
    """``mask``, bool or added, where ``allowed`` is True; nothing may be attended elsewhere."""
    return mask & allowed if mask.dtype == torch.bool else biased(mask, allowed)


def band(queries: int, keys: int, first: int, window: int, device: torch.device) -> Tensor:
    """Which of ``keys`` keys a query may attend, if query 0 stands at key ``first``: bool ``(queries, keys)``."""
    at = torch.arange(first, first + queries, device=device)[:, None]
    return (at - torch.arange(keys, device=device)).abs() <= window


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    dropout_p: float,
    scale: float | None,
    bias: Tensor | None,
    window: int | None,
) -> Tensor:
    parts = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        length = q1.shape[0]
        narrow = window is not None and length > window + 1
        for start in range(0, length, TILE if narrow else max(length, 1)):
            end = min(start + TILE, length) if narrow else length
            low, high = (max(start - window, 0), min(end + window, length)) if narrow else (0, length)
            mask = bias
            if bias is not None:
                mask = bias[..., start:end, low:high]
            if narrow:
                near = band(end - start, high - low, start - low, window, q.device)
                mask = near if mask is None else limited(mask, near)
            # Of one sequence: (1, heads, length, head_dim).
            tile = (t.transpose(0, 1)[None] for t in (q1[start:end], k1[low:high], v1[low:high]))
            context = ops.scaled_dot_product_attention(*tile, mask, dropout_p, scale=scale)
            parts.append(context[0].transpose(0, 1).flatten(-2))
    return torch.cat(parts) if parts else q.flatten(-2)


def _within_padding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    dropout_p: float,
    scale: float | None,
    bias: Tensor | None,
    window: int | None,
) -> Tensor:
    padded = [packed.pad(t).transpose(1, 2) for t in (q, k, v)]
    seqlen = padded[0].shape[2]
    mask = packed.attended(q.shape[0])
    if window is not None:
        mask = mask & band(seqlen, seqlen, 0, window, q.device)
    if bias is not None:
        mask = biased(bias[..., :seqlen, :seqlen], mask)
    context = ops.scaled_dot_product_attention(*padded, mask, dropout_p, scale=scale)
    return packed.unpad(context.transpose(1, 2)).flatten(-2)
