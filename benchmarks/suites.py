"""What ``pytorch-ext bench`` runs: suites of parts, each compared first, then timed."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pytorch_ext import backends

from . import (
    bench_attention,
    bench_bert,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    gpu_timing,
    op_bench,
    record,
    timing,
)
from .bert_contenders import BASELINE, DTYPES, SHAPES, Case, contenders, default_names, left_out
from .console import Bar, Progress, reason
from .op_limits import Limits
from .runs import Run, Series, bert_name

SUITES = ("quick", "ops", "bert", "train", "first-call", "memory", "full")
OPS = (bench_layer_norm, bench_gelu, bench_linear, bench_attention)
OURS = {"native", "cpu", "triton", "cuda", "auto", "reference"}
FEW = (BASELINE, "native", "native-padded", "cpu", "cpu-padded", "triton", "cuda", "auto")


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    suite: str = "quick"
    device: str = "cpu"
    dtype: str = "fp32"
    filter: str = ""
    seconds: float | None = None  # parts that would not fit are left out


@dataclass(frozen=True)
class Part:
    """A step of the run, and about how many seconds it takes on two slow cores."""

    label: str
    seconds: float
    run: Callable[[Run, Bar], None]


def parts(options: Options) -> list[Part]:
    """The parts of a suite whose label contains the filter."""
    made = {
        "quick": lambda: [
            *_ops(options, quick=True),
            *_berts(options, quick=True),
            *_trainings(options, quick=True),
        ],
        "ops": lambda: _ops(options, quick=False),
        "bert": lambda: _berts(options, quick=False),
        "train": lambda: _trainings(options, quick=False),
        "first-call": lambda: _apart(options, _first_call),
        "memory": lambda: _apart(options, _memory),
    }
    names = [name for name in made if name != "quick"] if options.suite == "full" else [options.suite]
    return [part for name in names for part in made[name]() if options.filter in part.label]


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


# --- Single ops -----------------------------------------------------------------------------------


def _ops(options: Options, quick: bool) -> list[Part]:
    words = ["--device", options.device, "--dtype", options.dtype, *["--quick"] * quick]
    chosen = op_bench.arguments("bench", "", words)
    chosen.seconds = 0.2 if quick else chosen.seconds
    limits: list[Limits] = []  # made when the first part runs: it multiplies large matrices

    def part(case: op_bench.Case) -> Part:
        def do(found: Run, progress: Bar) -> None:
            if not limits:
                limits.append(Limits(options.device, [DTYPES[options.dtype]]))
            _op(case, options.dtype, chosen, limits[0], found, progress)

        return Part(f"ops: {case.name} {case.shape}", 8.0, do)

    cases = [case for module in OPS for case in module.cases(quick)]
    if quick:  # one shape of each op
        cases = list({case.name: case for case in cases}.values())
    return [part(case) for case in cases]


def _op(
    case: op_bench.Case, dtype: str, chosen: argparse.Namespace, limits: Limits, found: Run, progress: Bar
) -> None:
    result = op_bench.run(case, dtype, chosen, limits, progress)
    where = f"{case.name} {case.shape}, {dtype}"
    if result.note:
        found.note(f"left out: {where}: {result.note}")
    for one in result.contenders:
        if one.failures:
            found.red.append(f"{where}: {one.name} DISAGREES: {'; '.join(one.failures)}; no time is shown")
        elif one.note:
            found.note(f"left out: {one.name}: {one.note}")
    ours = {one.name for one in result.contenders if one.backend}
    for mode, timings in result.timings.items():
        cost = case.cost(mode, DTYPES[dtype])
        rates = result.rates
        facts = {"bytes": cost.bytes, "flops": cost.flops, "copy_rate": rates.copy}
        facts["product_rate"] = rates.product if any(case.flops) else None
        found.add(
            timings,
            op_bench.EAGER,
            ours,
            dict.fromkeys(timings.seconds, facts),
            suite="ops",
            case=f"{case.name} {case.shape}, {mode}",
            dtype=dtype,
        )
    if chosen.device == "cuda" and "no grad" in result.timings:
        _on_device(case, result, dtype, gpu_timing.Gpu(), chosen.rounds, found)


def _on_device(
    case: op_bench.Case, result: op_bench.Result, dtype: str, gpu: Any, rounds: int, found: Run
) -> None:
    """By the GPU's clock: a forward without gradients, of those that agreed."""
    generator = torch.Generator().manual_seed(0)
    copies = []
    for _ in range(gpu_timing.COPIES):
        made = case.make(generator)
        kind = DTYPES[dtype]
        copies.append(
            {key: t.to(gpu.device, kind if t.is_floating_point() else None) for key, t in made.items()}
        )

    def call_of(one: op_bench.Contender) -> gpu_timing.Call:
        def call(copy: int) -> object:
            with torch.no_grad(), backends.use(one.backend or "auto"):
                return one.timed(**copies[copy])

        return call

    calls = {one.name: call_of(one) for one in result.contenders if one.ready}
    cost = case.cost("no grad", DTYPES[dtype])
    told = {"bytes": cost.bytes, "flops": cost.flops, "timed": "CUDA events"}
    facts = dict.fromkeys(calls, told)
    where = f"{case.name} {case.shape}, no grad"
    for how in (gpu_timing.COLD, gpu_timing.WARM, gpu_timing.GRAPH):
        try:
            timings = gpu_timing.measure(calls, how, rounds=min(rounds, 50), gpu=gpu)
        except RuntimeError as error:  # something that a graph cannot hold
            found.note(f"left out: {where}, {how}: {reason(error)}")
            continue
        ours = {one.name for one in result.contenders if one.backend}
        found.add(timings, op_bench.EAGER, ours, facts, suite="ops", case=f"{where}, {how}", dtype=dtype)


# --- A whole BERT ---------------------------------------------------------------------------------


def _case(options: Options, shape: dict[str, int], **changes: Any) -> Case:
    fields = {"batch": 16, "seq": 256, "fill": "27", "mode": "infer", "device": options.device}
    return Case(**shape, **{**fields, **changes}, dtype=DTYPES[options.dtype])


def _berts(options: Options, quick: bool) -> list[Part]:
    if quick:
        shape = {**SHAPES["minilm"], "layers": 2}
        first = _case(options, shape, seq=128)
        rest = [_case(options, shape, seq=128, fill=fill) for fill in ("60", "sorted", "100")]
        rest += [_case(options, shape, seq=64)]
    else:
        shape = SHAPES["base"]
        first = _case(options, shape)
        rest = [_case(options, shape, fill=fill) for fill in ("60", "sorted", "100")]
        rest += [_case(options, shape, seq=seq) for seq in (64, 128, 512)]
        rest += [_case(options, SHAPES[name]) for name in ("minilm", "large")]
    everyone = [name for name in contenders(first) if not name.startswith("reference")]
    pairs = 5 if quick else 7
    slow = 1.0 if quick else 12.0
    few = [_bert(case, [name for name in FEW if name in contenders(case)], pairs, 5 * slow) for case in rest]
    return [*few, _bert(first, everyone, pairs, 150 * (1 if quick else 4))]  # what takes longest comes last


def _trainings(options: Options, quick: bool) -> list[Part]:
    shape = {**SHAPES["minilm"], "layers": 1} if quick else SHAPES["base"]
    cases = [_case(options, shape, mode="train", seq=128 if quick else 256)]
    if not quick:
        cases += [_case(options, shape, mode="train", fill=fill) for fill in ("60", "100")]
    names = [FEW] if quick else [default_names(case) for case in cases]
    return [
        _bert(case, [name for name in some if name in contenders(case)], 3, 10 if quick else 300)
        for case, some in zip(cases, names, strict=True)
    ]


def _bert(case: Case, names: list[str], pairs: int, seconds: float) -> Part:
    suite = case.mode.replace("infer", "bert")

    def do(found: Run, progress: Bar) -> None:
        for name, why in left_out(case).items():
            found.note(f"left out: {name}: {why}")
        torch._dynamo.reset()
        inputs = case.inputs()
        shown = _Quiet(progress)
        rows = bench_bert.prepare(case, names, inputs, shown)
        timings = bench_bert.measure(rows, case, inputs, pairs, shown)
        where = f"{suite}: {bert_name(vars(case))}"
        for row in rows:
            if row.red:
                found.red.append(f"{where}: {row.name} {row.agreement}; no time is shown")
            elif row.note:
                found.note(f"left out: {row.name}, {where}: {row.note}")
        if timings is None:
            return
        real = sum(case.lengths)
        told = {key: value for key, value in vars(case).items() if key != "dtype"}
        told |= {"real_tokens": real, "filled": real / (case.batch * case.seq)}
        facts = {row.name: {**told, "what": row.what, "first_call": row.first_call_seconds} for row in rows}
        ours = {name for name in timings.seconds if name.removesuffix("-padded") in OURS}
        dtype = next(name for name, kind in DTYPES.items() if kind == case.dtype)
        found.add(timings, BASELINE, ours, facts, suite=suite, case=bert_name(vars(case)), dtype=dtype)

    return Part(f"{suite}: {bert_name(vars(case))}", seconds, do)


class _Quiet(Progress):
    """What bench_bert says of its steps, on the bar of the run."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def start(self, label: str) -> None:
        self._bar.step(label)

    def step(self) -> None:
        pass

    def done(self) -> None:
        pass


# --- In fresh processes ---------------------------------------------------------------------------


def _apart(options: Options, measure: Callable[[Case, str, Run], None]) -> list[Part]:
    case = _case(options, {**SHAPES["base"], "layers": 4})
    return [
        Part(
            f"{measure.__name__.strip('_')}: {name}",
            30.0,
            lambda found, _, name=name: measure(case, name, found),
        )
        for name in default_names(case)
    ]


def _memory(case: Case, name: str, found: Run) -> None:
    used = timing.peak_memory(
        bench_bert.memory_probe, case, name, torch.get_num_threads(), device=case.device
    )
    if used is None:
        found.note(f"left out: memory of {name}: the fresh process gave no answer")
        return
    found.memory.append(
        {"case": bert_name(vars(case)), "contender": name, "bytes": used.bytes, "method": used.method}
    )


def _first_call(case: Case, name: str, found: Run) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds = pool.submit(first_call, case, name, torch.get_num_threads()).result()
    dtype = next(key for key, kind in DTYPES.items() if kind == case.dtype)
    facts = {"what": "building the model and its first call, in a fresh process, imports apart"}
    found.series.append(
        Series("first call", bert_name(vars(case)), dtype, name, [seconds], name in OURS, None, facts)
    )


def first_call(case: Case, name: str, threads: int) -> float:
    """Seconds from nothing but imports to the first result."""
    torch.set_num_threads(threads)
    inputs, known = case.inputs(), contenders(case)
    start = time.perf_counter()
    bench_bert.runner(known[name][1](case, 0.0), case)(inputs)
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
