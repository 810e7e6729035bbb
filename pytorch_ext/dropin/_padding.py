"""When padding is removed, and the batch without it: as ``optimize`` was told."""

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..nn import _padding
from ..nn._padding import Packed, attention_mask, flattened, last_forward, note, same_sequence
from ._swap import Options

__all__ = [
    "Packed",
    "attention_mask",
    "flattened",
    "last_forward",
    "note",
    "pack",
    "pack_once",
    "same_sequence",
]


def pack(
    encoder: nn.Module, x: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Packed | None, Tensor | None]:
    """See :func:`pytorch_ext.nn._padding.pack`."""
    return _padding.pack(encoder, x, mask, options.remove_padding, options.kept_because)


# What became of a mask, as long as the mask is there.
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def pack_once(
    layer: nn.Module, x: Tensor, mask: Tensor | None, options: Options, *, first: bool
) -> tuple[Packed | None, Tensor | None]:
    """For a layer that removes padding for itself: where the tokens are, or None and the mask of dense attention.

    The layers of one forward are handed one mask. The first of them looks at it, the others find what it found.
    """
    if mask is None or torch.compiler.is_compiling():
        return pack(layer, x, mask, options)[1:]
    # The first layer may have been taken out, and the mask edited since the last forward.
    version = None if mask.is_inference() else mask._version
    known = None if first else _found.get(mask)
    if known is None or known[0] != version:
        # Of an alias: what is found must not keep the mask, by which it is found, alive.
        known = _found[mask] = (version, pack(layer, x, mask.detach(), options)[1:])
    return known[1]
