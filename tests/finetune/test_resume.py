"""A run that is killed, wherever, and taken up again ends at the weights of one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pytorch_ext import finetune
from pytorch_ext.finetune import engine

pytestmark = pytest.mark.usefixtures("without_page")


class Killed(BaseException):
    """Nothing catches it, as nothing survives the signal."""


@pytest.fixture(scope="module")
def whole_run():
    """The weights and figures of a run that nobody disturbed; it has dropout, and three epochs."""
    kept = {}

    def whole_run(make_options, tmp_path, **changed):
        key = tuple(changed.items())
        if key not in kept:
            options = make_options(out=tmp_path / "undisturbed", **changed)
            kept[key] = (finetune.run(options, lambda line: None), weights(options.out))
        return kept[key]

    return whole_run


def weights(out: Path):
    return load_file(out / "model" / "model.safetensors")


def assert_alike(found, out, expected):
    before, tensors = expected
    assert found["losses"] == before["losses"] and found["evaluations"] == before["evaluations"]
    assert found["best step"] == before["best step"] and found["held out"] == before["held out"]
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, tensors[name]), name


def kill_at(monkeypatch, place, count):
    """Raises at the ``count``-th call of a method of the Trainer or a function of the engine's modules."""
    owner, name = place
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            raise Killed(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


PLACES = {
    "between two checkpoints": ((engine.Trainer, "training_step"), 7),
    "before the first checkpoint": ((engine.Trainer, "training_step"), 2),
    "in an evaluation": ((engine.Trainer, "evaluate"), 2),
    "while a checkpoint is written": ((engine.Trainer, "_save_rng_state"), 2),
    "before a checkpoint is marked": ((engine.Mark, "on_save"), 2),
    "while the report is made": ((engine.Trainer, "predict"), 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_taken_up_again(place, whole_run, make_options, tmp_path, monkeypatch):
    expected = whole_run(make_options, tmp_path)
    options = make_options()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, *PLACES[place])
        finetune.run(options, lambda line: None)
    lines = []
    found = finetune.run(options, lines.append)
    assert any("going on from checkpoint-" in line for line in lines) == ("before the first" not in place)
    assert_alike(found, options.out, expected)


@pytest.mark.full
@pytest.mark.parametrize("how", ["auto", "lora"])
def test_what_learns_is_not_chosen_anew(how, whole_run, make_options, tmp_path, monkeypatch):
    expected = whole_run(make_options, tmp_path, tune=how)
    options = make_options(tune=how)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, (engine.Trainer, "training_step"), 7)
        finetune.run(options, lambda line: None)
    found = finetune.run(options, lambda line: None)
    assert found["tuned"] == expected[0]["tuned"]
    assert_alike(found, options.out, expected)


def test_patience_is_remembered(make_options, tmp_path, monkeypatch):
    """Killed between the two evaluations that end the run: without its memory it would go on."""
    changed = {"learning_rate": 1e-12, "max_steps": 20, "eval_steps": 2, "patience": 2}
    options = make_options(**changed)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, (engine.Trainer, "training_step"), 6)
        finetune.run(options, lambda line: None)
    assert finetune.run(options, lambda line: None)["steps"] == 6


SCRIPT = """
import sys
from pathlib import Path
from pytorch_ext.finetune import Options, run

data, model, out = map(Path, sys.argv[1:])
run(Options(data=data, model=model, out=out, max_length=32, tokens_per_batch=256, max_steps=12, eval_steps=4,
            learning_rate=5e-3, threads=1, precision="fp32", device="cpu"), lambda line: print(line, flush=True))
"""


@pytest.mark.full
def test_killed_by_a_signal(whole_run, make_options, tmp_path):
    options = make_options()
    command = [sys.executable, "-c", SCRIPT, options.data, options.model, options.out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    for line in process.stdout:
        if line.startswith("  step 6 of 12"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL
    expected = whole_run(make_options, tmp_path)
    lines = []
    found = finetune.run(options, lines.append)
    assert "going on from checkpoint-4" in lines
    assert_alike(found, options.out, expected)
