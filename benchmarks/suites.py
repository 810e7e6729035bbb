"""What ``pytorch-ext bench`` runs: suites of parts, each compared first, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import record, runs, suite_models, suite_ops, suite_table
from .bert_contenders import DTYPES
from .console import Bar, reason
from .parts import Options, Part
from .runs import Run

QUICK = (suite_ops.single, suite_models.inference, suite_models.training)
WHOLE = {
    "ops": suite_ops.single,
    "bert": suite_models.inference,
    "train": suite_models.training,
    "overhead": suite_ops.overhead,
    "first-call": suite_models.first_call,
    "memory": suite_models.memory,
}
SUITES = ("quick", *WHOLE, "full")


def wrong(options: Options) -> str:
    """What is wrong with what is asked for, in one sentence; empty if nothing."""
    for name, value, known in (
        ("suite", options.suite, SUITES),
        ("dtype", options.dtype, tuple(DTYPES)),
        ("device", options.device, ("cpu", "cuda")),
    ):
        if value not in known:
            return f"--{name} must be one of {', '.join(known)}, not {value!r}"
    if options.on_gpu and not torch.cuda.is_available():
        return "--device cuda: there is no CUDA device that PyTorch can use"
    if not parts(options):
        return f"--filter {options.filter!r}: no part of the suite {options.suite} has it in its label"
    return ""


def parts(options: Options) -> list[Part]:
    """The parts of a suite whose label contains the filter."""
    if options.suite == "quick":
        makers = QUICK
    else:
        makers = WHOLE.values() if options.suite == "full" else (WHOLE[options.suite],)
    return [part for make in makers for part in make(options) if options.filter in part.label]


def run(options: Options, keep: Callable[[Run], object] = lambda found: None) -> Run:
    """Run a suite; what cannot run becomes a note, and what disagrees a red line without a time.

    With `seconds`, `keep` is called after each part: whoever has little time may be stopped in the next one.
    """
    found = Run(options.suite, record.environment(options.device))
    todo = parts(options)
    begin, expected = time.monotonic(), 0.0
    with Bar(len(todo), [part.seconds for part in todo]) as progress:
        for part in todo:
            progress.start(part.label)
            elapsed = time.monotonic() - begin
            needed = part.seconds * elapsed / expected if expected else 0.0
            if options.seconds is not None and elapsed + needed > options.seconds:
                found.note(f"left out: {part.label}: no time left of {options.seconds:g} s")
                continue
            try:
                part.run(found, progress)
            except Exception as error:
                found.red.append(f"{part.label}: {reason(error)}")
            expected += part.seconds
            if options.seconds is not None:
                keep(found)
    return found


def command(options: Options, out: Path) -> int:
    """Run a suite, print its table, leave its record and its page in `out`; 1 when something disagreed."""
    file = out / f"{options.suite}-{options.dtype}.json"
    found = run(options, lambda until_now: runs.save(until_now, file))
    print(suite_table.as_text(found))
    print(f"\nrecord: {runs.save(found, file)}\npage: {_page(found, out)}\n{suite_table.summary(found)}")
    return 1 if found.red else 0


def _page(found: Run, out: Path) -> str:
    try:
        from . import page
    except ImportError as error:
        return f"left out: {error}"
    return str(page.write(found, out))
