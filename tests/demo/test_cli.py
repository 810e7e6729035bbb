"""The command line from end to end: `python -m pytorch_ext demo`."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch

from pytorch_ext import __main__
from pytorch_ext.demo import Options, run, show
from pytorch_ext.demo.options import DemoError, dtype_name


def command(*arguments, **environment):
    """The command line in a process of its own."""
    words = [sys.executable, "-m", "pytorch_ext", *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "80", **environment}
    )


def test_quick_demo_end_to_end(tiny_bert, tmp_path):
    out = tmp_path / "output"
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join("some words " * (1 + 7 * number % 11) + str(number) for number in range(40)))
    arguments = (
        "--texts",
        texts,
        "--quick",
        "--no-compile",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--out",
        out,
    )
    done = command("demo", "--model", tiny_bert, *arguments, "--query", "a 漢字 [query]")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for shown in ("tiny-bert", "Batches as they come", "Batches sorted by length", "Fine-tuning step"):
        assert shown in done.stdout
    for shown in ("pytorch_ext.explain(model)", "Nearest to “a 漢字 [query]”", "demo.png"):
        assert shown in done.stdout
    found = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    environment = found["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] >= 1 and environment["device_type"] == "cpu"
    assert "interleaved" in environment["how_timed"] and "commit" in environment
    assert found["dtype"] == "fp32"
    assert "sdpa" in found["baseline"]["eager"]
    assert [one["name"] for one in found["series"]] == ["as they come", "sorted by length"]
    for one in found["series"]:
        rows = {row["name"]: row for row in one["contenders"]}
        assert set(rows) == {"eager", "pytorch-ext"}
        assert rows["pytorch-ext"]["agreement"]["ok"]
        assert rows["pytorch-ext"]["speedup"]["pairs"] == one["rounds"] * one["batches"] >= 6
        assert rows["pytorch-ext"]["texts_per_second"] > 0
    assert found["finetune"]["agreement"]["ok"]
    assert len(found["search"]["hits"]) == 5
    assert found["explain"]
    assert (out / "demo.png").stat().st_size > 20_000


@pytest.mark.long
def test_quick_demo_with_the_compiler(tiny_bert, tmp_path):
    done = command("demo", "--model", tiny_bert, "--quick", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["series"][0]["contenders"]
    assert [row["name"] for row in rows] == ["eager", "torch.compile", "pytorch-ext"]


@pytest.mark.full
def test_a_red_comparison_exits_non_zero(tiny_bert, tmp_path, monkeypatch, capsys):
    genuine = show.measure.build

    def spoiled(name, setting):
        model = genuine(name, setting)
        if name == "pytorch-ext":
            with torch.no_grad():
                model.encoder.layer[0].output.dense.bias[0] += 0.1
        return model

    monkeypatch.setattr(show.measure, "build", spoiled)
    options = Options(model=tiny_bert, quick=True, compile=False, device="cpu", dtype="fp32", out=tmp_path)
    assert run(options) == 1
    shown = capsys.readouterr().out
    assert "pytorch-ext DISAGREES" in shown
    rows = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["series"][0]["contenders"]
    assert "speedup" not in rows[-1] and "texts_per_second" not in rows[-1]
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/nowhere"], "/nowhere holds no Hugging Face model"),
        (["--texts", "/nowhere.txt"], "no such file: /nowhere.txt"),
        (["--batch-size", "0"], "the batch size must be at least 1"),
        (["--max-length", "2"], "the maximum length must be at least 8 tokens"),
        (["--seconds", "0"], "the time budget must be positive"),
        (["--threads", "0"], "the number of threads must be at least 1"),
        (["--query", " "], "the query is empty"),
        (["--dtype", "fp8"], "no such dtype: fp8 (one of fp32, bf16, fp16)"),
        (["--device", "tpu9"], "no such device: tpu9"),
        (["--device", "meta"], "the demo runs on cpu and cuda"),
        (["--backend", "abacus"], "no such backend here: abacus"),
        (["--out", "/dev/null/x"], "cannot write to /dev/null/x"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, sentence, tiny_bert, monkeypatch, capsys, tmp_path):
    # In this process: a dozen fresh ones would take a minute.
    given = [
        "pytorch-ext",
        "demo",
        "--model",
        str(tiny_bert),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        *arguments,
    ]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--threads", "two"], "--threads"),
        (["nothing"], "nothing"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytorch-ext", *arguments])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo", "--help"]])
def test_help(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytorch-ext", *arguments])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert not stopped.value.code
    assert "Usage: pytorch-ext" in capsys.readouterr().out


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pytorch_ext.demo.run", interrupted)
    monkeypatch.setattr(sys, "argv", ["pytorch-ext", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


# What the command line needs, and a command.
@pytest.mark.full
@pytest.mark.parametrize("missing", ["typer", "matplotlib"])
def test_a_missing_extra_is_one_sentence(missing, tmp_path):
    """A module that cannot be found, found first."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('No module', name='{missing}')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command("demo", "--quick", "--out", tmp_path / "out", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr == f"{missing} is not installed: pip install 'pytorch-ext[demo]'\n"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytorch-ext", "info", *options])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert "native" in (json.dumps(json.loads(shown)) if options else shown)


def test_the_dtype_follows_the_hardware(monkeypatch):
    from pytorch_ext.demo import options

    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(options, "cpu_has_bf16", lambda value=has_bf16: value)
        assert dtype_name(Options().resolve_dtype(torch.device("cpu"))) == expected
    assert dtype_name(Options(dtype="fp16").resolve_dtype(torch.device("cpu"))) == "fp16"
    with pytest.raises(DemoError):
        Options(dtype="int8").resolve_dtype(torch.device("cpu"))
