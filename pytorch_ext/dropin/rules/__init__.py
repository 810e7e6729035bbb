"""What is replaced by what: one short file of data per model family, each with a list ``RULES``."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from torch import nn

from .._swap import Rule


@functools.cache
def _families() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


@functools.cache
def _by_target() -> dict[str, Rule]:
    return {rule.target: rule for family in _families() for rule in family.RULES}


@functools.cache
def _weigh_positions() -> dict[str, Callable[[nn.Module], bool]]:
    """By the class of a head: whether one of it weighs all positions against each other, padded ones too."""
    always = {
        name: lambda head: True for family in _families() for name in getattr(family, "WEIGH_POSITIONS", ())
    }
    return {
        n: c for family in _families() for n, c in getattr(family, "WEIGH_POSITIONS_IF", {}).items()
    } | always


def rule_for(module: nn.Module) -> Rule | None:
    """The rule whose target is exactly the class of ``module``: a subclass may do anything, so it is left alone."""
    return _by_target().get(_path(type(module)))


def padding_kept_below(model: nn.Module) -> dict[int, str]:
    """By the id of a module within ``model``: why ``remove_padding="auto"`` has to keep the padding there."""
    return {
        id(module): f"{type(head).__name__} weighs all positions against each other, padded ones too"
        for head in model.modules()
        if any(weighs(head) for weighs in _conditions(type(head)))
        for module in head.modules()
    }


def _conditions(cls: type) -> list[Callable[[nn.Module], bool]]:
    known = _weigh_positions()
    return [known[path] for path in map(_path, cls.__mro__) if path in known]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
