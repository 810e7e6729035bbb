"""Which backend runs an op: what ``optimize`` was told, else the context manager, the environment, ``auto``."""

import os
import threading
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _auto
from ._exporting import exporting
from ._registry import names, why_not

ENVIRONMENT = "PYTORCH_EXT_BACKEND"

# The names of the context managers that are open here, the innermost last.
_scoped: ContextVar[tuple[str, ...]] = ContextVar("pytorch_ext.backends.use", default=())
# Dynamo can neither trace a ContextVar nor guard on thread-local state, so a compiled function reads this: the name of
# the one opened last in the whole process, of all that are open.
_scoped_for_dynamo: str | None = None
_open: list[str] = []
_lock = threading.Lock()
_from_environment = os.environ.get(ENVIRONMENT) or "auto"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot be used; the message lists every reason."""


class use:
    """Context manager: ops inside run on the backend ``name``, or raise ``BackendError`` saying why they cannot.

    ``name`` is one of ``pytorch_ext.backends.names()`` or ``"auto"``. Inner ones win; each thread and each asyncio task
    has its own. A compiled function remembers the backend that it was compiled with and is compiled anew for another.
    """

    def __init__(self, name: str):
        self.name = checked(name, "name")

    def __enter__(self) -> "use":
        global _scoped_for_dynamo
        if torch.compiler.is_compiling():
            self._outer = _scoped_for_dynamo
            _scoped_for_dynamo = self.name
            return self
        _scoped.set((*_scoped.get(), self.name))
        with _lock:
            _open.append(self.name)
            _scoped_for_dynamo = self.name
        return self

    def __exit__(self, *exception) -> None:
        global _scoped_for_dynamo
        if torch.compiler.is_compiling():
            _scoped_for_dynamo = self._outer
            return
        _scoped.set(_scoped.get()[:-1])
        with _lock:
            # Threads may leave in another order than they entered: what counts is who is still inside.
            _open.reverse()
            _open.remove(self.name)
            _open.reverse()
            _scoped_for_dynamo = _open[-1] if _open else None


def checked(name: str, argument: str) -> str:
    """``name``, if it is a backend's or ``"auto"``; else a ``ValueError`` that names ``argument``."""
    if name != "auto" and name not in names():
        raise ValueError(f"{argument}: expected one of auto, {', '.join(names())}, got {name!r}")
    return name


def requested() -> str:
    """The backend asked for at this point of the program: a name or ``"auto"``.

    While a model is exported it is ``native``, whatever was asked for: a file of PyTorch's own ops runs everywhere.
    """
    if torch.compiler.is_compiling():
        return "native" if exporting() else _scoped_for_dynamo or _from_environment
    scoped = _scoped.get()
    return scoped[-1] if scoped else _from_environment


def choose(op: str, *tensors: Tensor | None) -> str:
    """The name of the backend that runs ``op`` on ``tensors``; the first one tells the device.

    Raises:
        BackendError: a backend was asked for by name and cannot run this.
    """
    name = requested()
    if name == "native" or (name == "auto" and not _auto.FASTEST):
        return "native"
    if name == "auto":
        name = _auto.fastest(op, tensors[0]) if tensors else "native"
        return name if name == "native" or not (_transformed() or why_not(name, op, *tensors)) else "native"
    checked(name, ENVIRONMENT)
    reasons = why_not(name, op, *tensors)
    if _transformed():
        reasons.append("functorch transforms and forward-mode AD need the backend native")
    if reasons:
        raise BackendError(f"{op}: backend {name!r} cannot be used: " + "; ".join(reasons))
    return name


def offered(op: str, *tensors: Tensor) -> str | None:
    """The backend that would run ``op``, of those that only some have; None where its parts have to be run instead."""
    name = requested()
    if name == "auto":
        name = _auto.fastest(op, tensors[0])
    return None if name == "native" or _transformed() or why_not(name, op, *tensors) else name


def _transformed() -> bool:
    """Our kernels have no rule for ``torch.func`` or for forward-mode AD, and would drop a tangent in silence."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
