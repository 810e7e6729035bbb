"""Every family of models that optimize knows, as it comes and optimised, at 27 % fill: equal first, then timed.

    python -m benchmarks.bench_families
    python -m benchmarks.bench_families --only MPNet,ModernBert --mode train --compile
    python -m benchmarks.bench_families --dtype bf16 --layers 2 --save

Inference is a forward without gradients, training a forward and a backward with dropout 0. The contenders of a family
take turns in one process; the speed-up is the median over their pairs. A family whose outputs (in training: whose loss
and gradients) differ by more than rounding explains gets no time.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pytorch_ext

from . import op_report, record, timing
from .console import Bar, in_red, reason, table
from .families import Family, Inputs, Shape, families

BASELINE, OURS, COMPILED = "original", "optimized", "compile"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Result:
    """What came out for one family."""

    family: str
    note: str = ""
    padding: str = ""
    agreement: dict[str, timing.Agreement] = field(default_factory=dict)
    timings: timing.Timings | None = None

    @property
    def red(self) -> bool:
        """Whether ours broke, or disagreed."""
        return bool(self.note) or any(not found.ok for found in self.agreement.values())


def at(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if value.is_floating_point() else value


def step(model: nn.Module, family: Family, shape: Shape, training: bool) -> Callable[[Inputs], Any]:
    """What is timed: returns what is compared."""

    def infer(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage.*")
            return family.output(family.call(model, inputs), shape)

    def train(inputs: Inputs) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = family.output(family.call(model, inputs), shape).float().square().mean()
        loss.backward()
        return loss.detach()

    return train if training else infer


def outputs(model: nn.Module, result: torch.Tensor, training: bool) -> dict[str, torch.Tensor]:
    """What is compared: real positions, or the loss and every gradient."""
    if not training:
        return {"hidden states": result}
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"loss": result} | {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def contenders(
    family: Family, shape: Shape, options: argparse.Namespace
) -> dict[str, Callable[[], nn.Module]]:
    def build() -> nn.Module:
        return family.build(shape).to(DTYPES[options.dtype]).train(options.mode == "train")

    found = {BASELINE: build, OURS: lambda: pytorch_ext.optimize(build(), backend=options.backend)}
    if options.compile:
        found[COMPILED] = lambda: torch.compile(build())
    return found


def run(family: Family, options: argparse.Namespace, progress: Bar) -> Result:
    """Build, compare, and time those that agree."""
    shape, training, dtype = options.shape, options.mode == "train", DTYPES[options.dtype]
    result = Result(family.name)
    inputs = {name: at(t, dtype) for name, t in family.inputs(shape).items()}
    ready: dict[str, Callable[[Inputs], Any]] = {}
    want = limits = None
    for name, build in contenders(family, shape, options).items():
        progress.step(name)
        try:
            model = build()
            call = step(model, family, shape, training)
            got = outputs(model, call(inputs), training)
        except Exception as error:
            result.note = result.note or f"{name}: {reason(error)}"
            continue
        if name == BASELINE:
            precise = family.build(shape).to(timing.precision_up(dtype)).train(training)
            wide = {key: at(t, timing.precision_up(dtype)) for key, t in inputs.items()}
            want = got
            truth = outputs(precise, step(precise, family, shape, training)(wide), training)
            limits = timing.rounding_limits(want, truth)
            del precise, truth
        else:
            result.agreement[name] = timing.compare(got, want, limits, rows=not training)
            if not result.agreement[name].ok:
                continue
        if name == OURS:
            last = [line for line in pytorch_ext.explain(model).padding if "last forward" in line]
            result.padding = last[0].partition("last forward ")[2] if last else "none removed"
        ready[name] = call
    if BASELINE in ready and OURS in ready:
        progress.step("timing")
        result.timings = timing.interleave(ready, [inputs], rounds=options.pairs, warmup=2)
    return result


def as_record(results: list[Result], options: argparse.Namespace) -> dict[str, Any]:
    shape = options.shape
    cases = []
    for result in results:
        case: dict[str, Any] = {"family": result.family, "dtype": options.dtype, "note": result.note}
        case |= {"padding": result.padding}
        case["agreement"] = {
            name: {**asdict(found), "ok": found.ok} for name, found in result.agreement.items()
        }
        if result.timings is not None:
            case["seconds"] = {name: result.timings.median(name) for name in result.timings.seconds}
            others = [name for name in result.timings.seconds if name != BASELINE]
            case["speedup"] = {name: asdict(result.timings.ratio(name, BASELINE)) for name in others}
        cases.append(case)
    return {
        "benchmark": "bench_families" + ("" if options.mode == "infer" else "-train"),
        "environment": record.environment(),
        "shape": {
            **asdict(shape),
            "lengths": shape.lengths,
            "filled": sum(shape.lengths) / shape.mask.numel(),
        },
        "mode": options.mode,
        "backend": options.backend or pytorch_ext.backends.requested(),
        "baseline": "the model as it comes: Hugging Face's default attention (SDPA; eager for MPNet, which has no "
        "other), nn.TransformerEncoder with its own nested tensors",
        "pairs": options.pairs,
        "cases": cases,
    }


def as_text(found: dict[str, Any]) -> str:
    """The table, drawn by rich where it is there."""
    shape, environment = found["shape"], found["environment"]
    versions = environment["versions"]
    title = (
        f"{shape['hidden']} x {shape['layers']} layers, {found['mode']}, {found['cases'][0]['dtype']}: "
        f"{shape['batch']} x {shape['seq']} positions, {shape['filled']:.0%} of them real\n"
        f"{environment['device']}, {environment['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {environment['commit']}; {found['pairs']} pairs"
    )
    compiled = any(COMPILED in case.get("speedup", ()) for case in found["cases"])
    header = [
        "",
        "original",
        "optimized",
        "speed-up",
        "quartiles",
        *["compile"] * compiled,
        "difference",
        "padding",
    ]
    body, red, notes = [], set(), []
    for place, case in enumerate(found["cases"]):
        ours = case["agreement"].get(OURS)
        difference = f"{ours['largest']:.0e}" if ours else ""
        ratios, seconds = case.get("speedup", {}), case.get("seconds", {})
        if OURS in ratios:
            ratio = ratios[OURS]
            cells = [f"{seconds[name] * 1e3:,.0f} ms" for name in (BASELINE, OURS)]
            cells += [f"{ratio['median']:.2f} x", f"{ratio['low']:.2f}-{ratio['high']:.2f}"]
            if compiled:
                cells.append(f"{ratios[COMPILED]['median']:.2f} x" if COMPILED in ratios else "-")
        else:
            cells = ["-"] * (4 + compiled)
        if case["note"] or (ours and not ours["ok"]):
            red.add(place)
            wrong = (
                "" if not ours or ours["ok"] else "differs by more than rounding explains; no time is shown"
            )
            notes.append(in_red(f"{case['family']}: {case['note'] or wrong}"))
        body.append([case["family"], *cells, difference, case["padding"].partition(":")[0]])
    return "\n".join([title, "", _drawn(header, body, frozenset(red)), *notes])


def _drawn(header: list[str], body: list[list[str]], red: frozenset[int]) -> str:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # it comes with the extra `bench`
        return table(header, body, red)
    drawn = Table()
    for place, name in enumerate(header):
        drawn.add_column(name, justify="left" if place in (0, len(header) - 1) else "right", no_wrap=True)
    for place, cells in enumerate(body):
        drawn.add_row(*cells, style="red" if place in red else None)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(drawn)
    return shown.get().rstrip()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_families", description=__doc__.splitlines()[0])
    names = [family.name for family in families()]
    parser.add_argument("--only", help=f"some of {','.join(names)}")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--backend", choices=pytorch_ext.backends.names(), help="by default the fastest")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the original too (minutes)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which each contender runs once")
    parser.add_argument("--threads", type=int)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=op_report.RESULTS,
        metavar="FILE",
        help="write the record there, by default into benchmarks/results/<device>/",
    )
    options = parser.parse_args(argv)
    for name in (*asdict(Shape()), "pairs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.hidden % options.heads:
        parser.error(f"--hidden {options.hidden} is no multiple of --heads {options.heads}")
    options.shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such family: {', '.join(sorted(unknown))} (one of {', '.join(names)})")
    options.families = [family for family in families() if family.name in wanted]
    return options


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 when a family broke or disagreed."""
    options = arguments(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = []
    with Bar(len(options.families)) as progress:
        for family in options.families:
            progress.start(family.name)
            results.append(run(family, options, progress))
    found = as_record(results, options)
    print(as_text(found))
    if options.save is not None:
        print(f"\nrecord: {op_report.save(found, options.save)}")
    return 1 if any(result.red for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
