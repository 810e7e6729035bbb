"""Swapping a module's class in place, and back.

``module.__class__`` becomes a subclass that adds only ``forward``: parameters, buffers, hooks, ``state_dict``,
``isinstance`` and ``deepcopy`` stay what they were. What ``optimize`` was told lies beside it in the module, so that it
survives ``deepcopy`` and ``pickle`` as the class does.

A stand-in has the ``__name__`` of the class that it stands in for, because tools look layers up by it (the wrapping
policies of FSDP, ``_no_split_modules``, device maps). Its ``__qualname__``, by which it is pickled, is its own.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from ..backends import use
from ..nn._recorder import Recorder

_ATTRIBUTE = "_pytorch_ext"


@dataclass(frozen=True)
class Rule:
    """A class to match exactly, and what stands in for it.

    Attributes:
        target: the class, as ``"package.module.Name"``; nothing is imported to compare it.
        standin: its subclass, as ``"package.module:Name"``.
        does: what the stand-in does, in the words that ``explain`` prints.
        ops: the ops of ``pytorch_ext.ops`` that it runs.
        unfit: takes a module of the class and returns why this one has to stay, or None.
    """

    target: str
    standin: str
    does: str
    ops: tuple[str, ...] = ()
    unfit: Callable[[nn.Module], str | None] = lambda module: None

    def load(self) -> type[nn.Module]:
        module, _, name = self.standin.partition(":")
        standin = getattr(importlib.import_module(module), name)
        standin.__name__ = self.target.rpartition(".")[2]
        return standin


@dataclass(frozen=True)
class Options:
    """What ``optimize`` was told, and ``training.recompute``."""

    backend: str | None = None
    remove_padding: bool | str = "auto"
    recorder: type[Recorder] | None = None  # of CUDA graphs, where they were asked for
    kept_because: str = "optimize was told remove_padding=False"  # if it is False
    recompute: str | None = None  # one of ``_recompute.KINDS``, told by ``training.recompute``

    def below(self, reason: str | None) -> "Options":
        """The options of a module below a head that is the ``reason`` for ``"auto"`` to keep the padding."""
        if reason is None or self.remove_padding != "auto":
            return self
        return replace(self, remove_padding=False, kept_because=reason)


@dataclass(frozen=True)
class Swap:
    """What was done to one module: enough to explain it and to undo it."""

    original: type[nn.Module]
    standin: type[nn.Module]
    does: str
    ops: tuple[str, ...]
    options: Options

    def __setstate__(self, state: dict) -> None:  # out of a pickle, where no rule has been loaded
        self.__dict__.update(state)
        self.standin.__name__ = self.original.__name__


def swap(module: nn.Module, rule: Rule, options: Options) -> None:
    standin = rule.load()
    module.__dict__[_ATTRIBUTE] = Swap(type(module), standin, rule.does, rule.ops, options)
    module.__class__ = standin


def swapped(module: nn.Module) -> Swap | None:
    """What ``swap`` did to ``module``; None if it did nothing."""
    return module.__dict__.get(_ATTRIBUTE)


def unswap(module: nn.Module) -> None:
    module.__class__ = swapped(module).original
    del module.__dict__[_ATTRIBUTE]


def reconfigure(module: nn.Module, options: Options) -> None:
    """Gives a module that is swapped already other options."""
    done = swapped(module)
    module.__dict__[_ATTRIBUTE] = Swap(done.original, done.standin, done.does, done.ops, options)


def options_of(module: nn.Module) -> Options:
    done = swapped(module)
    return done.options if done else Options()


def scope(module: nn.Module) -> contextlib.AbstractContextManager:
    """The backend that ``optimize`` was told for ``module``, which wins over every other wish."""
    backend = options_of(module).backend
    return contextlib.nullcontext() if backend is None else use(backend)


def all_swapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if swapped(module))
