"""The parts of the suite that time single ops: what they compute, and what a call of them costs the host."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

import pytorch_ext
from pytorch_ext import backends

from . import (
    bench_attention,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    bench_overhead,
    gpu_timing,
    op_bench,
)
from .bert_contenders import DTYPES
from .console import Bar, reason
from .op_limits import Limits
from .parts import Options, Part
from .runs import Run

OPS = (bench_attention, bench_layer_norm, bench_linear, bench_gelu)
TINY = ("--no-compile", "--rounds", "3", "--seconds", "0.05")


def single(options: Options) -> list[Part]:
    """Each op on its shapes; a GPU gets those that fill it."""
    words = ["--device", options.device, "--dtype", options.dtype]
    everyone = (options.suite == "full" or options.on_gpu) and not options.tiny
    words += ["--peers", "all"] if everyone else []
    words += ["--seconds", "0.2"] if options.quick or options.on_gpu else []
    chosen = op_bench.arguments("bench", "", [*words, *(TINY if options.tiny else ())])
    limits: list[Limits] = []  # made when the first part runs: it multiplies large matrices

    def part(case: op_bench.Case) -> Part:
        def do(found: Run, progress: Bar) -> None:
            if not limits:
                limits.append(Limits(options.device, [DTYPES[options.dtype]]))
            _op(case, options, chosen, limits[0], found, progress)

        return Part(f"ops: {case.name} {case.shape}", 8.0, do)

    return [part(case) for case in cases(options)]


def cases(options: Options) -> list[op_bench.Case]:
    """Of all ops in turns, so that a run that is stopped has something of each."""
    if options.quick:  # one shape of each op
        last = {case.name: case for module in OPS for case in module.cases(True)}
        return list(last.values())
    large = [module.large_cases() for module in OPS]
    if options.on_gpu:
        return [own[place] for place in range(max(map(len, large))) for own in large if place < len(own)]
    usual = [case for module in OPS for case in module.cases(False)]
    return [*usual, *(case for own in large for case in own)] if options.suite == "full" else usual


def _op(
    case: op_bench.Case,
    options: Options,
    chosen: argparse.Namespace,
    limits: Limits,
    found: Run,
    progress: Bar,
) -> None:
    dtype = options.dtype
    result = op_bench.run(case, dtype, chosen, limits, progress)
    where = f"{case.name} {case.shape}, {dtype}"
    if result.note:
        found.note(f"left out: {where}: {result.note}")
    for one in result.contenders:
        if one.failures:
            found.red.append(f"{where}: {one.name} DISAGREES: {'; '.join(one.failures)}; no time is shown")
        elif one.note:
            nowhere = (
                backends.why_not(one.backend, case.op) if one.backend else []
            )  # on no tensor of any device
            name, why = (one.name, "; ".join(nowhere)) if nowhere else (f"{one.name} for {case.op}", one.note)
            found.note(f"left out: {name}: {why}")
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
    if "no grad" not in result.timings:
        return
    if options.on_gpu:
        on_device(case, result, dtype, gpu_timing.Gpu(), chosen.rounds, found)
    elif options.tiny:
        found.note("left out: times by a GPU's own clock (CUDA events): this needs a GPU")


def on_device(
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
    where = f"{case.name} {case.shape}, no grad"
    ours = {one.name for one in result.contenders if one.backend}
    for how in (gpu_timing.COLD, gpu_timing.WARM, gpu_timing.GRAPH):
        ready = calls if how != gpu_timing.GRAPH else _captured(calls, gpu, where, found)
        if op_bench.EAGER not in ready:
            continue
        timings = gpu_timing.measure(ready, how, rounds=min(rounds, 50), gpu=gpu)
        facts = dict.fromkeys(ready, told)
        found.add(timings, op_bench.EAGER, ours, facts, suite="ops", case=f"{where}, {how}", dtype=dtype)


def _captured(
    calls: dict[str, gpu_timing.Call], gpu: Any, where: str, found: Run
) -> dict[str, gpu_timing.Call]:
    """Graphs of those that a graph can hold."""
    ready = {}
    for name, call in calls.items():
        try:
            ready[name] = gpu.captured(call)
        except RuntimeError as error:
            found.note(f"left out: {where}, {gpu_timing.GRAPH}, {name}: {reason(error)}")
    return ready


def overhead(options: Options) -> list[Part]:
    """Each op on tiny tensors, on each backend that runs here, beside what PyTorch has for it."""
    calls, blocks = (20, 3) if options.tiny else (100, 15)

    def part(name: str) -> Part:
        def do(found: Run, progress: Bar) -> None:
            with pytorch_ext.backends.use(name):
                for case in bench_overhead.cases(options.device):
                    progress.step(case.name)
                    _overhead(case, name, calls, blocks, options, found)

        return Part(f"overhead: {name}", 30.0, do)

    return [part(name) for name in backends.available() if name != "reference"]


def _overhead(
    case: bench_overhead.Case, name: str, calls: int, blocks: int, options: Options, found: Run
) -> None:
    if why := backends.why_not(name, case.op, *case.leaves):
        found.note(f"left out: {name} for {case.op}: {'; '.join(why)}")
        return
    agreement = bench_overhead.check(case)
    if not agreement.ok:
        found.red.append(f"overhead: {case.name}: {name} {agreement}; no time is shown")
        return
    for line, timings in bench_overhead.measure(case, calls, blocks, options.device):
        named = {"native": "PyTorch", "ours": name}
        own = type(timings)({named[key]: [s / calls for s in v] for key, v in timings.seconds.items()})
        facts = {"limit_us": bench_overhead.LIMIT_US[line.mode], **asdict(line)}
        where = {"suite": "overhead", "case": f"{case.name}, {line.mode}, {name}", "dtype": "fp32"}
        found.add(own, "PyTorch", {name}, dict.fromkeys(own.seconds, facts), **where)
