"""``finetune`` from a file to a model and a page."""

import json
import re

import pytest
import torch

from pytorch_ext import finetune
from pytorch_ext.finetune import FinetuneError


@pytest.fixture
def run():
    def run(options):
        lines = []
        return finetune.run(options, lines.append), lines

    return run


def test_from_a_file_to_a_model_and_a_page(run, make_options, write, make_rows, transformers):
    options = make_options(data=write(make_rows(150)), max_steps=60, eval_steps=20, dropout=0.05)
    found, lines = run(options)
    assert found["held out"]["accuracy"] > 0.8, "three classes of words that never meet"
    assert found["steps"] == 60 and [step for step, *_ in found["evaluations"]] == [20, 40, 60]
    assert any("step 20 of 60: validation accuracy" in line for line in lines)
    assert any(re.search(r"step \d+ of 60: loss .* tokens/s, .* min left", line) for line in lines)
    assert json.loads((options.out / "report.json").read_text()) == json.loads(json.dumps(found))
    page = (options.out / "report.html").read_text()
    assert page.count("<svg") == 2 and "http-equiv" not in page and not re.search(r'(src|href)="(?!#)', page)
    for name in ("fruit", "metal", "river"):
        assert name in page

    # What is saved is the original's, and predicts what was reported.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.out / "model")
    assert type(model.bert.encoder).__qualname__ == "BertEncoder"
    assert model.config.id2label == {0: "fruit", 1: "metal", 2: "river"}
    inputs = tokenizer(
        ["the zinc and copper is iron", "a pear in the plum"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert model(**inputs).logits.argmax(-1).tolist() == [1, 0]


@pytest.mark.usefixtures("without_page")
def test_optimised_it_learns_what_it_would_have_learned(run, make_options, tmp_path):
    """Dropout off: the losses of the original are those of the optimised model, to rounding."""
    losses = []
    for optimize in (True, False):
        out = tmp_path / f"out-{optimize}"
        found, _ = run(make_options(optimize=optimize, dropout=0.0, max_steps=40, eval_steps=40, out=out))
        losses.append([loss for _, loss, _ in found["losses"]])
    assert len(losses[0]) == 40 and losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("how", ["last:1", "lora", "auto"])
def test_what_does_not_learn_stays(run, make_options, tiny_bert, transformers, how):
    options = make_options(tune=how, max_steps=4, eval_steps=4)
    found, lines = run(options)
    before = transformers.AutoModel.from_pretrained(tiny_bert).state_dict()
    after = transformers.AutoModelForSequenceClassification.from_pretrained(
        options.out / "model"
    ).bert.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tuned = found["tuned"]
    if how == "lora":
        assert moved and all(
            re.search(r"layer\.\d.*(query|key|value|dense)\.weight|pooler", name) for name in moved
        )
        assert tuned["weights"] < tuned["of"] / 3
        return
    learns = tuned["learn"]
    assert ("what learns: " + ", ".join(learns) + " and the head") in lines
    places = {
        "embeddings" if "embeddings" in n else "layer " + n.split(".")[2] for n in moved if "pooler" not in n
    }
    assert places == set(learns)
    if how == "auto":
        scores = tuned["scores"]
        assert set(scores) == {"embeddings", "layer 0", "layer 1", "layer 2"}
        assert min(scores[name] for name in learns) >= max(scores[n] for n in scores if n not in learns)
        assert sum(scores[name] for name in learns) >= sum(scores.values()) / 2


@pytest.mark.usefixtures("without_page")
def test_it_stops_early(run, make_options):
    """Nothing is learned at this rate, so the accuracy never improves."""
    found, lines = run(make_options(learning_rate=1e-12, max_steps=20, eval_steps=2, patience=2))
    assert found["steps"] == 6 and found["best step"] == 2
    assert "stopped after step 6: no better for 2 evaluations" in lines


@pytest.mark.usefixtures("without_page")
def test_accumulated_batches_make_one_step(run, make_options):
    found, _ = run(make_options(accumulate=3, max_steps=4, eval_steps=2))
    assert found["steps"] == 4


@pytest.mark.usefixtures("without_page")
def test_a_folder_holds_one_run(run, make_options):
    run(make_options(max_steps=2, eval_steps=2))
    with pytest.raises(FinetuneError, match=r"out: expected a folder of its own .* another seed was used"):
        run(make_options(max_steps=2, eval_steps=2, seed=1))


def test_labels_that_training_never_saw(run, make_options, write, make_rows):
    test = write([*make_rows(30, seed=1), ("the iron", "alloy"), ("the gold", "alloy")], "test.csv")
    validation = write([*make_rows(30, seed=2), ("the lead", "alloy")], "validation.csv")
    found, lines = run(make_options(test=test, validation=validation, max_steps=30, eval_steps=10))
    assert "test: 2 rows with labels that training never saw ('alloy') count as wrong" in lines
    assert found["held out"]["rows"] == 32 and found["held out"]["unseen"] == 2
    assert sum(found["held out"]["confusion"][3]) == 2 and len(found["held out"]["confusion"]) == 4
    assert found["held out"]["accuracy"] <= 30 / 32


@pytest.mark.usefixtures("without_page")
def test_a_text_of_a_million_characters(run, make_options, write, make_rows):
    long = "apple pear " * 95_000
    assert len(long) > 1e6
    data, test = write([*make_rows(60), (long, "fruit")]), write([*make_rows(9), (long, "fruit")], "test.csv")
    found, lines = run(make_options(data=data, test=test, max_steps=2, eval_steps=2))
    assert max(found["lengths"]) == 32
    assert any("of them cut" in line for line in lines)


def test_one_process(run, make_options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FinetuneError, match="expected one process, got several"):
        run(make_options())


def test_a_model_that_is_none(run, make_options, tmp_path):
    with pytest.raises(FinetuneError, match="holds no Hugging Face model"):
        run(make_options(model=tmp_path / "nowhere"))
