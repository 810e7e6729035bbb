"""The benchmarks of single ops on tiny shapes: what is compared, what is shown, and what never is."""

import argparse
import contextlib
import json
import math
import os
import signal

import pytest
import torch
from torch.nn import functional as F

from pytorch_ext.benchmarks import (
    bench_attention,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    op_bench,
    op_limits,
    op_peers,
    op_report,
)
from pytorch_ext.testing import normal

BENCHMARKS = {
    "layer_norm": (
        bench_layer_norm,
        [
            "layer_norm",
            "dropout_add_layer_norm, p = 0",
            "dropout_add_layer_norm, p = 0.1",
            "embedding_layer_norm",
        ],
    ),
    "gelu": (bench_gelu, ["gelu", "bias_gelu"]),
    "linear": (bench_linear, ["linear", "linear, gelu"]),
    "attention": (bench_attention, ["attention", "varlen_attention"]),
}
TINY = {
    bench_layer_norm: {
        "QUICK_HIDDEN": (24,),
        "QUICK_EMBEDDED": (24,),
        "QUICK_TOKENS": (7,),
        "VOCABULARY": 50,
    },
    bench_gelu: {"QUICK_FEATURES": (24,), "QUICK_TOKENS": (7,)},
    bench_linear: {"QUICK_PLAIN": ((16, 24),), "QUICK_ACTIVATED": ((16, 24),), "QUICK_TOKENS": (7,)},
    bench_attention: {"QUICK_DENSE": ((3, 2, 8, 16),), "QUICK_PACKED": ((3, 2, 8, 16),)},
}
QUICK = ["--quick", "--no-compile", "--rounds", "2", "--backends", "native"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Shapes and probes of the machine so small that a run takes a second; the threads as they were."""
    for module, sizes in TINY.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(op_limits, "COPY_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr(op_limits, "LARGEST_PRODUCT", {"cpu": 256})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gelu" else pytest.mark.full) for name in BENCHMARKS]
)
def test_table_and_record(name, tmp_path, capsys):
    module, names = BENCHMARKS[name]
    file = tmp_path / "folder" / "record.json"
    dtypes = ("fp32", "bf16") if name == "gelu" else ("fp32",)  # one of them for both stands for all
    arguments = [*QUICK, "--dtype", ",".join(dtypes), "--threads", "1", "--table", "--save", str(file)]
    assert module.main(arguments) == 0
    found, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert found["benchmark"] == f"bench_{name}"
    assert found["environment"]["threads"] == 1
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert "balanced order" in found["environment"]["how_timed"]
    assert "mode='default'" in found["peers"]["compile"]
    wanted = [(case, dtype) for dtype in dtypes for case in names]
    assert [(case["name"], case["dtype"]) for case in found["cases"]] == wanted
    assert all(case["rates"]["copy"] > 0 and not case["disagree"] for case in found["cases"])
    for case, dtype in wanted:
        modes = ("forward", "backward") if case.endswith("0.1") else ("no grad", "forward", "backward")
        lines = [line for line in found["lines"] if (line["name"], line["dtype"]) == (case, dtype)]
        assert [(line["mode"], line["contender"]) for line in lines] == [
            (mode, contender) for mode in modes for contender in ("eager", "native")
        ]
        assert all(line["median_us"] > 0 and line["rate"] > 0 and line["bytes"] > 0 for line in lines)
        assert all(line["speedup"]["eager"]["pairs"] == 2 for line in lines if line["ours"])
        assert case in shown
    assert "native, under 0.97 x the better of eager and compile" in shown
    assert f'("{found["cases"][0]["op"]}", "cpu"): "native"' in shown


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick_is_shorter_and_no_input_is_constant(name):
    module, _ = BENCHMARKS[name]
    assert 0 < len(module.cases(True)) < len(module.cases(False))
    for case in module.cases(True):
        tensors = case.make(torch.Generator().manual_seed(0))
        assert all(t.unique().numel() > 1 for t in tensors.values())
        assert case.cost("backward", torch.float32).bytes > case.cost("no grad", torch.bfloat16).bytes > 0


def test_every_case_has_a_name_of_its_own():
    for module, _ in BENCHMARKS.values():
        named = [(case.name, case.shape) for case in [*module.cases(False), *module.large_cases()]]
        assert len(set(named)) == len(named)


def test_what_needs_too_much_on_a_cpu_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(op_bench, "LARGEST_BYTES", 100.0)
    assert bench_gelu.main([*QUICK, "--only", "bias"]) == 0
    assert "left out: bias_gelu 7 x 24 fp32: in float64 it moves" in capsys.readouterr().out


def test_attention_has_each_kernel_of_sdpa_and_norms_have_liger_as_peers(monkeypatch):
    """They are held to half of the digits, as every peer is; none is timed that cannot run."""
    monkeypatch.setattr(op_peers.torch, "compile", lambda function, **how: function)
    options = op_bench.arguments("bench", "", [*QUICK, "--peers", "all"])
    (case, packed) = bench_attention.cases(True)
    field = op_bench.contenders(case, options, {})
    assert [one.name for one in field] == ["eager", "max-autotune", "sdpa-math", "sdpa-flash", "native"]
    assert [one.name for one in op_bench.contenders(packed, options, {})] == ["eager", "native"]
    seen = []

    def forced(kernels):
        seen.append(kernels)
        return contextlib.nullcontext()

    monkeypatch.setattr(op_peers, "sdpa_kernel", forced)
    off = lambda query, key, value, attn_mask: case.eager(query, key, value, attn_mask) * 1.1  # noqa: E731
    field[3].compared = off
    op_bench.check(case, field, torch.float32, "cpu", argparse.Namespace(step=lambda what: None))
    assert {one.name for one in field if one.failures} == {"sdpa-flash"}
    assert {tuple(kernels) for kernels in seen} == {(op_peers.SDPBackend.MATH,)}
    (liger,) = (one for one in op_peers.peers(bench_layer_norm.cases(True)[0], "cpu") if one.name == "liger")
    assert liger.note == "its kernels are for a GPU alone"


def run(monkeypatch, capsys, tmp_path, function, *arguments, training=None):
    """Runs GELU with `function` as ours; exit status, record and text."""
    case = op_bench.Case(
        "gelu",
        "gelu",
        "7 x 24",
        function,
        lambda input: F.gelu(input),
        lambda generator: {"input": normal(generator, 7, 24)},
        elements=(1, 1),
        training=training,
    )
    file = tmp_path / "record.json"
    status = op_bench.main("bench", "", lambda quick: [case], [*QUICK, "--save", str(file), *arguments])
    return status, json.loads(file.read_text()), capsys.readouterr().out


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        return F.gelu(input)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.5


def second_call_is_wrong():
    calls = []

    def function(input):
        calls.append(input)
        again = len(calls) > 1 and calls[-2] is input
        return F.gelu(input) + (1e-3 if again else 0.0)

    return function


@pytest.mark.parametrize(
    "function",
    [
        lambda input: F.gelu(input) * (1 + 1e-4),
        lambda input: F.gelu(input, approximate="tanh"),
        lambda input: F.gelu(input)[:-1],
        lambda input: F.gelu(input).double(),
        lambda input: torch.where(input > 2, torch.nan, F.gelu(input)),
        WrongGradient.apply,
        second_call_is_wrong(),
    ],
    ids=["a little off", "another function", "shape", "dtype", "nan", "gradient", "second call"],
)
def test_a_wrong_result_gets_no_time(function, monkeypatch, tmp_path, capsys):
    status, found, shown = run(monkeypatch, capsys, tmp_path, function, "--table")
    assert status == 1
    assert found["cases"][0]["disagree"] == ["native"]
    assert {line["contender"] for line in found["lines"]} <= {"eager"}
    assert "native: gelu 7 x 24 fp32 DISAGREES" in shown
    assert "no time is shown" in shown
    assert " x  " not in shown  # no ratio either


def test_what_is_timed_with_dropout_is_compared_without(monkeypatch, tmp_path, capsys):
    seen = []

    def with_dropout(input):
        seen.append(input)
        return F.dropout(F.gelu(input), 0.5)

    right = lambda input: F.gelu(input)  # noqa: E731
    status, found, _ = run(monkeypatch, capsys, tmp_path, right, training=(with_dropout, with_dropout))
    assert status == 0
    assert [line["mode"] for line in found["lines"]] == ["forward"] * 2 + ["backward"] * 2
    assert len(seen) == 2 * (2 + 2)  # two contenders, warm-up and rounds


def test_a_backend_that_cannot_run_says_why(monkeypatch, tmp_path, capsys):
    function = lambda input: F.gelu(input)  # noqa: E731
    status, found, shown = run(monkeypatch, capsys, tmp_path, function, "--backends", "native,cuda,triton")
    assert status == 0
    assert found["cases"][0]["missing"] == ["cuda", "triton"]
    assert {line["contender"] for line in found["lines"]} == {"eager", "native"}
    assert "skipped: cuda for gelu: " in shown


def test_a_contender_that_fails_says_why(monkeypatch, tmp_path, capsys):
    def broken(input):
        raise RuntimeError("no such kernel\nmany more lines")

    status, found, shown = run(monkeypatch, capsys, tmp_path, broken)
    assert status == 0
    assert "skipped: native for gelu: RuntimeError: no such kernel\n" in shown
    assert {line["contender"] for line in found["lines"]} == {"eager"}


def test_the_compiler_may_err_more_than_ours_but_not_be_wrong(monkeypatch, tmp_path, capsys):
    right = lambda input: F.gelu(input)  # noqa: E731
    for factor, timed in ((1 + 1e-5, True), (1.01, False)):
        monkeypatch.setattr(
            torch, "compile", lambda function, dynamic, factor=factor: lambda input: function(input) * factor
        )
        status, found, shown = run(monkeypatch, capsys, tmp_path, right, "--compile")
        assert status == (0 if timed else 1)
        assert ("compile" in {line["contender"] for line in found["lines"]}) == timed
        assert ("compile errs more than the contract allows ours in 1 of 1 cases" in shown) == timed
        assert ("compile: gelu 7 x 24 fp32 DISAGREES" in shown) != timed


def test_a_case_that_takes_too_long_is_left_out(capsys):
    assert bench_linear.main([*QUICK, "--longest", "0"]) == 0
    shown = capsys.readouterr().out
    assert "left out: linear 7 x 16 -> 24 fp32: one call takes about" in shown


def test_the_limit_is_what_binds():
    rates = op_limits.Rates(copy=10e9, product=100e9, product_dtype="float32")
    assert op_limits.Cost(bytes=1e9).limit(0.2, rates) == ("GB/s", 5.0, 10.0)
    assert op_limits.Cost(bytes=1e9, flops=1e9).limit(0.2, rates) == ("GB/s", 5.0, 10.0)
    assert op_limits.Cost(bytes=1e9, flops=20e9).limit(0.4, rates) == ("GFLOP/s", 50.0, 100.0)


def test_the_rates_are_of_this_machine():
    limits = op_limits.Limits("cpu", [torch.bfloat16])
    limits.start()
    limits.sample(torch.bfloat16, products=False)
    assert limits.rates(torch.bfloat16).product == math.inf  # a case without products has no such limit
    limits.sample(torch.bfloat16, products=True)
    found = limits.rates(torch.bfloat16)
    assert found.copy > 0 and 0 < found.product < math.inf
    assert found.product_dtype in ("float32", "bfloat16")


def line(op, contender, over_native, dtype="fp32", mode="forward"):
    speedup = {} if contender == "native" else {"native": {"median": over_native}}
    return {"op": op, "name": op, "shape": "1", "dtype": dtype, "mode": mode, "contender": contender} | {
        "ours": contender != "eager",
        "speedup": speedup,
    }


def test_the_winner_has_the_best_geometric_mean_and_ran_everything():
    found = {"environment": {"device_type": "cpu"}, "cases": [], "lines": []}
    ratios = {"gelu": (4.0, 1.0), "linear": (0.5, 1.5), "layer_norm": (2.0, None), "bias_gelu": (2.0, 2.0)}
    for op, pair in ratios.items():
        found["cases"].append({"op": op, "disagree": ["cpu"] if op == "bias_gelu" else []})
        for dtype, ratio in zip(("fp32", "bf16"), pair, strict=True):
            found["lines"].append(line(op, "native", 1.0, dtype))
            if ratio is not None:
                found["lines"].append(line(op, "cpu", ratio, dtype))
    rows = op_report.winners(found).splitlines()[1:]
    assert (
        rows[0]
        .strip()
        .startswith('("gelu", "cpu"): "cpu",  # cpu 2.00 x native over 2 (fp32 4.00, bf16 1.00')
    )
    assert rows[1].strip().startswith('("linear", "cpu"): "native",  # cpu 0.87 x native')
    assert rows[2].strip() == '("layer_norm", "cpu"): "native",  # cpu did not run in some cases'
    assert rows[3].strip() == '("bias_gelu", "cpu"): "native",  # cpu disagrees in some cases'


def test_slower_than_a_peer_is_named():
    lines = [line("gelu", "cpu", 1.0), line("gelu", "native", 1.0)]
    lines[0]["speedup"] = {"eager": {"median": 1.5}, "compile": {"median": 0.96}, "native": {"median": 0.5}}
    lines[1]["speedup"] = {"eager": {"median": 0.97}}
    assert op_report._under(lines) == [
        "cpu, under 0.97 x the better of eager and compile: gelu 1 fp32 forward (0.96)",
        "native, under 0.97 x the better of eager and compile: none",
    ]


def test_a_geometric_mean_over_other_cases_is_none():
    assert op_report.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert op_report.geomean([2.0, None]) is None
    assert op_report.geomean([]) is None


def test_the_record_goes_into_the_folder_of_its_device(monkeypatch, tmp_path):
    monkeypatch.setattr(op_report, "RESULTS", tmp_path)
    environment = {"device": "AMD EPYC", "device_type": "cpu", "cpu_capability": "AVX2", "threads": 2}
    found = {"benchmark": "bench_gelu", "environment": environment, "cases": [{"dtype": "fp32"}]}
    file = op_report.save(found, tmp_path)
    assert file == tmp_path / "amd-epyc-avx2-2-threads" / "bench_gelu-fp32.json"
    assert json.loads(file.read_text()) == found
    gpu = argparse.Namespace(device="NVIDIA H200").device
    assert op_report.folder({"device": gpu, "device_type": "cuda"}) == "nvidia-h200"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dtype", "fp64"], "no such dtype: fp64"),
        (["--backends", "nothing"], "no such backend: nothing"),
        (["--rounds", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_gelu.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert bench_gelu.main(["--only", "nothing"]) == 2
    assert "no case has 'nothing'" in capsys.readouterr().err


def test_what_was_measured_before_a_time_limit_is_kept(tmp_path, monkeypatch, capsys):
    run, file, before = op_bench.run, tmp_path / "record.json", signal.getsignal(signal.SIGTERM)

    def limited(case, *others):
        if case.op == "bias_gelu":
            os.kill(os.getpid(), signal.SIGTERM)
        return run(case, *others)

    monkeypatch.setattr(op_bench, "run", limited)
    assert bench_gelu.main([*QUICK, "--save", str(file)]) == 130
    assert [case["name"] for case in json.loads(file.read_text())["cases"]] == ["gelu"]
    assert "stopped, 1 of 2 cases are missing" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert bench_gelu.main([*QUICK, "--only", "bias_gelu"]) == 130, "there is nothing to show"
