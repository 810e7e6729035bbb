"""The stages of `make gpu`, without a GPU: what they plan, and what becomes of steps that fail, hang or are refused."""

import subprocess
import sys
import tarfile

import pytest

from pytorch_ext.benchmarks import gpu_stages
from pytorch_ext.benchmarks.gpu_stages import Step


def step(name, code, seconds=30, **more):
    return Step(name, (sys.executable, "-S", "-c", code), seconds, **more)


@pytest.mark.parametrize("stage", gpu_stages.STAGES)
def test_each_stage_builds_what_it_needs_and_fits_in_its_time(stage, tmp_path):
    steps = gpu_stages.plan(stage, tmp_path)
    assert [step.environment["PYTORCH_EXT_CUDA"] for step in steps[:3]] == ["1", "1", "0"]
    assert len(steps) > 3
    assert sum(one.seconds for one in steps if not one.after_failure_of) <= gpu_stages.STAGE_SECONDS


def test_make_shows_the_plan_anywhere(tmp_path):
    command = ["make", "--no-print-directory", "gpu", "STAGE=bench-bert", "DRY=1", f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=gpu_stages.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, build, *_ = done.stdout.splitlines()
    assert first == "bench-bert, at most 540 s:"
    assert build.startswith("  build (at most")
    assert "-m pytorch_ext.benchmarks --device cuda --suite bert --dtype bf16 --seconds 170" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_every_stage_runs_to_its_end_without_a_gpu(tmp_path):
    """Its shell and its commands, on shapes of no interest."""
    make = ["make", "--no-print-directory", "gpu", "STAGE=all", "DEVICE=cpu", f"VENV={sys.prefix}"]
    done = subprocess.run(
        [*make, f"OUT={tmp_path}"], cwd=gpu_stages.ROOT, capture_output=True, text=True, timeout=220
    )
    table = (tmp_path / "all.txt").read_text()
    assert done.stdout.endswith(table), done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
    found = {line[:20].strip(): line[30:].strip() for line in table.splitlines()}
    assert "torch" in found["here"] and "not here:" in found["here"]
    no_gpu = "left out: it needs a GPU, and the device is cpu"
    assert [found[name] for name in ("tune", "sanitize memcheck", "sanitize racecheck")] == [no_gpu] * 3
    assert found["plan of the build"].startswith("ok; ")
    assert "passed" in found["tests"]
    for name in ("ops bf16", "bert bf16"):
        assert found[name].startswith("ok; 0 red; ") and "native" in found[name]
    assert {file.name for file in tmp_path.iterdir()} == {"all.txt", "all.tar.gz"}
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        names = archive.getnames()
        assert {"all.txt", "ops-bf16/ops-bf16.json", "bert-bf16/index.html", "logs/test-tests.log"} <= set(
            names
        )
        (log,) = (archive.extractfile(name).read() for name in names if name.startswith("logs/bench-ops-ops"))
    assert b"times by a GPU's own clock (CUDA events): this needs a GPU" in log


def test_a_stage_ends_with_one_table_and_one_archive(monkeypatch, tmp_path, capsys):
    steps = [
        step("build", "raise SystemExit('no nvcc')"),
        step("build, no _cuda", "print('built')", after_failure_of="build"),
        step("not needed", "print('never')", after_failure_of="build, no _cuda"),
        step("tests", "print('3 passed')"),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", seconds=1),
        step("sanitize", "raise SystemExit('Error: Device not supported')"),
        step("absent", "", needs=("json", "no-such-program")),
    ]
    monkeypatch.setattr(gpu_stages, "plan", lambda *_: steps)
    monkeypatch.setattr(gpu_stages, "LEAST_SECONDS", 1)
    assert gpu_stages.main(["test", "--out", str(tmp_path)]) == 1
    table = (tmp_path / "test.txt").read_text()
    assert capsys.readouterr().out.endswith(table)
    found = {line[:20].strip(): line[30:].strip() for line in table.splitlines()[1:]}
    assert found == {
        "build": "FAILED with status 1; no nvcc",
        "build, no _cuda": "ok; built",
        "tests": "ok; 3 passed",
        "hangs": "STOPPED after 1 s; begun",
        "sanitize": "refused by this machine; Error: Device not supported",
        "absent": "left out: no-such-program is neither on PATH nor a module here",
    }
    with tarfile.open(tmp_path / "test.tar.gz") as archive:
        assert {"test.txt", "logs/test-tests.log", "logs/test-hangs.log"} <= set(archive.getnames())


def test_a_stage_that_is_stopped_has_left_what_was_done(monkeypatch, tmp_path):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_stages, "plan", lambda *_: [step("one", "print(1)"), step("two", "print(2)")])
    genuine, done = gpu_stages.run, []
    monkeypatch.setattr(
        gpu_stages, "run", lambda *words: stopped() if done else done.append(1) or genuine(*words)
    )
    with pytest.raises(KeyboardInterrupt):
        gpu_stages.main(["tune", "--out", str(tmp_path)])
    assert (tmp_path / "tune.txt").read_text().splitlines()[1].startswith("one")
    with tarfile.open(tmp_path / "tune.tar.gz") as archive:
        assert "logs/tune-one.log" in archive.getnames()


def test_what_has_no_time_left_is_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_stages, "plan", lambda *_: [step("late", "")])
    monkeypatch.setattr(gpu_stages, "STAGE_SECONDS", 5)
    assert gpu_stages.main(["test", "--out", str(tmp_path)]) == 0
    assert "late                      0 s  left out: no time left" in capsys.readouterr().out


def test_a_refusal_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu_stages, "plan", lambda *_: [step("s", "raise SystemExit('Device not supported')")]
    )
    assert gpu_stages.main(["sanitize", "--out", str(tmp_path)]) == 0
