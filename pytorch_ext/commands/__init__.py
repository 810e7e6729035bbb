"""The commands of ``pytorch-ext``, a file each: what bears its name in it, a function or a Typer, is the command.

A command imports what it needs when it runs: ``--help`` is quick, and a missing extra costs only its own command.
"""

import importlib
import pkgutil
from collections.abc import Callable

import typer

BAD_INPUT = 2
INTERRUPTED = 130


def found() -> dict[str, Callable | typer.Typer]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: getattr(importlib.import_module(f"{__name__}.{name}"), name) for name in names}
