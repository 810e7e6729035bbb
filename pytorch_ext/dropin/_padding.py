"""When padding is removed, and the batch without it: as ``optimize`` was told."""

import weakref

import torch
from torch import Tensor, nn

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


# By the id of a mask: the mask, what became of it, and nothing that keeps it alive.
_packed: dict[int, tuple[weakref.ref, Packed | None, Tensor | None]] = {}


def pack_once(
    layer: nn.Module, x: Tensor, mask: Tensor | None, options: Options, *, first: bool
) -> tuple[Packed | None, Tensor | None]:
    """For a layer that removes padding for itself: where the tokens are, or None and the mask of dense attention.

    The layers of one forward are handed one mask. The first of them looks at it, the others find what it found.
    """
    known = None if first or mask is None else _packed.get(id(mask))
    if known is not None and known[0]() is mask:
        return known[1:]
    _, packed, dense_mask = pack(layer, x, mask, options)
    if mask is not None and not torch.compiler.is_compiling():
        key = id(mask)
        _packed[key] = (weakref.ref(mask, lambda gone: _forget(key, gone)), packed, dense_mask)
    return packed, dense_mask


def _forget(key: int, gone: weakref.ref) -> None:
    if key in _packed and _packed[key][0] is gone:
        del _packed[key]
