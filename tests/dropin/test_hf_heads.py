"""Every head of every family of Hugging Face's: its outputs, its loss and all gradients, with padding and without."""

import pytest
import torch

import pytorch_ext


def tokens(batch, draw):
    return draw(61, *batch.real.shape).masked_fill(~batch.real, -100)


def tags(batch, draw):
    return draw(2, *batch.real.shape).masked_fill(~batch.real, -100)


def pair(batch, draw):
    return draw(2, len(batch.real))


def start(batch, draw):
    return torch.zeros(len(batch.real), dtype=torch.int64)


def end(batch, draw):
    return batch.real.sum(1) - 1


def replaced(batch, draw):
    return draw(2, *batch.real.shape)


LANGUAGE = {"labels": tokens}
CLASSES = {"labels": pair}
TAGS = {"labels": tags}
SPAN = {"start_positions": start, "end_positions": end}
# Family -> head -> its labels.
USUAL = {
    "MaskedLM": LANGUAGE,
    "SequenceClassification": CLASSES,
    "TokenClassification": TAGS,
    "QuestionAnswering": SPAN,
}
FAMILIES = {
    "Roberta": USUAL | {"CausalLM": LANGUAGE},
    "XLMRoberta": USUAL | {"CausalLM": LANGUAGE},
    "Camembert": USUAL | {"CausalLM": LANGUAGE},
    "Electra": USUAL | {"CausalLM": LANGUAGE, "PreTraining": {"labels": replaced}},
    "DistilBert": USUAL,
    "MPNet": USUAL,
    "Albert": USUAL | {"PreTraining": {"labels": tokens, "sentence_order_label": pair}},
    "ModernBert": USUAL,
    "GPT2": {
        name: USUAL[name] for name in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    },
}
HEADS = [
    (f"hf.{family}For{head}", labels) for family, heads in FAMILIES.items() for head, labels in heads.items()
]
HEADS += [("hf.GPT2LMHeadModel", LANGUAGE), ("hf.GPT2DoubleHeadsModel", {"labels": tokens})]
CHOICES = ["Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "MPNet", "Albert", "ModernBert"]


@pytest.fixture(scope="session")
def pair_and_batch(make_pair, make_batch):
    def make(name, kind, **fields):
        original, fast = make_pair(name, attention="eager" if "MPNet" in name else "sdpa", **fields)
        batch = make_batch(kind, types=False)
        if "GPT2" in name:  # by the id it knows where a sequence ends
            batch.inputs["input_ids"] = batch.inputs["input_ids"].masked_fill(~batch.real, 0)
        return original, fast, batch

    return make


def draw(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


def close(name):
    """ModernBERT turns its queries and keys in float32."""
    return {"rtol": 1e-4, "atol": 1e-5} if "ModernBert" in name else {}


@pytest.mark.parametrize("kind", ["right", "none"])
@pytest.mark.parametrize(("name", "labels"), HEADS, ids=[name for name, _ in HEADS])
def test_every_head_with_its_loss(pair_and_batch, assert_same, name, labels, kind):
    original, fast, batch = pair_and_batch(name, kind)
    assert_same(original, fast, batch, **close(name))
    batch.inputs |= {argument: make(batch, draw) for argument, make in labels.items()}
    assert_same(original.train(), fast.train(), batch, backward=True, **close(name))


@pytest.mark.parametrize(
    ("family", "summary"),
    [*((family, None) for family in CHOICES), ("Electra", "mean"), ("Electra", "last")],
)
def test_multiple_choice(pair_and_batch, assert_same, family, summary):
    """ELECTRA's head can be told what to read, padding included."""
    name = f"hf.{family}ForMultipleChoice"
    fields = {"summary_type": summary} if summary else {}
    original, fast, batch = pair_and_batch(name, "right", **fields)
    batch.inputs = {name: t.unflatten(0, (2, 2)) for name, t in batch.inputs.items()}
    batch.inputs["labels"] = torch.tensor([1, 0])
    assert_same(original.train(), fast.train(), batch, backward=True, **close(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_question_answering_keeps_the_padding(pair_and_batch, family):
    """Its loss weighs all positions against each other."""
    _, fast, batch = pair_and_batch(f"hf.{family}ForQuestionAnswering", "right")
    with torch.no_grad():
        fast(**batch.inputs)
    lines = [line for line in pytorch_ext.explain(fast).padding if "last forward" in line]
    assert f"{family}ForQuestionAnswering weighs all positions against each other" in lines[0]
