"""What a model holds and what passes through it, as numbers: sizes of parts, and a histogram of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BINS = 60  # of large tensors; small ones have fewer, or most would be empty
MOST_PARTS = 20


@dataclass(frozen=True)
class Part:
    """A part of a model, which shares no parameter with another part.

    Attributes:
        name: of the module, or of a parameter that stands beside modules.
        kind: the class of the module.
        parameters, bytes: of all that lies in it.
    """

    name: str
    kind: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Values:
    """The values of one tensor.

    Attributes:
        low, high, mean, std: of the finite ones, NaN if there are none.
        wrong: how many are infinite or NaN.
        shares: of the finite ones in equal bins from ``low`` to ``high``; one share if all are equal.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    low: float
    high: float
    mean: float
    std: float
    wrong: int
    shares: list[float]


def values(name: str, t: Tensor) -> Values:
    """Integers and tensors without elements have no histogram."""
    facts = (name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.numel() * t.element_size())
    if not t.is_floating_point() or t.is_meta:
        return Values(*facts, *[torch.nan] * 4, 0, [])
    x = t.detach().cpu().to(torch.float64 if t.dtype == torch.float64 else torch.float32).flatten()
    finite = x.isfinite()
    wrong = x.numel() - int(finite.sum())
    x = x[finite] if wrong else x
    if not x.numel():
        return Values(*facts, *[torch.nan] * 4, wrong, [])
    low, high = (end.item() for end in x.aminmax())
    if high - low > torch.finfo(torch.float32).max:
        x = x.double()
    bins = min(BINS, max(8, math.isqrt(x.numel())))
    shares = [1.0] if low == high else (torch.histc(x, bins, low, high) / x.numel()).tolist()
    return Values(*facts, low, high, x.mean().item(), x.std(correction=0).item(), wrong, shares)


def weights(model: nn.Module) -> list[Values]:
    """Of each parameter, a shared one once."""
    return [values(name, parameter) for name, parameter in model.named_parameters()]


def by_kind(found: Iterable[Values], last: int) -> dict[str, list[Values]]:
    """The same tensors of all layers together, ``layer.*.query``; the ``last`` parts of a name stay as they are."""
    kinds: dict[str, list[Values]] = {}
    for one in found:
        path = one.name.split(".")
        kind = ".".join(["*" if part.isdigit() else part for part in path[:-last]] + path[-last:])
        kinds.setdefault(kind, []).append(one)
    return kinds


def parts(model: nn.Module, most: int = MOST_PARTS) -> list[Part]:
    """The model in at most ``most`` parts, the largest taken apart first; one layer of many stays whole."""
    parameters = dict(model.named_parameters())
    found = [""]
    while True:
        apart = {name: _children(name, parameters) for name in found if not name.split(".")[-1].isdigit()}
        fits = [
            name
            for name, children in apart.items()
            if children != [name] and len(found) - 1 + len(children) <= most
        ]
        if not fits:
            return [_part(model, name, parameters) for name in found]
        largest = max(fits, key=lambda name: _part(model, name, parameters).bytes)
        at = found.index(largest)
        found[at : at + 1] = apart[largest]


def _within(name: str, parameters: Iterable[str]) -> list[str]:
    return [p for p in parameters if not name or p == name or p.startswith(f"{name}.")]


def _children(name: str, parameters: Iterable[str]) -> list[str]:
    """The next names below a module; a module of parameters alone is not taken apart."""
    depth = name.count(".") + 1 if name else 0
    below = [p.split(".") for p in _within(name, parameters)]
    if all(len(path) <= depth + 1 for path in below):
        return [name]
    return list(dict.fromkeys(".".join(path[: depth + 1]) for path in below))


def _part(model: nn.Module, name: str, parameters: dict[str, nn.Parameter]) -> Part:
    own = [parameters[p] for p in _within(name, parameters)]
    kind = "" if name in parameters else type(model.get_submodule(name)).__name__
    return Part(name, kind, sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own))


def in_units(size: int) -> str:
    """Bytes, as people say them."""
    power = min(len(str(size)) - 1, 14) // 3
    amount, unit = size / 1000**power, ("bytes", "kB", "MB", "GB", "TB")[power]
    return f"{amount:,.1f} {unit}" if power and amount < 100 else f"{amount:,.0f} {unit}"
