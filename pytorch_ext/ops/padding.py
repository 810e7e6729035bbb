"""Taking the padding out of a batch, and putting it back.

Rows are moved by PyTorch's own index ops, which are differentiable and do nothing else, whatever the backend.
"""

import torch
from torch import Tensor

from . import _checks as check


def unpad_input(x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The real tokens of a padded batch, laid end to end; the names are flash-attn's.

    Args:
        x: ``(batch, seqlen, *)``.
        attention_mask: ``(batch, seqlen)``, bool or a number, True or non-zero at real tokens, wherever they are.

    Returns:
        ``(tokens, indices, cu_seqlens, max_seqlen)``: tokens ``(total_tokens, *)``; indices int64 ``(total_tokens,)``,
        the row of each token in the flattened ``(batch * seqlen, *)``; cu_seqlens int32 ``(batch + 1,)``; max_seqlen
        the longest length. One value is read from the device; under ``torch.compile`` none is, and max_seqlen is
        ``seqlen``.

    Raises:
        RuntimeError: a mask of another shape or on another device.
    """
    check.tensor("x", x)
    check.tensor("attention_mask", attention_mask)
    check.same_device("x", x, "attention_mask", attention_mask)
    if x.dim() < 2:
        raise RuntimeError(
            f"x: expected at least 2 dimensions (batch, seqlen, *), got shape {tuple(x.shape)}"
        )
    check.shape("attention_mask", attention_mask, x.shape[:2])
    real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    seqlens = real.sum(1, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return gathered(x, real, seqlens, None, x.shape[1])
    lengths = seqlens.tolist()
    return gathered(x, real, seqlens, sum(lengths), max(lengths, default=0))


def gathered(
    x: Tensor, real: Tensor, seqlens: Tensor, total: int | None, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``unpad_input`` for a bool mask whose row sums, and unless a compiler traces their total, are known."""
    rows = real.flatten()
    # With the number of rows known nothing has to be read back from the device.
    found = rows.nonzero() if total is None else torch.nonzero_static(rows, size=total)
    indices = found.flatten()
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, max_seqlen


def pad_input(tokens: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """``(batch, seqlen, *)`` with ``tokens[i]`` at the flattened row ``indices[i]`` and zeros elsewhere.

    Args:
        tokens: ``(total_tokens, *)``.
        indices: int64 ``(total_tokens,)``, from :func:`unpad_input`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.
        IndexError: an index outside the batch (looked for on the CPU alone).
    """
    check.tensor("tokens", tokens)
    check.tensor("indices", indices)
    if tokens.dim() == 0:
        raise RuntimeError("tokens: expected at least one dimension, got a scalar")
    check.same_device("tokens", tokens, "indices", indices)
    if indices.dtype != torch.int64 or indices.shape != tokens.shape[:1]:
        expected, found = (
            f"torch.int64 of shape {tuple(tokens.shape[:1])}",
            f"{indices.dtype} of {tuple(indices.shape)}",
        )
        raise RuntimeError(f"indices: expected {expected}, got {found}")
    if check.readable(indices) and indices.numel():
        least, greatest = (int(t) for t in indices.aminmax())
        if least < 0 or greatest >= batch * seqlen:
            wrong = least if least < 0 else greatest
            raise IndexError(f"indices: expected rows from 0 to {batch * seqlen - 1}, got {wrong}")
    rows = tokens.new_zeros(batch * seqlen, *tokens.shape[1:])
    rows = rows.index_copy(0, indices, tokens)
    # The rows go to nobody else. As a view of them the result would make FSDP warn of ops in place on it.
    return torch.ops.aten._unsafe_view.default(rows, (batch, seqlen, *tokens.shape[1:]))
