"""The example inputs of a model: which of their sizes are free, and the same inputs at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._errors import ExportError, first_line

OTHER_SIZES = " (the example's at other sizes; `dynamic` says which are free)"


@dataclass
class Inputs:
    """How a model is called.

    Attributes:
        args, kwargs: positional and by name.
        free: for each tensor among them, in order: dimension -> the name of its size.
        resized: whether these are the example's at other sizes.
        most: the largest size that was found to be right, by name, where there is one.
    """

    args: tuple
    kwargs: dict[str, Any]
    free: list[dict[int, str]]
    resized: bool = False
    most: dict[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return _tensors(self.args, self.kwargs)

    @property
    def shapes(self) -> str:
        return ", ".join(str(tuple(t.shape)) for t in self.tensors)

    @property
    def described(self) -> str:
        """Their shapes, for an error: with what to do where the sizes are ours and not the caller's."""
        return self.shapes + (OTHER_SIZES if self.resized else "")

    @property
    def sizes(self) -> dict[str, int]:
        """Of the free dimensions, by name."""
        pairs = zip(self.tensors, self.free, strict=True)
        return {name: t.shape[dim] for t, free in pairs for dim, name in free.items()}

    def with_sizes(self, sizes: Mapping[str, int]) -> Inputs:
        """With other sizes: rows are repeated, or left out."""
        free = iter(self.free)

        def resize(t: Tensor) -> Tensor:
            for dim, name in next(free).items():
                rows = torch.arange(sizes[name], device=t.device) % t.shape[dim]
                t = t.index_select(dim, rows)
            return t

        args, kwargs = pytree.tree_map_only(Tensor, resize, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.free, resized=True, most=self.most)

    def other(self) -> Inputs:
        """One sequence more and one token less, where these are free."""
        sizes = self.sizes
        grown = {
            name: size + 1 if name.startswith("batch") or size < 3 else size - 1
            for name, size in sizes.items()
        }
        grown = {name: min(size, self.most.get(name, size)) for name, size in grown.items()}
        return self.with_sizes(grown)

    def fix(self, name: str) -> None:
        """That size is not free after all."""
        for free in self.free:
            for dim in [dim for dim, known in free.items() if known == name]:
                del free[dim]

    def free_lengths(self) -> bool:
        """Where dimension 1 of three is fixed, as channels are, frees dimension 2: whether there is one."""
        names: dict[int, str] = {}
        for t, free in zip(self.tensors, self.free, strict=True):
            if t.dim() == 3 and t.is_floating_point() and 1 not in free:
                size = t.shape[2]
                free[2] = names.setdefault(size, f"length_{len(names)}" if names else "length")
        return bool(names)


def inputs_of(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    dynamic: bool | Mapping[str, Mapping[int, str]],
) -> Inputs:
    """The inputs of a call.

    Raises:
        ExportError: arguments that ``forward`` does not take, no tensor, or a ``dynamic`` that does not fit them.
    """
    args = args if isinstance(args, tuple) else (args,)
    kwargs = dict(kwargs or {})
    tensors = _tensors(args, kwargs)
    if not tensors:
        raise ExportError("args: expected example inputs with at least one tensor, got none")
    if any(t.numel() == 0 for t in tensors):
        raise ExportError("args: expected example inputs with elements, got an empty tensor")
    try:
        arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ExportError(
            f"args: they do not fit {type(model).__name__}.forward: {first_line(error)}"
        ) from None
    if isinstance(dynamic, Mapping):
        free = _named(dynamic, arguments | kwargs, tensors)
    else:
        free = _usual(tensors) if dynamic else [{} for _ in tensors]
    return Inputs(args, kwargs, free)


def _named(
    dynamic: Mapping[str, Mapping[int, str]], arguments: Mapping[str, Any], tensors: list[Tensor]
) -> list[dict[int, str]]:
    found: dict[int, dict[int, str]] = {}
    for name, free in dynamic.items():
        tensor = arguments.get(name)
        if not isinstance(tensor, Tensor):
            expected = ", ".join(n for n, value in arguments.items() if isinstance(value, Tensor))
            raise ExportError(
                f"dynamic: expected names of tensors among the arguments ({expected}), got {name!r}"
            )
        wrong = [dim for dim in free or {} if not 0 <= dim < tensor.dim()]
        if wrong:
            raise ExportError(f"dynamic: expected dimensions of {name} below {tensor.dim()}, got {wrong[0]}")
        found[id(tensor)] = dict(free or {})
    free = [found.get(id(t), {}) for t in tensors]
    sizes: dict[str, int] = {}
    for t, names in zip(tensors, free, strict=True):
        for dim, name in names.items():
            if sizes.setdefault(name, t.shape[dim]) != t.shape[dim]:
                raise ExportError(
                    f"dynamic: {name!r} is {sizes[name]} and {t.shape[dim]} in the example inputs"
                )
    return free


def _usual(tensors: list[Tensor]) -> list[dict[int, str]]:
    """Batch first, then, unless these are images, the length; equal sizes have one name."""
    names: dict[tuple[str, int], str] = {}
    lengths = {t.shape[1] for t in tensors if t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())}

    def name(role: str, size: int) -> str:
        earlier = sum(known == role for known, _ in names)
        return names.setdefault((role, size), f"{role}_{earlier + 1}" if earlier else role)

    def free(t: Tensor) -> dict[int, str]:
        # Two dimensions of floats are features, unless something else has this length, as beside a mask.
        with_length = t.dim() in (2, 3) and t.shape[1] in lengths
        roles = ("batch", "sequence") if with_length else ("batch",)[: t.dim()]
        return {dim: name(role, t.shape[dim]) for dim, role in enumerate(roles)}

    return [free(t) for t in tensors]


def _tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
