"""Modules of ours in place of those that PyTorch's constructors make."""

from collections.abc import Iterable

from torch import nn


def adopt(modules: Iterable[nn.Module]) -> None:
    """Makes modules that nobody else has yet ours, where their class is exactly one of PyTorch's that we have."""
    from .. import nn as ours

    for module in modules:
        name = type(module).__name__
        if type(module) is getattr(nn, name, None):
            module.__class__ = getattr(ours, name, type(module))
