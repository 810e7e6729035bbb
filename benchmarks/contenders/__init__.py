"""Who is timed on a whole BERT: a file for each kind of contender, found by being here.

A recipe is a function of a case and a dropout probability that returns a model, under ``@contender``. What it needs, it
says there; one that cannot run is left out, with the reason, in the table and on the page.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..bert_contenders import BASELINE, DTYPES, Builder, Case

FIRST = ("hugging_face", "torch_compile", "torch_nested")  # the order of the table; ours come last


@dataclass(frozen=True)
class Contender:
    """One way to run the model, and what it needs."""

    name: str
    what: str
    build: Builder
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = tuple(DTYPES)
    families: tuple[str, ...] = ("bert", "vit")
    precision: str = (
        ""  # where it is not that of the case: another line, that rounding does not hold to the baseline
    )
    trains: bool = True
    usual: bool = True  # else it runs where it is asked for by name, or in the suite `full`
    unless: Callable[[Case], str] = lambda case: ""  # one more reason why it cannot run

    def why_not(self, case: Case) -> str:
        """One sentence, or nothing if it can run."""
        dtype = next(name for name, kind in DTYPES.items() if kind == case.dtype)
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if case.family not in self.families:
            return f"it knows {' and '.join(self.families)} alone"
        if case.device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} alone"
        if case.training and not self.trains:
            return "it does not train"
        if dtype not in self.dtypes:
            return f"it computes {', '.join(self.dtypes)} here, not {dtype}"
        return self.unless(case)


_found: dict[str, Contender] = {}


def contender(name: str, what: str, **needs) -> Callable[[Builder], Builder]:
    """Enters a recipe under its name; `needs` are the fields of ``Contender``."""

    def enter(build: Builder) -> Builder:
        _found[name] = Contender(name, what, build, **needs)
        return build

    return enter


@functools.cache
def everyone() -> tuple[Contender, ...]:
    """All of them, the baseline first and ours last."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    others = sorted(set(names) - {*FIRST, "ours"})
    for name in (*FIRST, *others, "ours"):
        importlib.import_module(f"{__name__}.{name}")
    return (_found[BASELINE], *(one for name, one in _found.items() if name != BASELINE))


def model_with(model: nn.Module, around: Callable[[], object]) -> nn.Module:
    """The same model, each call of it within the context that `around` makes."""
    forward = model.forward

    @functools.wraps(forward)
    def within(*args, **kwargs):
        with around():
            return forward(*args, **kwargs)

    model.forward = within
    return model
