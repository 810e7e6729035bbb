"""What tuning measures, takes and writes: with a timer of our own, and kernels that note how they were configured."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="the package triton is not installed")
from pytorch_ext import tune
from pytorch_ext.backends import triton as backend
from pytorch_ext.kernels.triton import configs as configs_module
from pytorch_ext.kernels.triton.configs import Configs
from pytorch_ext.tune.console import Request, measure_with

TABLE = {"BLOCK": 4}


class Refused(Exception):
    """As one of Triton's."""


Refused.__module__ = "triton.runtime.errors"


@pytest.fixture
def op(monkeypatch, tmp_path):
    """One kernel file with one kernel, whose time is the distance of BLOCK from ``best``."""
    monkeypatch.setattr(Configs, "every", {})
    monkeypatch.setenv(configs_module.CACHE, str(tmp_path))
    state = SimpleNamespace(best=16, refuses=(), wrong=(), ran=[], now=0.0)
    row = [((None,), TABLE)]
    state.configs = Configs(
        "op_fwd",
        by=("rows",),
        table=dict.fromkeys(("sm_80", "sm_90", "sm_100"), row),
        wider={"BLOCK": (1, 4, 16, 64)},
        kernels=lambda: [SimpleNamespace(cache_key="source")],
    )

    def call(x):
        block = state.configs.of(x, x.shape[0])["BLOCK"]
        state.ran.append(block)
        state.now += 3.0
        if block in state.refuses:
            raise Refused("out of resource: shared memory")
        return x.new_ones(3) * (2.0 if block in state.wrong else 1.0)

    def calls(sizes, empty):
        x = empty(sizes.batch, 2, dtype=sizes.dtype)
        for _ in range(2):
            yield state.configs, lambda: call(x)

    def timer(call):
        call()
        return 1.0 + abs(state.ran[-1] - state.best)

    state.timer, state.clock = timer, lambda: state.now
    monkeypatch.setattr(backend, "kernel_files", lambda: {"op": SimpleNamespace(calls=calls)})
    return state


def measured(op, batches=(8,)):
    found = tune.jobs(["op"], Request(batch_sizes=list(batches)).sizes(), tune.filled("cpu"))
    op.ran.clear()
    return list(tune.run(found, op.timer, op.clock))


def test_the_fastest_is_taken(op):
    (result,) = measured(op)
    assert result.job.name == "op_fwd (rows 8)" and len(result.job.calls) == 2
    assert (result.before, result.best, result.constants) == (2 * 13.0, 2 * 1.0, {"BLOCK": 16})
    assert (result.tried, result.refused, result.wrong) == (4, 0, 0)
    assert result.first_call == 6.0  # two calls


def test_each_class_of_sizes_is_a_job_and_equal_ones_are_one(op):
    assert [result.job.sizes for result in measured(op, (8, 9, 8))] == [(8,), (9,)]
    assert [len(result.job.calls) for result in measured(op, (8, 9, 8))] == [4, 2]


def test_collecting_jobs_runs_no_kernel(op, monkeypatch):
    from pytorch_ext.kernels.triton import gelu, launch

    def launched(*args, **constants):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(launch, "_recorder", None)
    monkeypatch.setattr(gelu._gelu_fwd_kernel, "run", launched, raising=False)
    monkeypatch.setattr(backend, "kernel_files", lambda: {"gelu": gelu})
    found = tune.jobs(["gelu"], Request().sizes(), tune.filled("cpu"))
    assert [job.name for job in found] == ["gelu_fwd (itemsize 2)", "gelu_bwd (itemsize 2)"]


def test_the_table_stays_where_nothing_is_clearly_faster(op):
    op.best = 4
    (result,) = measured(op)
    assert result.constants is None and result.best == result.before == 2.0
    op.timer = lambda call: (call(), 1.0 if op.ran[-1] == 4 else 0.99)[1]
    assert measured(op)[0].constants is None


def test_what_does_not_fit_is_left_out(op):
    op.refuses = (16,)
    (result,) = measured(op)
    assert result.refused == 1 and result.constants is None


def test_what_gives_other_results_is_left_out(op):
    op.wrong = (16,)
    (result,) = measured(op)
    assert result.wrong == 1 and result.constants is None


def test_an_error_that_is_not_of_the_configuration_is_raised(op, monkeypatch):
    monkeypatch.setattr(Refused, "__module__", "torch")
    op.refuses = (16,)
    with pytest.raises(Refused):
        measured(op)


def test_results_may_lie_apart_by_rounding_alone():
    one = torch.tensor([1.0, 100.0], dtype=torch.bfloat16)
    assert tune._agree([one, torch.empty(0)], [one, torch.empty(0)])
    assert tune._agree([one], [torch.tensor([1.5, 100.5]).bfloat16()])
    assert not tune._agree([one], [torch.tensor([1.0, 120.0]).bfloat16()])
    assert not tune._agree([one], [torch.tensor([float("nan"), 100.0]).bfloat16()])


def test_what_was_found_is_written_and_shown(op, tmp_path):
    console = Console(record=True, width=160)
    measure_with(Request(batch_sizes=[8, 16]), op.timer, tune.filled("cpu"), "A GPU", console)
    (file,) = tmp_path.iterdir()
    entry = json.loads(file.read_text())["kernels"]["op_fwd"]
    assert entry == {"source": op.configs.source, "configs": {"8": {"BLOCK": 16}, "16": {"BLOCK": 16}}}
    text = console.export_text()
    assert "op_fwd (rows 8)" in text and "BLOCK=16" in text and "first call" in text
    assert file.name in text.replace("\n", "")


def test_what_was_measured_before_an_interruption_is_kept(op, tmp_path):
    def timer(call):
        if len(op.ran) > 40:
            raise KeyboardInterrupt
        return op.timer(call)

    with pytest.raises(KeyboardInterrupt):
        measure_with(
            Request(batch_sizes=list(range(1, 9))), timer, tune.filled("cpu"), "A GPU", Console(quiet=True)
        )
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["kernels"]["op_fwd"]["configs"]["1"] == {"BLOCK": 16}


def test_nothing_faster_writes_nothing(op, tmp_path):
    op.best = 4
    console = Console(record=True, width=160)
    measure_with(Request(), op.timer, tune.filled("cpu"), "A GPU", console)
    assert not list(tmp_path.iterdir()) and "nothing is faster" in console.export_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": [0]}, "batch-size: expected at least 1, got 0"),
        ({"heads": 7}, "heads: expected a divisor of hidden, 768, got 7"),
        ({"dtypes": ["fp64"]}, "dtype: expected some of fp32, bf16, fp16, got fp64"),
        ({"dropout_p": 1.0}, "dropout: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(tune.TuneError, match=message):
        Request(**changes).sizes()


def test_an_op_that_is_not_there(op):
    with pytest.raises(tune.TuneError, match="op: expected some of op, got nonsense"):
        tune.stems(["nonsense"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to tune on")
def test_without_a_gpu_there_is_one_sentence(capsys):
    from pytorch_ext.cli import app

    with pytest.raises(SystemExit) as stopped:
        app(["tune"], prog_name="pytorch-ext", standalone_mode=False)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: tune measures Triton kernels on a GPU: ")
    assert error.count("\n") == 1
