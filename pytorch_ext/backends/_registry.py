"""Finds the backends and asks them what they can do."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from ._requirements import fact

# How they are listed: from the specification to the fastest hardware. Others follow, in alphabetical order.
_ORDER = ("reference", "native", "cpu", "triton", "cuda")


def _found() -> dict[str, ModuleType]:
    infos = pkgutil.iter_modules(importlib.import_module(__package__).__path__)
    found = [info.name for info in infos if not info.name.startswith("_")]
    found.sort(key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    return {name: importlib.import_module(f"{__package__}.{name}") for name in found}


# Found at import, which costs little, because torch.compile cannot trace a search for modules.
_BACKENDS = _found()
_NAMES = tuple(_BACKENDS)


def names() -> tuple[str, ...]:
    """Every backend this version knows, whether or not it can run here."""
    return _NAMES


def backend(name: str) -> ModuleType:
    return _BACKENDS[name]


@functools.cache
def kernel(name: str, kernel_name: str) -> Callable:
    """The callable behind ``kernel_name`` (``"layer_norm_fwd"``, say) in the backend ``name``."""
    return backend(name).kernels()[kernel_name]


@functools.cache
def differentiable(name: str, op: str) -> Callable | None:
    """What runs ``op`` in the backend ``name`` and differentiates it without Python's help; None if nothing does."""
    return backend(name).kernels().get(f"{op}_grad")


@functools.cache
def direct_function(name: str, op: str) -> Callable | None:
    """What does all of ``op`` in the backend ``name``, or returns None for a call that it leaves to the wrapper."""
    found = _BACKENDS.get(name)
    return found.direct_function(op) if hasattr(found, "direct_function") else None


@functools.cache
def ops() -> tuple[str, ...]:
    """Every op that there is: ``native`` can run them all."""
    return tuple(sorted(backend("native").kernels()))


def why_not(name: str, op: str, *tensors: Tensor | None) -> list[str]:
    """Why the backend ``name`` cannot run ``op`` on ``tensors``: sentences, none if it can."""
    reasons = backend(name).why_not(op, *[t for t in tensors if t is not None])
    if not reasons and not _has_kernel(name, op):
        reasons = [f"this version has no kernel for {op} in this backend"]
    return reasons


@fact
def _has_kernel(name: str, op: str) -> bool:
    return (op if name == "native" else f"{op}_fwd") in backend(name).kernels()


def drop_layouts(weights: list[Tensor]) -> None:
    """Lets every backend that lays weights out for inference forget what it made of these."""
    for found in _BACKENDS.values():
        if hasattr(found, "drop_layouts"):
            found.drop_layouts(weights)


def layout_bytes(weights: list[Tensor]) -> int:
    """The size of what the backends have laid out for these weights, in bytes."""
    return sum(b.layout_bytes(weights) for b in _BACKENDS.values() if hasattr(b, "layout_bytes"))


def available() -> list[str]:
    """The backends that can run at least one op here, with tensors on their own kind of device."""
    return [name for name in names() if any(not why_not(name, op) for op in ops())]


def explain(op: str, *tensors: Tensor | None) -> str:
    """Which backend ``op`` would run on ``tensors`` now, and of each of the others why or why not.

    Example::

        print(pytorch_ext.backends.explain("layer_norm", x))
    """
    from ._choice import BackendError, choose, requested

    if op not in ops():
        raise ValueError(f"op: expected one of {', '.join(ops())}, got {op!r}")
    try:
        head = f"{op}: {choose(op, *tensors)} (asked for: {requested()})"
    except BackendError as error:
        head = str(error)
    lines = [f"  {name}: {'; '.join(why_not(name, op, *tensors)) or 'can run this'}" for name in names()]
    return "\n".join([head, *lines])
