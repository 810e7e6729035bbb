"""The short way through an op: all of it in one compiled call, where nothing about the call is unusual."""

from typing import Any

import torch
from torch import Tensor

from ..backends._auto import fastest
from ..backends._choice import requested
from ..backends._registry import direct_function

EXACTLY = frozenset((Tensor, torch.nn.Parameter))


def direct(op: str, first: object, *rest: Any) -> Any:
    """What the wrapper of ``op`` returns for these arguments, whose checks, choice and node are its own; or None.

    None where the backend that would run ``op`` on ``first`` has no such way, and where it does not take this call:
    something is wrong with it, or has to be cast, or somebody looks on. The wrapper then finds out what it is.
    """
    if torch.compiler.is_compiling() or type(first) not in EXACTLY:
        return None
    backend = requested()
    if backend == "auto":
        backend = fastest(op, first)
    function = direct_function(backend, op)
    return None if function is None else function(first, *rest)
