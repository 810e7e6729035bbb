"""When padding is removed, and the batch without it."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends import exporting
from ..ops import pad_input
from ..ops._raw import is_distributed
from ..ops.padding import gathered

# What happened in an encoder's last eager forward, for those who ask.
_last: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass
class Packed:
    """Where the real tokens of a padded batch are.

    Attributes:
        mask: bool ``(batch, seqlen)``, True at real tokens; None if the batch came as one row without padding.
        indices: int64 ``(total_tokens,)``, their rows in the flattened batch; None beside such a ``mask``.
        cu_seqlens: int32 ``(batch + 1,)``.
        max_seqlen: at least the longest length.
        lengths: what ``cu_seqlens`` says, on the host; None where a compiler traces.
    """

    mask: Tensor | None
    indices: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: list[int] | None = None
    _gapless: bool | None = None

    def unpad(self, x: Tensor) -> Tensor:
        return x[0] if self.mask is None else x.flatten(0, 1).index_select(0, self.indices)

    def pad(self, tokens: Tensor) -> Tensor:
        if self.mask is None:
            return tokens[None]
        batch, seqlen = self.mask.shape
        return pad_input(tokens, self.indices, batch, seqlen)

    def gapless(self) -> bool:
        """Whether the tokens of each sequence stand side by side, so that their distances are what they were."""
        if self.mask is None or self.lengths is None:
            return self.mask is None
        # Positions of the first and the last token of each sequence that has some; known after one look.
        if self._gapless is None:
            ends = self.cu_seqlens.long()
            some = ends[1:] > ends[:-1]
            spans = self.indices[ends[1:][some] - 1] - self.indices[ends[:-1][some]] + 1
            self._gapless = torch.equal(spans, ends.diff()[some])
        return self._gapless

    def attended(self, total: int) -> Tensor:
        """The mask for dense attention over the padded batch, or over the ``total`` tokens of a single row."""
        if self.mask is None:
            return same_sequence(self.cu_seqlens, total)
        return attention_mask(self.mask)


def pack(
    encoder: nn.Module,
    x: Tensor,
    mask: Tensor | None,
    remove_padding: bool | str = "auto",
    kept_because: str = "",
) -> tuple[Tensor, Packed | None, Tensor | None]:
    """What an encoder runs on: the tokens of ``x`` (batch, seqlen, hidden) without padding and where they were.

    Or, to run dense, ``x`` itself, None, and the mask that dense attention takes, if it needs one. One host read. Under
    a compiler there is none, and a batch with a 2-D mask is always packed.

    Args:
        remove_padding: as ``optimize`` takes it.
        kept_because: the reason, if it is False.
    """
    reason = _dense_reason(x, mask, remove_padding, kept_because)
    if reason is not None:
        note(encoder, f"dense: {reason}")
        return x, None, attention_mask(mask)
    real = mask if mask.dtype == torch.bool else mask != 0
    seqlens = real.sum(1, dtype=torch.int32)
    lengths, total, max_seqlen = None, None, x.shape[1]
    if not torch.compiler.is_compiling():
        lengths, first = torch.stack((seqlens, real[:, 0].int())).tolist()
        total, max_seqlen = sum(lengths), max(lengths, default=0)
        if total == real.numel():
            note(encoder, "dense: the batch has no padding")
            return x, None, None
        if remove_padding == "auto" and not all(first):
            sequence = first.index(0)
            note(
                encoder, f"dense: position 0 of sequence {sequence} is padding, and heads may read position 0"
            )
            return x, None, attention_mask(real)
        note(encoder, f"without padding: {total} of {real.numel()} positions were real tokens")
    tokens, indices, cu_seqlens, max_seqlen = gathered(x, real, seqlens, total, max_seqlen)
    return tokens, Packed(real, indices, cu_seqlens, max_seqlen, lengths), None


def flattened(x: Tensor, mask: Tensor | None, kwargs: dict) -> Packed | None:
    """Where the sequences are in a batch ``(1, total_tokens, hidden)`` that came without padding, if it did.

    Hugging Face says so by ``cu_seq_lens_q`` and ``max_length_q`` among the arguments of a call without a mask.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None or mask is not None or x.dim() != 3 or x.shape[0] != 1:
        return None
    lengths, longest = None, kwargs.get("max_length_q")
    if not torch.compiler.is_compiling():
        lengths = cu_seqlens.diff().tolist()
        longest = max(lengths, default=0)
    elif not isinstance(longest, int):
        longest = x.shape[1]
    return Packed(None, None, cu_seqlens.to(torch.int32), longest, lengths)


def same_sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    """Which of ``total`` tokens laid end to end lie in one sequence: bool ``(1, 1, total, total)``."""
    at = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.bucketize(at, cu_seqlens, right=True)
    return (sequence[:, None] == sequence)[None, None]


def last_forward(encoder: nn.Module) -> str | None:
    """What happened to padding in the last eager forward of ``encoder``, in words."""
    return _last.get(encoder)


def attention_mask(mask: Tensor | None) -> Tensor | None:
    """The mask that dense attention takes: a 2-D one as bool ``(batch, 1, 1, seqlen)``, others as they are."""
    if mask is None or mask.dim() != 2:
        return mask
    return (mask if mask.dtype == torch.bool else mask != 0)[:, None, None, :]


def _dense_reason(
    x: Tensor, mask: Tensor | None, remove_padding: bool | str, kept_because: str
) -> str | None:
    if exporting():
        return "the model is being exported"
    if remove_padding is False:
        return kept_because
    if mask is None:
        return "no mask was given"
    if mask.dim() != 2:
        return f"the mask has {mask.dim()} dimensions, which says more than where padding is"
    if mask.shape != x.shape[:2]:
        return f"the mask is {tuple(mask.shape)} and the batch {tuple(x.shape[:2])}"
    if torch.compiler.is_compiling():
        return None
    if is_distributed(x):
        return "the batch is shared out over devices already"
    return "torch.func.vmap maps over the mask" if _mapped(mask) else None


def _mapped(t: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def note(encoder: nn.Module, what: str) -> None:
    if not torch.compiler.is_compiling():
        _last[encoder] = what


def add_note(encoder: nn.Module, what: str) -> None:
    _last[encoder] = f"{_last[encoder]}; {what}"
