"""When padding is removed, and the batch without it: as ``optimize`` was told."""

from torch import Tensor, nn

from ..nn import _padding
from ..nn._padding import Packed, attention_mask, flattened, last_forward, note, same_sequence
from ._swap import Options

__all__ = ["Packed", "attention_mask", "flattened", "last_forward", "note", "pack", "same_sequence"]


def pack(
    encoder: nn.Module, x: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Packed | None, Tensor | None]:
    """See :func:`pytorch_ext.nn._padding.pack`."""
    return _padding.pack(encoder, x, mask, options.remove_padding, options.kept_because)
