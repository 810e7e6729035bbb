"""Measures which configurations suit the Triton kernels on this GPU, and writes the best where the kernels look first.

Each kernel comes with a small table of configurations, made by reasoning for a class of GPUs. This tries a wider set,
for the sizes that a user has. A configuration counts only if its results agree with those of the table's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import triton as backend
from ..backends import why_not

# What is faster by less than this is taken for noise.
WORTH = 0.02
# How far results may lie apart, in units of the dtype's rounding of the largest value: sums run in another order.
APART = 16

Timer = Callable[[Callable], float]
Constants = dict[str, int]


class TuneError(Exception):
    """Tuning cannot be done here, in one sentence."""


@dataclass
class Job:
    """One set of kernels at one class of sizes: all its calls are measured with each configuration."""

    configs: Any  # of kernels/triton/configs.py
    sizes: tuple[int, ...]
    calls: list[Callable] = field(default_factory=list)

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(self.configs.by, self.sizes, strict=True))
        return f"{self.configs.name} ({sizes})"

    def candidates(self) -> list[Constants]:
        return self.configs.candidates(self.sizes)


@dataclass
class Result:
    """What came of a job; times in seconds, summed over its calls."""

    job: Job
    before: float
    best: float
    constants: Constants | None  # None: the table's configuration stays
    tried: int
    refused: int  # did not compile, or did not fit on the GPU
    wrong: int  # ran, and gave other results
    first_call: float  # of the configuration that is taken: what a user waits for once


def check() -> None:
    """Raises ``TuneError`` where there is nothing to measure on."""
    reasons = why_not("triton", "layer_norm")
    if not reasons and not torch.cuda.is_available():
        reasons = ["the interpreter is on (TRITON_INTERPRET=1)"]
    if reasons:
        raise TuneError(f"tune measures Triton kernels on a GPU: {'; '.join(reasons)}")


def stems(chosen: Sequence[str]) -> list[str]:
    """The kernel files to tune: ``chosen``, or all."""
    there = list(backend.kernel_files())
    unknown = [name for name in chosen if name not in there]
    if unknown:
        raise TuneError(f"op: expected some of {', '.join(there)}, got {', '.join(unknown)}")
    return list(chosen) or there


def jobs(names: Iterable[str], sizes: Sequence[Any], empty: Callable[..., Tensor]) -> list[Job]:
    """What there is to measure for these kernel files and ``sizes`` (of kernels/triton/sizes.py)."""
    found: dict[tuple, Job] = {}
    files = backend.kernel_files()
    for name in names:
        for one in sizes:
            for configs, call in files[name].calls(one, empty):
                for asked in sorted(configs.sizes_asked(call)):
                    job = found.setdefault((configs.name, asked), Job(configs, asked))
                    job.calls.append(call)
    return list(found.values())


def run(found: Sequence[Job], timer: Timer, clock: Callable[[], float] = time.perf_counter) -> Iterator[Result]:
    """Measures the jobs one after the other."""
    for job in found:
        yield _run(job, timer, clock)


def _run(job: Job, timer: Timer, clock: Callable[[], float]) -> Result:
    began = clock()
    expected = [_tensors(call()) for call in job.calls]
    first_call = clock() - began
    before = sum(timer(call) for call in job.calls)
    result = Result(job, before, before, None, 0, 0, 0, first_call)
    for constants in job.candidates():
        result.tried += 1
        with job.configs.forced(constants):
            try:
                began = clock()
                given = [_tensors(call()) for call in job.calls]
                first_call = clock() - began
                taken = sum(timer(call) for call in job.calls)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                result.refused += 1
                continue
        if not all(map(_agree, given, expected)):
            result.wrong += 1
        elif taken < result.best:
            result.best, result.constants, result.first_call = taken, constants, first_call
    if result.best > (1.0 - WORTH) * before:
        result.best, result.constants = before, None
    return result


def save(results: Sequence[Result], device_name: str) -> Path | None:
    """Writes what is better than the table; None if nothing is."""
    best: dict[Any, dict] = {}
    for result in results:
        if result.constants is not None:
            best.setdefault(result.job.configs, {})[result.job.sizes] = result.constants
    return backend.module("configs").save(device_name, best) if best else None


def filled(device: str) -> Callable[..., Tensor]:
    """Makes the tensors of the calls: ordinary numbers, and ids ``below`` a limit."""

    def make(*shape: int, dtype: torch.dtype, below: int = 2**31) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(shape, device=device).to(dtype)
        return torch.randint(below, shape, device=device).to(dtype)

    return make


def device_timer(call: Callable) -> float:
    """Seconds on the GPU, the median of many, the L2 cache cold."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _agree(given: list[Tensor], expected: list[Tensor]) -> bool:
    for one, other in zip(given, expected, strict=True):
        if not one.numel():
            continue
        one, other, eps = one.double(), other.double(), torch.finfo(one.dtype).eps
        if not bool((one - other).abs().max() <= APART * eps * other.abs().max()):
            return False
    return True


def _is_refusal(error: Exception) -> bool:
    """Triton's own errors: a kernel that does not compile, or wants more than the GPU has."""
    return type(error).__module__.partition(".")[0] == "triton" or "PassManager" in str(error)
