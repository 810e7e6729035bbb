"""The examples that train the original and the optimised model in turn do so to their end, with the same losses."""

import copy
import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

from pytorch_ext.testing import Comparison, Error

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 12
SMALL = {
    "finetune_docstrings": ("--batch", "4", "--max-length", "48"),
    "pretrain_bert": ("--batch", "8", "--length", "96", "--vocabulary", "500"),
}

pytestmark = pytest.mark.long
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")


def against(losses, exact) -> Error:
    error = Error()
    error.add(*(torch.tensor(of, dtype=torch.float64) for of in (losses, exact)))
    return error


@pytest.mark.parametrize("name", SMALL)
def test_both_models_have_the_losses_of_float64(name, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module(name)
    runs = []

    def take_turns(original, fast, batches, steps, *more, turns=example.take_turns):
        rate = original.optimizer.defaults["lr"]
        exact = example.Run(copy.deepcopy(original.model).double(), steps, rate)
        same = list(itertools.islice(batches, steps))
        fast.model.classifier.weight.data.mul_(1 + 1e-4)
        turns(original, fast, iter(same), steps, *more)
        for batch in same:
            exact.step(batch)
        runs.extend((original, fast, exact))

    monkeypatch.setattr(example, "take_turns", take_turns)
    picture = tmp_path / "losses.png"
    example.main([*SMALL[name], "--steps", str(STEPS), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")

    told = capsys.readouterr().out
    assert "losses differ by at most" in told and "unknown" not in told
    assert int(re.search(r"(\d+)% of all positions were real", told)[1]) < 90
    original, fast, exact = runs
    assert type(fast.model.bert.encoder) is not type(original.model.bert.encoder)
    assert len(exact.losses) == STEPS and exact.losses[-1] < exact.losses[0], "it learns"
    ours, eager = (against(run.losses, exact.losses) for run in (fast, original))
    assert not Comparison(torch.float32, {"loss": ours}, {"loss": eager}).failures()
