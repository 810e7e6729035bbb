"""What the benchmarks of single ops share: each of them is a table of cases, and this file runs it.

Compared first: every contender is set against float64 on the same inputs, by the contract of `pytorch_ext.testing`
and over its seeds, without gradients and with them; a backend that breaks it is not timed. `torch.compile` is no work
of ours and need not keep it (its column sums err several times as much as eager's): it is timed as long as half of
the digits are right, and what it broke is noted.

Then all of them take turns in one process, each as often behind each other one. Three times come out: a forward pass
without gradients, and of a training step the forward and the backward pass, each by itself. Beside them stands what
this machine can do (`op_limits`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pytorch_ext import backends, testing

from . import op_report, timing
from .console import Bar, reason
from .op_limits import Cost, Limits, Rates

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER, COMPILE = "eager", "compile"
COMPILE_MODE = "torch.compile(eager, dynamic=False), mode='default', compiled anew for each case"
MODES = ("no grad", "forward", "backward")
LARGEST_BYTES = 1e9  # that a case may move in float64 on a CPU
INTERRUPTED = 130  # the status of who was stopped, as a shell has it
SLOW = ("reference",)  # runs where it is asked for by name
Tensors = dict[str, torch.Tensor]
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One op on one shape. `ours` and `eager` take the tensors that `make` makes, by their names."""

    op: str  # as in pytorch_ext.ops
    name: str  # and its variant
    shape: str
    ours: Function
    eager: Function
    make: Callable[[torch.Generator], Tensors]
    elements: tuple[float, float]  # that forward and backward must move, whoever computes them
    flops: tuple[float, float] = (0.0, 0.0)
    # Ours and eager as they are timed in training where that cannot be compared, because each draws its own dropout.
    # Compared are then the two above, without it.
    training: tuple[Function, Function] | None = None
    sdpa: dict[str, Any] | None = None  # for `record.sdpa_backend`, where eager is attention

    def cost(self, mode: str, dtype: torch.dtype) -> Cost:
        way = int(mode == "backward")
        return Cost(self.elements[way] * dtype.itemsize, self.flops[way])

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.training is None else MODES[1:]


@dataclass
class Contender:
    """One way to compute a case."""

    name: str
    compared: Function
    timed: Function
    backend: str | None = None
    note: str = ""  # why it cannot run
    failures: list[str] = field(default_factory=list)  # why no time is shown
    broken: list[str] = field(default_factory=list)  # what a peer breaks of the contract that ours keep

    @property
    def ready(self) -> bool:
        return not self.note and not self.failures


@dataclass
class Result:
    """What came out for one case in one dtype."""

    case: Case
    dtype: str
    contenders: list[Contender]
    timings: dict[str, timing.Timings] = field(default_factory=dict)  # by mode
    rates: Rates | None = None
    note: str = ""  # why none was run

    @property
    def red(self) -> bool:
        return any(contender.failures for contender in self.contenders)


def contenders(case: Case, options: argparse.Namespace, inputs: Tensors) -> list[Contender]:
    """Eager PyTorch, torch.compile of it, other peers, and each backend of ours; what cannot run says why."""
    ours, eager = case.training or (case.ours, case.eager)
    found = [Contender(EAGER, case.eager, eager)]
    # A function that has seen one shape would become slower, dynamic code at the next one.
    torch._dynamo.reset()
    if options.compile:
        compared = torch.compile(case.eager, dynamic=False)
        timed = compared if eager is case.eager else torch.compile(eager, dynamic=False)
        found.append(Contender(COMPILE, compared, timed))
    if options.peers == "all":
        from .op_peers import peers

        found += peers(case, options.device)
    floating = [tensor for tensor in inputs.values() if tensor.is_floating_point()]
    for name in options.names:
        why = "; ".join(backends.why_not(name, case.op, *floating))
        found.append(Contender(name, _on(name, case.ours), ours, name, why))
    return found


def _on(backend: str, function: Function) -> Function:
    def call(**tensors: torch.Tensor) -> torch.Tensor:
        with backends.use(backend):
            return function(**tensors)

    return call


def _again(function: Function) -> Function:
    """The second call is the one that is timed; the first may have compiled something or laid out a weight."""

    def call(**tensors: torch.Tensor) -> torch.Tensor:
        function(**tensors)
        return function(**tensors)

    return call


def check(case: Case, field: list[Contender], dtype: torch.dtype, device: str, progress: Bar) -> None:
    """Sets every contender against float64 and writes down in it what is wrong."""
    make = lambda generator: _moved(case.make(generator), device)  # noqa: E731
    for gradients in (False, True) if case.training is None else (True,):
        inputs = _leaves(_inputs(case, dtype, device), gradients)
        want = case.eager(**inputs)
        for contender in field[1:]:
            if contender.ready:
                progress.step(f"{contender.name}: first call")
                _try(contender, inputs, want)
        judged = {c.name: c for c in field[1:] if c.ready}
        functions = {name: c.compared if gradients else _again(c.compared) for name, c in judged.items()}
        progress.step("float64")
        found = testing.compare_all(functions, case.eager, make, dtype, gradients=gradients)
        for name, comparison in found.items():
            ours = judged[name].backend is not None
            judged[name].failures = comparison.failures() if ours else _wrong(comparison)
            judged[name].broken += [] if ours else comparison.failures()


def _wrong(comparison: testing.Comparison) -> list[str]:
    """Where less than half of the digits are right; empty if nowhere."""
    half = torch.finfo(comparison.dtype).eps ** 0.5
    return [
        f"{name}: largest error {error.largest:.3g} is above {half:.2g} of {error.scale:.3g}"
        for name, error in comparison.ours.items()
        if not error.largest <= half * error.scale or error.unequal > comparison.eager[name].unequal
    ]


def _try(contender: Contender, inputs: Tensors, want: torch.Tensor) -> None:
    try:
        got = contender.compared(**inputs)
        if want.requires_grad:
            torch.autograd.grad(got, _floating(inputs), torch.ones_like(got))
    except Exception as error:
        contender.note = reason(error)
        return
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        expected, came = (f"{t.dtype} {tuple(t.shape)}" for t in (want, got))
        contender.failures = [f"expected {expected}, got {came}"]


def _inputs(case: Case, dtype: torch.dtype, device: str) -> Tensors:
    made = case.make(torch.Generator().manual_seed(max(testing.SEEDS) + 1))
    return _moved({name: t.to(dtype) if t.is_floating_point() else t for name, t in made.items()}, device)


def _moved(tensors: Tensors, device: str) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _floating(tensors: Tensors) -> list[torch.Tensor]:
    return [tensor for tensor in tensors.values() if tensor.is_floating_point()]


def _leaves(tensors: Tensors, gradients: bool) -> Tensors:
    return {
        name: tensor.detach().requires_grad_(gradients and tensor.is_floating_point())
        for name, tensor in tensors.items()
    }


def measure(
    case: Case, field: list[Contender], inputs: Tensors, options: argparse.Namespace, progress: Bar
) -> dict[str, timing.Timings]:
    """Times those that agree: first without gradients, then training steps, forward and backward apart."""
    ready = [contender for contender in field if contender.ready]
    how = {"rounds": options.rounds, "seconds": options.seconds, "warmup": 2, "device": options.device}
    how |= {"min_rounds": min(options.rounds, 5), "order": timing.balanced}
    found = {}
    if "no grad" in case.modes:
        progress.step("timing without gradients")
        steps = {contender.name: _steps(contender) for contender in ready}
        with torch.no_grad():
            _, found["no grad"], _ = timing.interleave_steps(steps, [_leaves(inputs, False)], **how)
    progress.step("timing training")
    item = _leaves(inputs, True)
    leaves = _floating(item)
    upstream = torch.randn(case.eager(**item).shape, generator=torch.Generator().manual_seed(0))
    upstream = upstream.to(leaves[0])

    def backward(out: torch.Tensor) -> object:
        return torch.autograd.grad(out, leaves, upstream)

    steps = {contender.name: _steps(contender, backward) for contender in ready}
    _, found["forward"], found["backward"], _ = timing.interleave_steps(steps, [item], **how)
    return found


def _steps(contender: Contender, *after: Callable) -> list[Callable]:
    """The call, and around it, in times of their own, the backend asked for: a user does that once for many calls."""
    asked = backends.use(contender.backend or "auto")
    function = contender.timed

    def ask(item: Tensors) -> Tensors:
        asked.__enter__()
        return item

    def forward(item: Tensors) -> torch.Tensor:
        return function(**item)

    return [ask, forward, *after, lambda _: asked.__exit__()]


def run(case: Case, dtype: str, options: argparse.Namespace, limits: Limits, progress: Bar) -> Result:
    """Compare and time one case."""
    result = Result(case, dtype, [])
    kind = DTYPES[dtype]
    expected = case.flops[0] / limits.product_rate(kind) if case.flops[0] else 0.0
    if expected > options.longest:
        result.note = f"one call takes about {expected:.1f} s, and --longest is {options.longest:g} s"
        return result
    largest = 8 * case.elements[1]
    if options.device == "cpu" and largest > LARGEST_BYTES:
        result.note = f"in float64 it moves {largest / 1e9:.1f} GB, and this is a CPU"
        return result
    inputs = _inputs(case, kind, options.device)
    result.contenders = contenders(case, options, inputs)
    check(case, result.contenders, kind, options.device, progress)
    limits.start()
    limits.sample(kind, products=any(case.flops))
    result.timings = measure(case, result.contenders, inputs, options, progress)
    limits.sample(kind, products=any(case.flops))
    result.rates = limits.rates(kind)
    return result


def arguments(name: str, about: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--quick", action="store_true", help="few cases, little time for each")
    parser.add_argument("--dtype", default="fp32", help=f"one or more of {','.join(DTYPES)} [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose op or shape contains it")
    parser.add_argument("--backends", help="a comma-separated list; all that run here but reference")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--peers",
        choices=("usual", "all"),
        default="usual",
        help="all: max-autotune, each kernel of SDPA, Liger too",
    )
    parser.add_argument("--rounds", type=int, default=200, help="at most so many [%(default)s]")
    parser.add_argument("--seconds", type=float, help="for each mode of a case, about [2; quick: 0.5]")
    parser.add_argument("--longest", type=float, default=0.5, help="leave out slower cases [%(default)s s]")
    parser.add_argument("--table", action="store_true", help="which backend won, as rows for `auto`")
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=op_report.RESULTS,
        metavar="FILE",
        help="write the record there, by default into benchmarks/results/<device>/",
    )
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 0.5 if options.quick else 2.0
    if options.rounds < 1 or (options.threads or 1) < 1:
        parser.error("--rounds and --threads must be at least 1")
    options.dtypes = options.dtype.split(",")
    if unknown := set(options.dtypes) - set(DTYPES):
        parser.error(f"no such dtype: {', '.join(sorted(unknown))} (one of {', '.join(DTYPES)})")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device that PyTorch can use")
    options.names = options.backends.split(",") if options.backends else default_names()
    if unknown := set(options.names) - set(backends.names()):
        parser.error(f"no such backend: {', '.join(sorted(unknown))} (one of {', '.join(backends.names())})")
    return options


def default_names() -> list[str]:
    """All but the slow ones; those that cannot run here say so where they are skipped."""
    return [name for name in backends.names() if name not in SLOW]


def main(name: str, about: str, cases: Callable[[bool], list[Case]], argv: list[str] | None = None) -> int:
    """Run the cases of one benchmark; 1 when a contender broke the contract, 130 when it was stopped before the end."""
    options = arguments(name, about, argv)
    chosen = [case for case in cases(options.quick) if options.only in f"{case.name} {case.shape}"]
    if not chosen:
        print(f"{name}: no case has {options.only!r} in its op or shape", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # before this one adds to it
    limits = Limits(options.device, [DTYPES[dtype] for dtype in options.dtypes])
    wanted = [(case, dtype) for dtype in options.dtypes for case in chosen]
    results = []
    with Bar(len(wanted)) as progress, _terminated_as_interrupted(), contextlib.suppress(KeyboardInterrupt):
        for case, dtype in wanted:
            progress.start(f"{case.name} {case.shape} {dtype}")
            results.append(run(case, dtype, options, limits, progress))
    missing = len(wanted) - len(results)
    if missing:
        print(f"{name}: stopped, {missing} of {len(wanted)} cases are missing", file=sys.stderr)
    if not results:
        return INTERRUPTED
    found = op_report.as_record(name, results, options)
    print(op_report.as_text(found))
    if options.table:
        print("\n" + op_report.winners(found))
    if options.save is not None:
        print(f"\nrecord: {op_report.save(found, options.save)}")
    if missing:
        return INTERRUPTED
    return 1 if any(result.red for result in results) else 0


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A time limit's SIGTERM is what Ctrl-C is: what has been measured by then is not lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
