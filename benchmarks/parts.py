"""What a run of the suite is made of: what is asked for, and the parts that it runs one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .console import Bar
from .runs import Run

OURS = {"native", "cpu", "triton", "cuda", "auto", "reference"}


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    suite: str = "quick"
    device: str = "cpu"
    dtype: str = "fp32"
    filter: str = ""
    seconds: float | None = None  # parts that would not fit are left out
    tiny: bool = False  # shapes of no interest, which show that everything runs

    @property
    def quick(self) -> bool:
        return self.tiny or self.suite == "quick"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Part:
    """A step of the run, and about how many seconds it takes on two slow cores."""

    label: str
    seconds: float
    run: Callable[[Run, Bar], None]
