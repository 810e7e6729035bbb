"""Who may attend whom: the masks of PyTorch's Transformer modules, worked out once for all layers.

Shapes: N batch, H heads, D head_dim, L queries, S keys, T real tokens of a batch without its padding.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ._padding import Packed


@dataclass
class Attendance:
    """What a layer needs to know of masks and layout.

    Attributes:
        attn_mask, key_padding_mask, is_causal: as PyTorch's attention takes them, for modules called as they are.
        fits: whether the masks have the shapes that attention takes; if not, PyTorch's own module has to say so.
        mask: both masks as SDPA takes them, broadcastable to (N, H, L, S), or without a batch to (H, L, S): bool, True
            where a query may attend, or added to the scores.
        causal: query i attends keys 0 to i, in place of a mask.
        seq_first: activations are (L, N, E), not (N, L, E).
        turned: activations are (N, L, E) where the caller's are (L, N, E).
        packed: activations are (T, E), without the padding.
    """

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool
    fits: bool
    mask: Tensor | None
    causal: bool
    seq_first: bool
    turned: bool = False
    packed: Packed | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        """(*, H, D) as the activations lie -> (*, H · D)."""
        if self.packed is not None:
            cu_seqlens, longest = self.packed.cu_seqlens, self.packed.max_seqlen
            out = ops.varlen_attention(
                *(query, key, value, cu_seqlens, cu_seqlens, longest, longest),
                dropout_p=dropout_p,
                is_causal=self.causal,
            )
            return out.flatten(-2)
        q, k, v = (self.by_head(t) for t in (query, key, value))
        out = ops.scaled_dot_product_attention(q, k, v, self.mask, dropout_p, self.causal)
        return self.by_token(out)

    def by_head(self, x: Tensor) -> Tensor:
        """(*, H, D) as the activations lie -> (N, H, L, D), without a batch (H, L, D)."""
        return x.permute(1, 2, 0, 3) if self.seq_first and x.dim() == 4 else x.transpose(-2, -3)

    def by_token(self, x: Tensor) -> Tensor:
        """(N, H, L, D) -> (*, H · D) as the activations lie."""
        if self.seq_first and x.dim() == 4:
            return x.permute(2, 0, 1, 3).flatten(-2)
        return x.transpose(-2, -3).flatten(-2)

    def shown(self, x: Tensor) -> Tensor:
        """Activations as the caller's modules expect them: with padding, in the caller's layout."""
        if self.packed is not None:
            x = self.packed.pad(x)
        return x.transpose(0, 1) if self.turned else x

    def taken(self, x: Tensor) -> Tensor:
        """The other way."""
        if self.turned:
            x = x.transpose(0, 1)
        return x if self.packed is None else self.packed.unpad(x)

    def for_modules(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, bool]:
        """``attn_mask``, ``key_padding_mask`` and ``is_causal`` for a module, which may know float masks alone."""
        return additive(self.attn_mask, dtype), additive(self.key_padding_mask, dtype), self.is_causal

    @property
    def needs_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.attn_mask, self.key_padding_mask))


def attendance(
    query: Tensor,
    key: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    *,
    batch_first: bool,
    need_weights: bool = False,
) -> Attendance:
    """For dense attention of ``query`` (N, L, E) to ``key`` (N, S, E), both seq-first, or both without a batch.

    Args:
        attn_mask: (L, S) or (N · H, L, S): bool, True where a query may *not* attend, or added to the scores.
        key_padding_mask: (N, S), without a batch (S,): bool, True at padding, or added to the scores.
        is_causal: ``attn_mask`` is the causal mask.
        need_weights: they are asked for, so that the mask itself has to be there.
    """
    given = attn_mask, key_padding_mask, is_causal
    seq_first = not batch_first and query.dim() == 3
    causal = is_causal and key_padding_mask is None and not need_weights
    if causal:
        attn_mask = None
    fits = _fits(query, key, heads, attn_mask, key_padding_mask, seq_first)
    mask = _merged(attn_mask, key_padding_mask, heads, query.dtype, query.dim() == 3) if fits else None
    return Attendance(*given, fits, mask, causal, seq_first)


def check_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool | None, names: tuple[str, str]
) -> None:
    """What PyTorch asks of masks by these names: bool or floating, and one beside ``is_causal``. It warns of two kinds.

    Raises:
        AssertionError: a mask is neither bool nor floating.
        RuntimeError: ``is_causal`` without ``attn_mask``.
    """
    for name, mask in zip(reversed(names), (key_padding_mask, attn_mask), strict=True):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    if attn_mask is None and is_causal:
        raise RuntimeError(
            f"Need attn_mask if specifying the is_causal hint: {names[0]}: expected a causal mask beside"
            " is_causal=True, got None"
        )
    if attn_mask is None or key_padding_mask is None or torch.compiler.is_compiling():
        return
    if key_padding_mask.dtype != attn_mask.dtype:
        message = f"Support for mismatched {names[1]} and {names[0]} is deprecated."
        warnings.warn(f"{message} Use same type for both instead.", stacklevel=3)


def is_causal_mask(mask: Tensor | None, length: int) -> bool:
    """Whether ``mask`` (L, S) hides just what lies ahead; where values cannot be looked at, False."""
    if mask is None or mask.shape != (length, length):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    ahead = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype != torch.bool:
        ahead = torch.zeros_like(mask).masked_fill_(ahead, -torch.inf)
    return bool((mask == ahead).all())


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as PyTorch's layers hand it down: added to the scores, -inf where a bool one is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _fits(query, key, heads, attn_mask, key_padding_mask, seq_first) -> bool:
    if query.dim() not in (2, 3) or key.dim() != query.dim():
        return False
    batched = query.dim() == 3
    at = 0 if seq_first or not batched else 1
    q_len, k_len, batch = query.shape[at], key.shape[at], query.shape[1 - at] if batched else 1
    if batched and key.shape[1 - at] != batch:
        return False
    if attn_mask is not None and attn_mask.shape not in ((q_len, k_len), (batch * heads, q_len, k_len)):
        return False
    return key_padding_mask is None or key_padding_mask.shape == ((batch, k_len) if batched else (k_len,))


def _merged(attn_mask, key_padding_mask, heads: int, dtype: torch.dtype, batched: bool) -> Tensor | None:
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3 and batched
        masks.append(attn_mask.unflatten(0, (-1, heads)) if per_head else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[..., None, None, :])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    masks = [additive(mask, dtype) for mask in masks]
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]
