"""Rows of one weight for several products, the same tensors at every call: by them a kernel knows what it laid out."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_kept: WeakKeyDictionary[nn.Module, tuple[tuple, tuple[Tensor, ...]]] = WeakKeyDictionary()


def rows(owner: nn.Module, weight: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """``weight.split(sizes)``; where no gradient is needed, the views that ``owner`` got before.

    They share the storage and the version of ``weight``, so that a change of values shows in them; as long as they are
    kept, no other tensor can lie at their address.
    """
    needs_grad = torch.is_grad_enabled() and weight.requires_grad
    if needs_grad or type(weight) not in (Tensor, nn.Parameter) or not weight.is_cpu or _traced():
        return weight.split(sizes)
    key = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), weight.is_inference(), sizes)
    kept = _kept.get(owner)
    if kept is None or kept[0] != key:
        # Set as a whole: another thread may read it at any moment.
        kept = _kept[owner] = (key, weight.detach().split(sizes))
    return kept[1]


def rows_of(owner: nn.Module) -> list[Tensor]:
    """What is kept for ``owner``."""
    return list(_kept.get(owner, ((), ()))[1])


def forget(owner: nn.Module) -> None:
    _kept.pop(owner, None)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
