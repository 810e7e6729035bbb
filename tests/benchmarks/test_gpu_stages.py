"""The stages of `make gpu`, without a GPU: what they plan, and what becomes of steps that fail, hang or are refused."""

import subprocess
import sys
import tarfile

import pytest

from pytorch_ext.benchmarks import gpu_stages
from pytorch_ext.benchmarks.gpu_stages import Step


def step(name, code, seconds=30, **more):
    return Step(name, (sys.executable, "-S", "-c", code), seconds, **more)


@pytest.mark.parametrize("stage", ["test", "sanitize", "tune", "bench-ops", "bench-bert"])
def test_each_stage_builds_what_it_needs_and_fits_in_its_time(stage, tmp_path):
    steps = gpu_stages.plan(stage, tmp_path)
    assert steps[0].name == "build" and steps[0].environment["PYTORCH_EXT_CUDA"] == "1"
    assert len(steps) > 2
    assert sum(one.seconds for one in steps if not one.after_failure_of) <= gpu_stages.STAGE_SECONDS


def test_make_shows_the_plan_anywhere(tmp_path):
    command = ["make", "--no-print-directory", "gpu", "STAGE=bench-bert", "DRY=1", f"OUT={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=gpu_stages.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("build (at most")
    assert "-m pytorch_ext bench --device cuda --suite bert --seconds 210 --dtype bf16" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_stage_ends_with_one_table_and_one_archive(monkeypatch, tmp_path, capsys):
    steps = [
        step("build", "raise SystemExit('no nvcc')"),
        step("build, no _cuda", "print('built')", after_failure_of="build"),
        step("not needed", "print('never')", after_failure_of="build, no _cuda"),
        step("tests", "print('3 passed')"),
        step("hangs", "import time; print('begun', flush=True); time.sleep(60)", seconds=1),
        step("sanitize", "raise SystemExit('Error: Device not supported')"),
        step("absent", "", needs="no-such-program"),
    ]
    monkeypatch.setattr(gpu_stages, "plan", lambda *_: steps)
    assert gpu_stages.main(["test", "--out", str(tmp_path)]) == 1
    table = capsys.readouterr().out
    assert (tmp_path / "test.txt").read_text() == table
    found = {line[:20].strip(): line[30:].strip() for line in table.splitlines()}
    assert found == {
        "build": "FAILED with status 1; no nvcc",
        "build, no _cuda": "ok; built",
        "tests": "ok; 3 passed",
        "hangs": "STOPPED after 1 s; begun",
        "sanitize": "refused by this machine; Error: Device not supported",
        "absent": "left out: no-such-program is not on PATH",
    }
    with tarfile.open(tmp_path / "test.tar.gz") as archive:
        assert {"test.txt", "logs/tests.log", "logs/hangs.log"} <= set(archive.getnames())


def test_a_refusal_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu_stages, "plan", lambda *_: [step("s", "raise SystemExit('Device not supported')")]
    )
    assert gpu_stages.main(["sanitize", "--out", str(tmp_path)]) == 0
