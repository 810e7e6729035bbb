"""The parts of the suite that time whole models: inference, training, ways to batch, fresh processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import batching, bench_bert, timing
from .bert_contenders import BASELINE, DTYPES, SHAPES, Case, contenders, default_names, left_out
from .console import Bar, Progress
from .parts import OURS, Options, Part
from .runs import IN_BATCHES, Run, Series, bert_name

FEW = (
    *(BASELINE, "native", "native-padded", "cpu", "cpu-padded"),
    *("triton", "triton-padded", "cuda", "cuda-padded", "auto"),
)
BATCHED = tuple(name for name in FEW if name not in ("native-padded", "auto"))
SLOW = ("flex", "max-autotune", "reduce-overhead", "compile-frozen", "onnxruntime", "openvino-int8")
TINY = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64}


def inference(options: Options) -> list[Part]:
    """Fills, lengths and models, then batches; one case has everyone."""
    if options.tiny:
        return [
            models(_case(options, TINY, batch=4, seq=16, fill=fill), FEW, 2, 1.0) for fill in ("27", "60")
        ]
    if options.suite == "quick":
        shape = {**SHAPES["minilm"], "layers": 2}
        rest = [_case(options, shape, seq=128, fill=fill) for fill in ("60", "sorted", "100")]
        rest += [_case(options, shape, seq=64)]
        first = _case(options, shape, seq=128)
        few = [models(case, FEW, 5, 5.0) for case in rest]
        return [*few, in_batches(first, 32, 3, 10.0), models(first, _everyone(first), 5, 150.0)]
    shape = SHAPES["base"]
    fills = ("27", "sorted", "100") if options.on_gpu else ("60", "sorted", "100")
    first = _case(options, shape, fill="60" if options.on_gpu else "27")
    rest = [_case(options, shape, fill=fill) for fill in fills]
    rest += [_case(options, shape, seq=seq) for seq in (64, 128, 512)]
    rest += [_case(options, SHAPES[name]) for name in ("minilm", "large")]
    rest += [_case(options, SHAPES["vit-base"], seq=197, fill="100")]
    if options.on_gpu:  # launches alone, and as many tokens as it takes to fill it
        rest[:0] = [
            _case(options, shape, batch=1, seq=128, fill="100"),
            _case(options, shape, batch=64, fill="60"),
        ]
    pairs = 25 if options.on_gpu else 7
    usual = [name for name in _everyone(first) if name not in SLOW]
    slow = [BASELINE, *(name for name in _everyone(first) if name in (*SLOW, "auto"))]
    return [
        models(first, usual, pairs, 240.0),
        *(models(case, FEW, pairs, 60.0) for case in rest),
        in_batches(_case(options, shape), 64, 5, 120.0),
        models(first, slow, pairs, 360.0, ", slow to prepare"),  # last, as they may take very long
    ]


def training(options: Options) -> list[Part]:
    """A step over fills; and all texts once, batched in three ways."""
    if options.quick:
        shape = TINY if options.tiny else {**SHAPES["minilm"], "layers": 1}
        sizes = {"batch": 4, "seq": 16} if options.tiny else {"seq": 128}
        return [models(_case(options, shape, mode="train", **sizes), FEW, 3, 10.0)]
    fills = ("60", "27", "100") if options.on_gpu else ("27", "60", "100")
    cases = [_case(options, SHAPES["base"], mode="train", fill=fill) for fill in fills]
    few = {**SHAPES["base"], "layers": 4}
    return [
        *(models(case, default_names(case), 10 if options.on_gpu else 3, 300.0) for case in cases),
        in_batches(_case(options, few, mode="train"), 64, 3, 240.0),
    ]


def first_call(options: Options) -> list[Part]:
    """Building a model and its first result, each contender in a fresh process."""
    return _apart(options, _first_call, ("infer",))


def memory(options: Options) -> list[Part]:
    """What a call needs above its weights, in a fresh process."""
    return _apart(options, _memory, ("train", "infer"))


def _case(options: Options, shape: dict[str, Any], **changes: Any) -> Case:
    fields = {"batch": 16, "seq": 256, "fill": "27", "mode": "infer", "device": options.device}
    return Case(**shape, **{**fields, **changes}, dtype=DTYPES[options.dtype])


def _everyone(case: Case) -> list[str]:
    return [name for name in contenders(case) if not name.startswith("reference")]


def _suite(case: Case) -> str:
    return "train" if case.training else "bert"


def _dtype(case: Case) -> str:
    return next(name for name, kind in DTYPES.items() if kind == case.dtype)


def models(case: Case, names: Sequence[str], pairs: int, seconds: float, more: str = "") -> Part:
    """Those of `names` that can run it, on one batch; `more` tells two parts of one case apart."""
    label = bert_name(vars(case)) + more

    def do(found: Run, progress: Bar) -> None:
        inputs, shown = case.inputs(), _Quiet(progress)
        run = lambda known: (  # noqa: E731
            rows := bench_bert.prepare(case, known, inputs, shown),
            bench_bert.measure(rows, case, inputs, pairs, shown),
        )
        _told(case, names, label, sum(case.lengths), case.batch * case.seq, run, found)

    return Part(f"{_suite(case)}: {label}", seconds, do)


def in_batches(case: Case, texts: int, pairs: int, seconds: float) -> Part:
    """As many texts in batches as they come, sorted by length, and by tokens."""
    name = f"{bert_name(vars(case)).rpartition(', ')[0].rpartition(', ')[0]}, {texts} {IN_BATCHES}"

    def do(found: Run, progress: Bar) -> None:
        work = batching.Texts(case, texts)
        shown = _Quiet(progress)
        run = lambda known: batching.run(work, known, pairs, shown)  # noqa: E731
        _told(case, BATCHED, name, sum(work.lengths), work.positions(batching.COME), run, found)

    return Part(f"{_suite(case)}: {name}", seconds, do)


def _told(
    case: Case,
    names: Sequence[str],
    label: str,
    real: int,
    positions: int,
    run: Callable[[list[str]], tuple[list[bench_bert.Row], timing.Timings | None]],
    found: Run,
) -> None:
    """Runs it and tells the run what came out."""
    suite, known = _suite(case), contenders(case)
    absent = left_out(case)
    if BASELINE in absent:
        found.note(f"left out: {suite}: {label}: {absent[BASELINE]}")
        return
    for name, why in absent.items():
        found.note(f"left out: {name}: {why}")
    torch._dynamo.reset()
    rows, timings = run([name for name in names if name in known])
    where = f"{suite}: {label}"
    for row in rows:
        if row.red:
            found.red.append(f"{where}: {row.name} {row.agreement}; no time is shown")
        elif row.note:
            found.note(f"left out: {row.name}, {where}: {row.note}")
    if timings is None:
        return
    told = {key: value for key, value in vars(case).items() if key != "dtype"}
    told |= {"real_tokens": real, "filled": real / positions}
    facts = {
        row.name: {**told, "what": row.what, "first_call": row.first_call_seconds, "precision": row.precision}
        for row in rows
    }
    ours = {name for name in timings.seconds if name.partition(",")[0].removesuffix("-padded") in OURS}
    found.add(timings, BASELINE, ours, facts, suite=suite, case=label, dtype=_dtype(case))


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


def _apart(options: Options, measure: Callable[[Case, str, Run], None], modes: Sequence[str]) -> list[Part]:
    shape = TINY if options.tiny else {**SHAPES["base"], "layers": 12 if options.on_gpu else 4}
    cases = [_case(options, shape, mode=mode, fill="60" if options.on_gpu else "27") for mode in modes]
    return [
        Part(
            f"{measure.__name__.strip('_').replace('_', ' ')}: {case.mode}, {name}",
            30.0,
            lambda found, _, case=case, name=name: measure(case, name, found),
        )
        for case in cases
        for name in _few_apart(case, options)
    ]


def _few_apart(case: Case, options: Options) -> list[str]:
    """A process for each takes long: on a GPU, where time is short, those that a user chooses between."""
    if options.tiny:
        return ["native"]
    few = {*FEW, "compile"} - {"native-padded", "cpu-padded"}
    return [name for name in default_names(case) if not options.on_gpu or name in few]


def _memory(case: Case, name: str, found: Run) -> None:
    used = timing.peak_memory(
        bench_bert.memory_probe, case, name, torch.get_num_threads(), device=case.device
    )
    label = f"{_suite(case)}: {bert_name(vars(case))}, {_dtype(case)}"
    if used is None:
        found.note(f"left out: memory of {name}, {label}: the fresh process gave no answer")
        return
    found.memory.append({"case": label, "contender": name, "bytes": used.bytes, "method": used.method})


def _first_call(case: Case, name: str, found: Run) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds = pool.submit(seconds_to_first_result, case, name, torch.get_num_threads()).result()
    facts = {"what": "building the model and its first call, in a fresh process, imports apart"}
    found.series.append(
        Series("first call", bert_name(vars(case)), _dtype(case), name, [seconds], name in OURS, None, facts)
    )


def seconds_to_first_result(case: Case, name: str, threads: int) -> float:
    """From nothing but imports."""
    torch.set_num_threads(threads)
    inputs, known = case.inputs(), contenders(case)
    start = time.perf_counter()
    bench_bert.runner(known[name][1](case, 0.0), case)(inputs)
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
