"""Weights laid out for inference: copies in a side table, dropped when the weights they were made from have changed.

They live in no module, so that ``state_dict``, ``deepcopy`` and ``pickle`` never see them. Fused optimisers, edits
through ``.data`` and FSDP change values without moving ``_version``, so a sample of the values is compared each time.
An edit of single elements can pass between the samples: ``pytorch_ext.refresh(model)`` drops everything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backends import drop_layouts, layout_bytes
from ..nn import _graphs, _rows

SAMPLES = 64


@dataclass
class _Source:
    """One weight as it was when the layout was made."""

    key: tuple
    samples: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "_Source":
        return cls(_key(weight), _samples(weight).clone())

    def matches(self, weight: Tensor) -> bool:
        return self.key == _key(weight) and torch.equal(self.samples, _samples(weight))


@dataclass
class _Layout:
    sources: list[_Source]
    tensors: tuple[Tensor, ...]


_layouts: WeakKeyDictionary[nn.Module, dict[str, _Layout]] = WeakKeyDictionary()


def laid_out(
    owner: nn.Module, name: str, weights: tuple[Tensor, ...], make: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``make(*weights)``, remembered for ``owner`` until a weight changes. Call it where no gradient is needed."""
    # Held here, because another thread may drop it at any moment.
    layouts = _layouts.setdefault(owner, {})
    known = layouts.get(name)
    if known is not None and all(map(_Source.matches, known.sources, weights)):
        return known.tensors
    with torch.no_grad():
        # The sources first: a weight that changes while it is copied then looks changed, not current.
        layout = _Layout([_Source.of(w) for w in weights], make(*weights))
    layouts[name] = layout
    return layout.tensors


def can_lay_out(*weights: Tensor) -> bool:
    """On the CPU only: elsewhere comparing a sample would wait for the device. Ordinary tensors only.

    Within ``torch.func`` and forward-mode AD none are: they have no storage to look at, or are worth nothing outside.
    """
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return all(w.is_cpu and type(w) in (Tensor, nn.Parameter) for w in weights)


def drop(model: nn.Module) -> None:
    drop_layouts([*model.parameters(), *_made_for(model), *_parts_of(model)])
    for module in model.modules():
        _layouts.pop(module, None)
        _rows.forget(module)
        _graphs.forget(module)


def size_in_bytes(model: nn.Module) -> int:
    """Of those made here, and of those that the kernels have made of them or of the model's own weights."""
    made = _made_for(model)
    return sum(t.nbytes for t in made) + layout_bytes([*model.parameters(), *made, *_parts_of(model)])


def _made_for(model: nn.Module) -> list[Tensor]:
    return [t for m in model.modules() for layout in _layouts.get(m, {}).values() for t in layout.tensors]


def _parts_of(model: nn.Module) -> list[Tensor]:
    """Views of its weights, which take no memory until a kernel has laid them out."""
    return [view for module in model.modules() for view in _rows.rows_of(module)]


def _key(weight: Tensor) -> tuple:
    version = None if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), version


def _samples(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten() if weight.is_contiguous() else weight.detach().reshape(-1)
    # An odd step walks through the columns as well as the rows.
    return flat[:: max(flat.numel() // SAMPLES, 1) | 1]
