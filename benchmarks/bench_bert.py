"""BERT end to end: every way to run it, interleaved in one process, outputs compared before any time is shown.

    python -m benchmarks.bench_bert --fill 27 --dtype fp32
    python -m benchmarks.bench_bert --mode train --fill 27 --contenders eager,compile,native
    python -m benchmarks.bench_bert --model minilm --layers 2 --pairs 5 --json out.json

Inference gives the hidden states of a batch without gradients. Training is one full step of a sequence classifier:
forward, backward, fused AdamW, dropout 0.1; its loss and gradients are compared with dropout 0 first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import record, timing
from .bert_contenders import (
    BASELINE,
    DTYPES,
    LENGTHS,
    SHAPES,
    Case,
    autocast,
    contenders,
    default_names,
    hugging_face,
    precision,
)
from .console import Progress, in_red, reason, table

DROPOUT = 0.1
Inputs = dict[str, torch.Tensor]


@dataclass
class Row:
    """What came out for one contender."""

    name: str
    what: str
    note: str = ""
    first_call_seconds: float = 0.0
    agreement: timing.Agreement | None = None
    memory: timing.Memory | None = None
    precision: str = ""  # where it is another one than the case's
    run: Callable[[Inputs], object] | None = None

    @property
    def red(self) -> bool:
        return self.agreement is not None and not self.agreement.ok


def outputs(model: nn.Module, case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """What is compared: hidden states at real positions; in training the loss and all gradients."""
    if not case.training:
        with torch.no_grad():
            result = model(**inputs)
        hidden = result if isinstance(result, torch.Tensor) else result.last_hidden_state
        mask = inputs.get("attention_mask")
        return {"hidden states": hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]}
    with autocast(case):
        loss = model(**inputs).loss
    loss.backward()
    # A compiled module names its parameters as the module it wraps, after a prefix.
    gradients = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **{name: grad for name, grad in gradients.items() if grad is not None}}


def agreement(got: Inputs, want: Inputs, limits: dict[Any, float]) -> timing.Agreement:
    """Rows of hidden states one by one; gradients as one long vector, the loss apart from them."""
    if "loss" not in want:
        return timing.compare(got, want, limits)
    loss = timing.compare(got, {"loss": want["loss"]}, limits, rows=False)
    others = {name: tensor for name, tensor in want.items() if name != "loss"}
    return loss.worse(timing.compare(got, others, limits, rows=False))


LEAST_COSINE = 0.99
"""Of a row of hidden states and the baseline's, where a contender computes in another precision."""


def coarse(got: Inputs, want: Inputs, limits: dict[Any, float]) -> timing.Agreement:
    """As `agreement`, for integers: rounding explains nothing there, so the angle of the worst row is judged."""
    found = timing.compare(got, want, limits)
    return dataclasses.replace(found, share=(1.0 - found.cosine) / (1.0 - LEAST_COSINE))


def runner(model: nn.Module, case: Case) -> Callable[[Inputs], object]:
    """What is timed: a forward without gradients, or a full training step."""
    if not case.training:

        def infer(inputs: Inputs) -> object:
            with torch.no_grad():
                return model(**inputs)

        return infer
    # Fused, as Hugging Face's Trainer has it: the optimizer's own time is the same for all contenders.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)

    def step(inputs: Inputs) -> None:
        with autocast(case):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end, so that the memory of a step holds its gradients

    return step


def memory_probe(case: Case, name: str, threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """For a fresh process: one contender, ready to run (see ``timing.peak_memory``), and how to warm it up.

    One short sequence makes the layouts of weights, and the optimizer's state, and little scratch. What was compiled
    for a shape, or captured for one, has to see the shape.
    """
    torch.set_num_threads(threads)
    _, build = contenders(case)[name]
    run = runner(build(case, DROPOUT if case.training else 0.0), case)
    inputs = case.inputs()

    def warm_up() -> None:
        if case.device == "cpu":
            run(
                {name: tensor[:1, :8] if tensor.dim() == 2 else tensor[:1] for name, tensor in inputs.items()}
            )
        if case.device != "cpu" or torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            run(inputs)

    return warm_up, lambda: run(inputs)


def prepare(case: Case, names: list[str], inputs: Inputs, progress: Progress) -> list[Row]:
    """Build every contender, compare it with the baseline, and only then make it ready to be timed."""
    known = contenders(case)
    truth_dtype = timing.precision_up(case.dtype)
    precise = Case(**{**vars(case), "dtype": torch.float32}) if case.training else case  # no autocast
    progress.start("the precise run that shows what rounding explains")
    truth = outputs(hugging_face(precise, dtype=truth_dtype), precise, inputs)
    want = outputs(known[BASELINE][1](case, 0.0), case, inputs)
    limits = timing.rounding_limits(want, truth)
    del truth
    rows = []
    for name in names:
        what, build = known[name]
        row = Row(name, what)
        rows.append(row)
        progress.start(f"{name}: {what}")
        start = time.perf_counter()
        try:
            model = build(case, 0.0)
            got = outputs(model, case, inputs)
        except Exception as error:
            row.note = reason(error)
            continue
        row.first_call_seconds = time.perf_counter() - start
        row.precision = precision(name)
        if name != BASELINE:
            row.agreement = (agreement if not row.precision else coarse)(got, want, limits)
        if not row.red:
            row.run = runner(build(case, DROPOUT) if case.training else model, case)
    progress.done()
    return rows


def measure(
    rows: list[Row], case: Case, inputs: Inputs, pairs: int, progress: Progress
) -> timing.Timings | None:
    """Time the contenders that agree, in rotating order."""
    ready = {row.name: row.run for row in rows if row.run is not None}
    if BASELINE not in ready:
        return None
    progress.start(f"timing {', '.join(ready)}")
    # The second warm-up call is for the compiler, which may look at a shape twice.
    timings = timing.interleave(
        ready, [inputs], rounds=pairs, warmup=2, device=case.device, progress=progress.step
    )
    progress.done()
    return timings


def as_record(case: Case, rows: list[Row], timings: timing.Timings | None) -> dict[str, Any]:
    """Everything that was measured, and what the numbers depend on."""
    masked = case.fill != "100"
    kernel = record.sdpa_backend(
        case.batch,
        case.heads,
        case.seq,
        case.hidden // case.heads,
        dtype=case.dtype,
        device=case.device,
        masked=masked,
    )
    real = sum(case.lengths)
    result: dict[str, Any] = {
        "benchmark": "bench_bert",
        "environment": record.environment(case.device),
        "case": {**vars(case), "dtype": next(name for name, dtype in DTYPES.items() if dtype == case.dtype)},
        "lengths": case.lengths,
        "real_tokens": real,
        "filled": real / (case.batch * case.seq),
        "dropout": DROPOUT if case.training else 0.0,
        "baseline": f"{BASELINE}: Hugging Face default, SDPA ({kernel} kernel)",
        "pairs": timings.rounds if timings else 0,
        "contenders": [],
    }
    for row in rows:
        entry: dict[str, Any] = {
            "name": row.name,
            "what": row.what,
            "note": row.note,
            "first_call_seconds": row.first_call_seconds,
            "agreement": {**asdict(row.agreement), "ok": row.agreement.ok} if row.agreement else None,
            "memory": asdict(row.memory) if row.memory else None,
        }
        if timings and row.name in timings.seconds:
            median = timings.median(row.name)
            entry |= {
                "seconds": timings.seconds[row.name],
                "median_seconds": median,
                "real_tokens_per_second": real / median,
                "speedup": asdict(timings.ratio(row.name, BASELINE)),
            }
        result["contenders"].append(entry)
    return result


def as_text(result: dict[str, Any], rows: list[Row]) -> str:
    """The table."""
    case, environment = result["case"], result["environment"]
    versions = environment["versions"]
    threads = f", {environment['threads']} threads" if environment["device_type"] == "cpu" else ""
    title = [
        f"BERT {case['hidden']} x {case['layers']} layers, {case['mode']}, {case['dtype']}: {case['batch']} x "
        f"{case['seq']} positions, {result['filled']:.0%} of them real",
        f"{environment['device']}{threads}; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"commit {environment['commit']}; {result['pairs']} pairs",
        "",
    ]
    header = ["", "ms", "tokens/s", "speed-up", "quartiles", "memory", "difference", "cosine", "first call"]
    body, red, notes = [], set(), []
    for place, (row, entry) in enumerate(zip(rows, result["contenders"], strict=True)):
        found = row.agreement
        memory = f"{row.memory.bytes / 1e6:,.0f} MB" if row.memory else ""
        compared = [f"{found.largest:.0e}", f"{found.cosine:.6f}"] if found else ["", ""]
        if "median_seconds" in entry:
            ratio = entry["speedup"]
            speed = [
                f"{entry['median_seconds'] * 1e3:,.1f}",
                f"{entry['real_tokens_per_second']:,.0f}",
                f"{ratio['median']:.2f} x",
                "" if row.name == BASELINE else f"{ratio['low']:.2f}-{ratio['high']:.2f}",
            ]
        else:
            speed = ["-"] * 4
            notes.append(f"{row.name}: {row.agreement if row.red else row.note}")
            if row.red:
                red.add(place)
                notes[-1] = in_red(notes[-1] + "; no time is shown")
        body.append([row.name, *speed, memory, *compared, f"{row.first_call_seconds:.1f} s"])
    return "\n".join([*title, table(header, body, frozenset(red)), *notes])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_bert", description=__doc__.splitlines()[0])
    parser.add_argument("--fill", choices=LENGTHS, default="27", help="how full the batch is, in %%")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--model", choices=SHAPES, default="base", help="a shape; the weights are random")
    for name in ("hidden", "layers", "heads", "intermediate"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", help="a comma-separated list; the baseline is always there")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--pairs", type=int, default=7, help="rounds in which each contender runs once")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", action="store_true", help="measure peak memory in fresh processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    options = parser.parse_args(argv)
    if options.model == "vit-base":
        options.seq, options.fill = 197, "100"  # its pictures' patches and one more
    for name in ("hidden", "layers", "heads", "intermediate"):
        if getattr(options, name) is None:
            setattr(options, name, SHAPES[options.model][name])
    for name in ("hidden", "layers", "heads", "intermediate", "batch", "seq", "pairs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if options.hidden % options.heads:
        parser.error(f"--hidden {options.hidden} is no multiple of --heads {options.heads}")
    options.case = _case(options)
    options.names = _names(options, parser)
    return options


def _case(options: argparse.Namespace) -> Case:
    fields = ("hidden", "layers", "heads", "intermediate", "batch", "seq", "fill", "mode", "device")
    family = SHAPES[options.model].get("family", "bert")
    return Case(
        **{name: getattr(options, name) for name in fields}, dtype=DTYPES[options.dtype], family=family
    )


def _names(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    known = contenders(options.case)
    if options.contenders is None:
        names = default_names(options.case)
    else:
        names = [BASELINE, *(name for name in options.contenders.split(",") if name != BASELINE)]
        for name in names:
            if name not in known:
                parser.error(f"no such contender: {name} (one of {', '.join(known)})")
    return [name for name in names if options.compile or name not in ("compile", "max-autotune")]


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 when a contender disagreed."""
    options = arguments(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    case, progress = options.case, Progress()
    inputs = case.inputs()
    rows = prepare(case, options.names, inputs, progress)
    timings = measure(rows, case, inputs, options.pairs, progress)
    if options.memory:
        for row in (row for row in rows if row.run is not None):
            progress.start(f"peak memory of {row.name}")
            threads = torch.get_num_threads()
            row.memory = timing.peak_memory(memory_probe, case, row.name, threads, device=case.device)
        progress.done()
    result = as_record(case, rows, timings)
    print(as_text(result, rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row.red for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
