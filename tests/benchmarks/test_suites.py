"""The suite: a run on tiny shapes, its record as pytest-benchmark reads it, its page, and regressions in records."""

import contextlib
import dataclasses
import json
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from typer.testing import CliRunner

from pytorch_ext.benchmarks import (
    __main__ as without_typer,
)
from pytorch_ext.benchmarks import (
    batching,
    bench_bert,
    bench_gelu,
    bert_contenders,
    op_bench,
    op_limits,
    op_report,
    page,
    record,
    replay,
    runs,
    suite_models,
    suite_ops,
    suite_table,
    suites,
)
from pytorch_ext.commands.bench import bench

TINY = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64}
NAMES = ("eager", "native", "native-padded")


@pytest.fixture
def tiny(monkeypatch):
    """A quick run that takes seconds: two ops, and one BERT at two fills."""
    monkeypatch.setattr(bench_gelu, "QUICK_FEATURES", (24,))
    monkeypatch.setattr(bench_gelu, "QUICK_TOKENS", (7,))
    monkeypatch.setattr(suite_ops, "OPS", (bench_gelu,))
    monkeypatch.setattr(op_limits, "COPY_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr(op_limits, "LARGEST_PRODUCT", {"cpu": 256})
    monkeypatch.setattr(op_bench, "default_names", lambda: ["native"])
    monkeypatch.setattr(suites, "QUICK", (suite_ops.single, inference))


def inference(options):
    return [bert("27"), bert("60")]


def bert(fill, names=NAMES):
    case = bert_contenders.Case(
        **TINY, batch=4, seq=16, fill=fill, dtype=torch.float32, mode="infer", device="cpu"
    )
    return suite_models.models(case, names, 3, 1.0)


def test_a_run_leaves_a_table_a_record_and_a_page(tiny, tmp_path):
    done = CliRunner().invoke(bench, ["--tiny", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "bert: BERT 32 x 1, 4 x 16, 27 %, fp32" in done.output
    raw = json.loads((tmp_path / "quick-fp32.json").read_text())
    by_name = {one["name"]: one for one in raw["benchmarks"]}
    native = by_name["test_measured[bert: BERT 32 x 1, 4 x 16, 27 %, fp32: native]"]
    assert native["stats"]["rounds"] == 3
    assert native["stats"]["median"] == pytest.approx(sorted(native["stats"]["data"])[1])
    run = runs.load(tmp_path / "quick-fp32.json")
    assert {one.suite for one in run.series} == {"ops", "bert"}
    assert run.environment["versions"]["torch"] == torch.__version__
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/png;base64,") >= 3
    assert "src=" not in text.replace('src="data:', "")  # self-contained
    assert run.environment["how_timed"].partition(";")[0] in text
    assert {file.stem for file in tmp_path.glob("*.png")} >= {"speedups", "roofline", "fill"}


def test_a_wrong_kernel_gets_a_red_line_and_no_time(tiny, monkeypatch, tmp_path):
    genuine = bert_contenders.contenders

    def with_a_wrong_one(case):
        def build(case, dropout):
            model = bert_contenders.hugging_face(case)
            with torch.no_grad():
                model.encoder.layer[0].output.dense.bias[3] += 0.01
            return model

        return {**genuine(case), "wrong": ("one bias is off", build)}

    for module in (bench_bert, suite_models):
        monkeypatch.setattr(module, "contenders", with_a_wrong_one)
    monkeypatch.setattr(suites, "QUICK", (lambda options: [bert("27", (*NAMES, "wrong"))],))
    done = CliRunner().invoke(bench, ["--tiny", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "wrong DISAGREES" in done.output and "no time is shown" in done.output
    run = runs.load(tmp_path / "quick-fp32.json")
    assert {one.contender for one in run.series} == set(NAMES)
    assert 'class="red">bert: BERT' in (tmp_path / "index.html").read_text()


def test_what_does_not_fit_is_left_out_and_what_is_done_is_kept(monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 40.0])  # the start, and before each part
    monkeypatch.setattr(suites.time, "monotonic", lambda: next(clock, 40.0))
    done, kept = [], []
    wanted = {"one": 5.0, "two": 5.0, "long": 50.0}
    made = [
        suites.Part(name, seconds, lambda *_, name=name: done.append(name))
        for name, seconds in wanted.items()
    ]
    monkeypatch.setattr(suites, "parts", lambda options: made)
    monkeypatch.setattr(suites, "Bar", lambda *_: Silent())
    found = suites.run(suites.Options(seconds=60.0), lambda run: kept.append(list(done)))
    assert done == ["one", "two"]
    assert kept == [["one"], ["one", "two"]]
    assert found.notes == ["left out: long: no time left of 60 s"]


class Silent(contextlib.nullcontext):
    def __enter__(self):
        return self

    def start(self, label):
        pass

    step = start


def tiny_case(mode):
    return bert_contenders.Case(
        **TINY, batch=4, seq=32, fill="27", dtype=torch.float32, mode=mode, device="cpu"
    )


def test_batches_hold_the_same_texts_with_less_padding_the_better_they_are_made():
    work = batching.Texts(tiny_case("infer"), 24)
    for how in (batching.COME, batching.SORTED, batching.BUDGET):
        assert sorted(number for batch in work.order(how) for number in batch) == list(range(24))
        for batch in work.batches(how):
            assert batch["attention_mask"][:, 0].all()
    assert work.positions(batching.SORTED) < work.positions(batching.COME)
    assert len(work.order(batching.BUDGET)) < len(work.order(batching.SORTED))
    most = 4 * max(work.lengths)
    assert all(batch["input_ids"].numel() <= most for batch in work.batches(batching.BUDGET))


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_every_way_to_batch_is_compared_text_by_text(mode, monkeypatch):
    genuine = batching.Texts.order

    def one_text_twice(work, how):
        batches = genuine(work, how)
        return [*batches[:-1], [batches[0][0], *batches[-1][1:]]] if how == batching.SORTED else batches

    monkeypatch.setattr(batching.Texts, "order", one_text_twice)
    found = runs.Run("bert", {})
    suite_models.in_batches(tiny_case(mode), 12, 2, 1.0).run(found, Silent())
    names = {one.contender for one in found.series}
    assert {"eager", "native", "native, by tokens", "cpu-padded, by tokens"} <= names
    assert all(len(one.seconds) == 2 and one.speedup["pairs"] == 2 for one in found.series)
    assert {one.contender: one.ours for one in found.series}["native, by tokens"]
    assert not any("sorted" in name for name in names)  # red, or an error: a text is missing
    assert any("eager, sorted" in sentence for sentence in found.red + found.notes)


def test_without_typer_it_is_the_same_command(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(suites, "command", lambda *what: asked.append(what) or 0)
    assert without_typer.main(["--suite", "train", "--dtype", "bf16", "--out", str(tmp_path)]) == 0
    assert asked == [(suites.Options("train", dtype="bf16"), tmp_path)]
    with pytest.raises(SystemExit):
        without_typer.main(["--suite", "fast"])
    assert "--suite must be one of quick, ops" in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["pytest_benchmark", None])
def test_a_record_does_not_need_pytest_benchmark(absent, monkeypatch, tmp_path):
    genuine = runs.importlib.util.find_spec
    monkeypatch.setattr(
        runs.importlib.util, "find_spec", lambda name: None if name == absent else genuine(name)
    )
    run = synthetic(0)
    run.notes.append("left out: somebody: not here")
    file = runs.save(run, tmp_path / "record.json")
    assert ("benchmarks" in json.loads(file.read_text())) == (absent is None)
    assert runs.load(file) == run


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--suite", "fast"], "--suite must be one of quick, ops"),
        (["--dtype", "fp8"], "--dtype must be one of fp32"),
        (["--filter", "nothing"], "no part of the suite quick"),
        (["compare", "/no/such/old.json", "/no/such/new.json"], "is no record"),
        (["compare", "one.json"], "takes two records"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence):
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 2
    assert sentence in done.output


# --- Records --------------------------------------------------------------------------------------


def synthetic(seed, slower=1.0, noise=0.02, names=("eager", "native", "cpu")):
    """A run with times drawn around a median of each contender; `cpu` is `slower` times as slow."""
    draw = random.Random(seed)
    run = runs.Run("quick", record.environment())
    for place, name in enumerate(names):
        median = (place + 1) * 1e-3 * (slower if name == "cpu" else 1.0)
        seconds = [float(f"{median * draw.gauss(1.0, noise):.5g}") for _ in range(15)]  # as records keep them
        run.series.append(runs.Series("bert", "a case", "fp32", name, seconds))
    return run


def test_the_clock_shows_each_duration_in_turn():
    ticking = replay.Clock([0.25, 0.5])
    assert [ticking() for _ in range(4)] == [0.0, 0.25, 0.0, 0.5]


def test_a_run_of_memory_alone_leaves_a_record_and_a_picture(tmp_path):
    run = runs.Run("memory", record.environment())
    run.memory.append({"case": "a case", "contender": "native", "bytes": 46_000_000, "method": "told"})
    assert runs.load(runs.save(run, tmp_path / "record.json")) == run
    page.write(run, tmp_path)
    assert [file.stem for file in tmp_path.glob("*.png")] == ["memory"]


@pytest.mark.full
def test_what_runs_in_a_fresh_process_leaves_its_figures():
    case = bert_contenders.Case(
        **TINY, batch=4, seq=16, fill="27", dtype=torch.float32, mode="infer", device="cpu"
    )
    assert 0 < suite_models.seconds_to_first_result(case, "native", 1) < 30
    found = runs.Run("memory", {})
    suite_models._memory(case, "native", found)
    assert found.memory[0]["contender"] == "native" and found.memory[0]["bytes"] >= 0


def test_records_that_are_there_are_read():
    files = sorted(op_report.RESULTS.glob("*/be*.json"))
    found = [runs.load(file) for file in files if "families" not in file.name]
    assert len(found) >= 12
    for run in found:
        assert run.series and all(one.median > 0 for one in run.series)
        assert page.speedups(run) is not None


@pytest.mark.parametrize("device", ["amd-epyc-avx512-2-threads", "amd-epyc-avx2-2-threads"])
def test_a_page_is_made_of_the_records_that_are_there(device, tmp_path):
    records = op_report.RESULTS / device
    done = CliRunner().invoke(bench, ["page", str(records), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "index.html").read_text()
    assert "bert: BERT 768 x 12, 16 x 256, 27 %" in text


def verdicts(old, new):
    return {one.name.rpartition(" ")[2]: one.verdict for one in runs.changes(old, new)}


def test_noise_is_no_regression():
    for seed in range(20):
        assert set(verdicts([synthetic(seed)], [synthetic(seed + 100)]).values()) == {""}


def test_a_regression_is_caught_and_an_improvement_named():
    for seed in range(20):
        assert verdicts([synthetic(seed)], [synthetic(seed + 100, 1.25)]) == {
            "eager": "",
            "native": "",
            "cpu": "slower",
        }
        assert verdicts([synthetic(seed)], [synthetic(seed + 100, 0.7)])["cpu"] == "faster"


def test_repeated_runs_widen_the_band():
    """One run repeats itself within 2 %, but the next one lies 15 % apart: that much is noise on this machine."""
    old = [synthetic(seed, slower) for seed, slower in enumerate((1.0, 1.15, 1.07))]
    assert verdicts(old, [synthetic(9, 1.2)])["cpu"] == ""
    assert verdicts(old, [synthetic(9, 1.5)])["cpu"] == "slower"


def test_compare_ends_with_the_status_of_a_gate(tmp_path):
    for name, slower in (("old", 1.0), ("same", 1.0), ("slow", 1.4)):
        record = {"pytorch_ext": dataclasses.asdict(synthetic(len(name), slower))}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    def invoke(new):
        return CliRunner().invoke(bench, ["compare", str(tmp_path / "old.json"), str(tmp_path / new)])

    assert invoke("same.json").exit_code == 0
    done = invoke("slow.json")
    assert done.exit_code == 1
    assert "slower" in done.output and "2 of 3 series within their noise" in done.output


def test_on_a_gpu_each_op_has_its_kernels_timed_apart(tiny):
    """With a device whose clock is its own, on CPU tensors: cold, warm, and who cannot be captured is a note."""

    class Fake:
        device, now, captures = "cpu", 0.0, 0

        def event(self):
            return Event()

        def captured(self, call):
            self.captures += 1
            if self.captures == 2:
                raise RuntimeError("no graph here")
            return call

        flush = stall = synchronize = lambda self: None

    class Event:
        def record(self):
            Fake.now += 1.0
            self.at = Fake.now

        def elapsed_time(self, other):
            return other.at - self.at

    found = runs.Run("ops", {})
    case = bench_gelu.gelu(7, 24)
    options = op_bench.arguments("bench", "", ["--no-compile", "--backends", "native"])
    result = op_bench.Result(case, "fp32", op_bench.contenders(case, options, {}))
    suite_ops.on_device(case, result, "fp32", Fake(), 4, found)
    assert [(one.case.rpartition(", ")[2], one.contender) for one in found.series] == [
        *((how, name) for how in ("cold L2", "warm L2") for name in ("eager", "native")),
        ("CUDA graph", "eager"),
    ]
    for one in found.series:
        each = 4 if "graph" in one.case else 1  # calls in a graph
        assert one.seconds == [1e-3 / each] * 4
    assert found.notes == ["left out: gelu 7 x 24, no grad, CUDA graph, native: RuntimeError: no graph here"]


def test_who_was_left_out_for_one_reason_is_on_one_line():
    notes = [
        "left out: a: no GPU: none",
        "left out: b for gelu: slow",
        "something else",
        "left out: c: no GPU: none",
    ]
    together = ["left out: a, c: no GPU: none", "left out: b for gelu: slow", "something else"]
    run = dataclasses.replace(synthetic(0), notes=notes)
    assert suite_table.as_text(run).splitlines()[-4:-1] == together
