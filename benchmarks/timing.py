"""How every speed in this project is measured. Read this file to decide whether to believe the numbers.

Compared first
    ``compare`` sets a contender's outputs against the baseline's, and one that disagrees is not timed. The
    limit is no constant that somebody chose: it is a small multiple of the baseline's own rounding error,
    which is its distance from the same model run one precision up (``rounding_limits``).
Interleaved, in one process
    ``interleave`` runs all contenders on the same inputs, with the same threads, taking turns in rotating
    order. What disturbs the machine for a second disturbs all of them alike.
Ratios of pairs
    A speed-up is the median of baseline time / contender time, each pair on the same item in the same round;
    its spread is the two quartiles. It is never a ratio of numbers measured at different moments.
Host wall-clock
    Time is ``time.perf_counter`` around the call. On a GPU the device is synchronised before and after it, so
    host overhead counts, as it does for a user. Inputs stay where they are between rounds: caches are warm.
Memory in a fresh process
    ``peak_memory`` counts what one call needs above what was there before it: activations and scratch, not
    weights.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HOW_TIMED = (
    "host wall-clock (time.perf_counter; a GPU is synchronised before and after), warm caches; contenders "
    "interleaved in one process in rotating order; ratio = median of baseline / contender over the pairs, "
    "each on one item in one round"
)


# --- Time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """Baseline time / contender time: the median over the pairs, and the two quartiles as its spread."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ×"


@dataclass(frozen=True)
class Timings:
    """Seconds per contender and call. Equal positions are a pair: the same item in the same round."""

    seconds: dict[str, list[float]]  # round by round, in a round item by item
    items: int = 1

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values()))) // self.items

    def median(self, name: str) -> float:
        """Seconds for all items once: the sum, over the items, of each item's median."""
        taken = self.seconds[name]
        return sum(statistics.median(taken[item :: self.items]) for item in range(self.items))

    def ratio(self, name: str, baseline: str) -> Ratio:
        """How many times faster than `baseline` the contender is, pair by pair."""
        pairs = [b / c for b, c in zip(self.seconds[baseline], self.seconds[name], strict=True)]
        if len(pairs) == 1:
            return Ratio(pairs[0], pairs[0], pairs[0], 1)
        low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
        return Ratio(middle, low, high, len(pairs))


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: each turn starts one contender later."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def balanced(names: Sequence[str], turn: int) -> list[str]:
    """As `rotated`, but over the turns each contender also follows each other one equally often (Williams 1949).

    For short calls: what ran before leaves its traces in the caches and in the threads. Measured: a layer norm of
    76 us takes 90 after a compiled one.
    """
    count = len(names)
    turns = count if count % 2 == 0 else 2 * count
    shift, mirrored = turn % turns % count, turn % turns >= count
    zigzag = [
        (place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)
    ]  # 0, 1, -1, 2, -2, ...
    order = [names[(step + shift) % count] for step in zigzag]
    return order[::-1] if mirrored else order


def interleave(
    contenders: Mapping[str, Callable[[Any], object]],
    items: Sequence[Any] = (None,),
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float | None = None,
    min_rounds: int = 3,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> Timings:
    """Time every contender on every item, `rounds` times, taking turns.

    With `seconds` it stops earlier, after a whole round (and at least `min_rounds`), when the next one would
    not fit. `progress` is called after each timed call, outside the timing.
    """
    (timings,) = interleave_steps(
        {name: (call,) for name, call in contenders.items()},
        items,
        rounds=rounds,
        warmup=warmup,
        seconds=seconds,
        min_rounds=min_rounds,
        device=device,
        progress=progress,
    )
    return timings


def interleave_steps(
    contenders: Mapping[str, Sequence[Callable[[Any], object]]],
    items: Sequence[Any] = (None,),
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float | None = None,
    min_rounds: int = 3,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] = lambda: None,
    order: Callable[[Sequence[str], int], list[str]] = rotated,
) -> tuple[Timings, ...]:
    """As `interleave`, for turns of several steps that are timed apart, such as forward and backward.

    The first step gets the item, each later one what the step before it returned.
    """
    names = list(contenders)
    count = len(next(iter(contenders.values())))
    taken: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in range(count)]
    synchronize = _synchronizer(device)

    def turn(name: str, value: Any) -> list[float]:
        *first, last = contenders[name]
        durations = []
        for step in first:
            synchronize()
            start = time.perf_counter()
            value = step(value)
            synchronize()
            durations.append(time.perf_counter() - start)
        synchronize()
        start = time.perf_counter()
        last(value)  # what it returns is freed within its time
        synchronize()
        durations.append(time.perf_counter() - start)
        return durations

    for _ in range(warmup):
        for item in items:
            for name in names:
                turn(name, item)

    with _no_garbage_collection():
        begin = time.perf_counter()
        for round_ in range(rounds):
            for place, item in enumerate(items):
                for name in order(names, round_ + place):
                    for step, duration in enumerate(turn(name, item)):
                        taken[step][name].append(duration)
                    progress()
            done = round_ + 1
            elapsed = time.perf_counter() - begin
            if seconds is not None and done >= min_rounds and elapsed * (done + 1) / done > seconds:
                break
    return tuple(Timings(step, len(items)) for step in taken)


def _synchronizer(device: torch.device | str) -> Callable[[], None]:
    if torch.device(device).type == "cuda":
        return torch.cuda.synchronize
    return lambda: None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As ``timeit`` does: a collection in the middle would be charged to whoever is running."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- Agreement ------------------------------------------------------------------------------------

SLACK = 5.0
"""How many times the baseline's own rounding error a contender may differ from it. Two implementations that
round independently differ by up to twice it; eager attention in bf16 errs 2.5 times as much as SDPA."""

Tensors = Mapping[Hashable, torch.Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far a contender's outputs are from the baseline's."""

    largest: float  # largest absolute difference
    cosine: float  # lowest cosine similarity of two corresponding rows (of the whole, for gradients)
    share: float  # of the limit: above 1 is red

    @property
    def ok(self) -> bool:
        return self.share <= 1.0  # NaN is red

    def worse(self, other: Agreement) -> Agreement:
        """The worse of the two in every figure; NaN is worst."""
        return Agreement(
            _worst(max, self.largest, other.largest),
            _worst(min, self.cosine, other.cosine),
            _worst(max, self.share, other.share),
        )

    def __str__(self) -> str:
        if self.ok:
            return f"{self.largest:.0e}"
        return f"DISAGREES: differs by {self.largest:.2g}, {self.share:.3g} times what rounding explains"


def precision_up(dtype: torch.dtype) -> torch.dtype:
    """The precision that shows the rounding error of `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def rounding_limits(want: Tensors, truth: Tensors) -> dict[Hashable, float]:
    """Per tensor, the largest difference from `want` (the baseline's output) that rounding explains.

    `truth` is the baseline's output one precision up. A tensor of few elements can be exact by luck, so none
    is held to less than the relative error that is usual among them.
    """
    errors = {name: _largest(want[name].double() - truth[name].double()) for name in want}
    sizes = {name: _largest(truth[name]) for name in want}
    usual = statistics.median([errors[name] / sizes[name] for name in want if sizes[name] > 0] or [0.0])
    return {name: SLACK * max(errors[name], usual * sizes[name]) for name in want}


def compare(got: Tensors, want: Tensors, limits: Mapping[Hashable, float], *, rows: bool = True) -> Agreement:
    """Set a contender's tensors against the baseline's; `rows=False` takes one cosine over everything."""
    result = Agreement(largest=0.0, cosine=1.0, share=0.0)
    for name, reference in want.items():
        other = got.get(name)
        if other is None or other.shape != reference.shape:
            return Agreement(largest=float("inf"), cosine=float("nan"), share=float("inf"))
        largest = _largest(other.double() - reference.double())
        # A limit of zero (an exact baseline) still admits an exact contender.
        share = largest / limits[name] if limits[name] > 0 else (float("inf") if largest else largest)
        result = result.worse(Agreement(largest, _lowest_cosine(other, reference) if rows else 1.0, share))
    if not rows:
        whole = [torch.cat([tensors[name].double().flatten() for name in want]) for tensors in (got, want)]
        result = Agreement(result.largest, _lowest_cosine(*whole), result.share)
    return result


def _worst(choose: Callable[..., float], *figures: float) -> float:
    return next((figure for figure in figures if figure != figure), choose(figures))


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.numel():
        return 1.0
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


# --- Memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What one call needs above what was there before it."""

    bytes: int
    method: str


_ONE_START = threading.Lock()  # the environment is the process's; several threads may measure at once


def peak_memory(
    prepare: Callable[..., Callable[[], object] | tuple[Callable[[], object], Callable[[], object]]],
    *args: Any,
    device: torch.device | str = "cpu",
    timeout: float = 300.0,
) -> Memory | None:
    """Peak memory of one call of ``prepare(*args)()``, in a fresh process, after a warm-up call.

    `prepare` is a top-level function (the new process imports it); its arguments can be pickled. It returns the
    call, or a pair of a warm-up and the call: what a library keeps from one call to the next for its scratch is
    found only behind a warm-up that needs less of it. None where the system does not tell, and where the
    process fails. On a CPU it is the peak resident set minus the resident set just before; the C allocator is
    told to give back at once what is freed, so that memory which the warm-up left lying about cannot hide a need.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(sender, str(device), prepare, args))
    with _ONE_START, _environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"):
        child.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(timeout) else None
        child.join(10)  # it ends by itself
        return answer
    except EOFError:  # it ended without an answer
        return None
    finally:
        child.terminate()
        child.join()


def _measure_peak(sender: Any, device: str, prepare: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    try:
        found = prepare(*args)
        warm_up, call = found if isinstance(found, tuple) else (found, found)
        warm_up()
        gc.collect()
        sender.send(_peak_on_gpu(call, device) if torch.device(device).type == "cuda" else _peak_on_cpu(call))
    except Exception:
        sender.send(None)


def _peak_on_gpu(call: Callable[[], object], device: str) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device)
    return Memory(peak - before, "peak of PyTorch's CUDA allocator, fresh process")


def _peak_on_cpu(call: Callable[[], object]) -> Memory | None:
    """Linux only: there a process can reset its own high-water mark (5 into clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return Memory(max(0, _status_bytes("VmHWM") - before), "peak resident set, fresh process")
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
