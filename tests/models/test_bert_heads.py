"""The heads against Hugging Face's: logits, losses and the gradient of every parameter."""

import pytest
import torch

from pytorch_ext.models import BertConfig, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification

EXACT = {"rtol": 1e-10, "atol": 1e-12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def labels(batch):
    """-100 but for about a fifth of the real tokens; none in the last sequence."""
    chosen = (torch.rand(3, 13, generator=batch.generator) < 0.3) & batch.mask.bool()
    chosen[2] = False
    assert 3 <= chosen.sum() <= 9
    return torch.where(chosen, torch.randint(0, 61, (3, 13), generator=batch.generator), -100)


def rows_seen_by(module):
    """A list that receives the leading shape of each input of ``module``."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:-1])))
    return seen


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"])
@pytest.mark.parametrize("padded", [False, True])
def test_logits(make_pair, batch, name, padded):
    theirs, ours = make_pair(name, num_labels=3)
    mask = batch.mask if padded else None
    flags = {"output_hidden_states": True}
    expected = theirs(batch.ids, attention_mask=mask, token_type_ids=batch.types, **flags)
    out = ours(batch.ids, mask, batch.types, **flags)
    assert out.loss is None and expected.loss is None
    for field in ("logits", "prediction_logits", "seq_relationship_logits"):
        assert hasattr(out, field) == hasattr(expected, field)
        if hasattr(out, field):
            torch.testing.assert_close(getattr(out, field), getattr(expected, field), **EXACT)
    torch.testing.assert_close(out.hidden_states[-1], expected.hidden_states[-1], **EXACT)
    assert len(out) == len(expected.to_tuple())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("return_logits", [False, True])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_masked_lm_loss_and_gradients(
    make_pair, batch, labels, assert_same_gradients, padded, tie, return_logits, training
):
    theirs, ours = make_pair("BertForMaskedLM", tie_word_embeddings=tie, **NO_DROPOUT)
    mask = batch.mask if padded else None
    seen = rows_seen_by(ours.cls.predictions.transform)
    expected = theirs.train(training)(batch.ids, attention_mask=mask, labels=labels)
    out = ours.train(training)(batch.ids, mask, labels=labels, return_logits=return_logits)
    torch.testing.assert_close(out.loss, expected.loss, **EXACT)
    if return_logits:
        torch.testing.assert_close(out.logits, expected.logits, **EXACT)
        assert seen == [(3, 13)]
    else:
        assert out.logits is None
        assert seen == [(int((labels != -100).sum()),)]
    expected.loss.backward()
    out.loss.backward()
    assert_same_gradients(theirs, ours)


@pytest.mark.parametrize("return_logits", [False, True])
def test_pretraining_loss_and_gradients(make_pair, batch, labels, assert_same_gradients, return_logits):
    theirs, ours = make_pair("BertForPreTraining", **NO_DROPOUT)
    targets = {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
    seen = rows_seen_by(ours.cls.predictions.decoder)
    expected = theirs.train()(batch.ids, attention_mask=batch.mask, **targets)
    out = ours.train()(batch.ids, batch.mask, **targets, return_logits=return_logits)
    torch.testing.assert_close(out.loss, expected.loss, **EXACT)
    torch.testing.assert_close(out.seq_relationship_logits, expected.seq_relationship_logits, **EXACT)
    if return_logits:
        torch.testing.assert_close(out.prediction_logits, expected.prediction_logits, **EXACT)
    else:
        assert out.prediction_logits is None
        assert seen == [(int((labels != -100).sum()),)]
    expected.loss.backward()
    out.loss.backward()
    assert_same_gradients(theirs, ours)


def test_pretraining_loss_with_one_kind_of_labels(make_pair, batch, labels):
    _, ours = make_pair("BertForPreTraining")
    sentence = torch.tensor([0, 1, 1])
    both = ours(batch.ids, labels=labels, next_sentence_label=sentence).loss
    tokens_only = ours(batch.ids, labels=labels).loss
    sentences_only = ours(batch.ids, next_sentence_label=sentence.unsqueeze(1).int())
    torch.testing.assert_close(tokens_only + sentences_only.loss, both, **EXACT)
    want = torch.nn.functional.cross_entropy(sentences_only.seq_relationship_logits, sentence)
    torch.testing.assert_close(sentences_only.loss, want, **EXACT)
    assert sentences_only.prediction_logits.shape == (3, 13, 61)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_batch_without_any_label(make_pair, batch, assert_same_gradients, name):
    theirs, ours = make_pair(name, **NO_DROPOUT)
    targets = {"labels": torch.full((3, 13), -100)}
    if name == "BertForPreTraining":
        targets["next_sentence_label"] = torch.tensor([1, 0, 1])
    for model in (theirs, ours):
        loss = model(batch.ids, attention_mask=batch.mask, **targets).loss
        assert loss.isnan()
        loss.backward()
    assert_same_gradients(theirs, ours)
    decoder = ours.cls.predictions.transform.dense.weight.grad
    assert (decoder == 0).all()
    words = ours.bert.embeddings.word_embeddings.weight.grad
    assert (words == 0).all() == (name == "BertForMaskedLM")


def test_labels_of_both_integer_dtypes(make_pair, batch, labels):
    _, ours = make_pair("BertForMaskedLM")
    torch.testing.assert_close(
        ours(batch.ids, labels=labels.int()).loss, ours(batch.ids, labels=labels).loss, **EXACT
    )


CLASSIFICATION = {
    # problem_type, num_labels, labels; None: found from the labels
    "single": (None, 3, torch.tensor([2, 0, 1])),
    "single, named": ("single_label_classification", 3, torch.tensor([2, 0, 1])),
    "multi": (None, 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]])),
    "multi, named": ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]])),
    "regression": (None, 1, torch.tensor([0.5, -2.0, 3.0])),
    "regression, column": ("regression", 1, torch.tensor([[0.5], [-2.0], [3.0]])),
    "regression of three": ("regression", 3, torch.tensor([[0.5, 1, 2], [-1, 0, 0], [3, 2, 1]])),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CLASSIFICATION)
def test_classification_loss_and_gradients(make_pair, batch, assert_same_gradients, case, training):
    problem, num_labels, targets = CLASSIFICATION[case]
    if targets.is_floating_point():
        targets = targets.double()
    fields = {"problem_type": problem, "num_labels": num_labels, **NO_DROPOUT}
    theirs, ours = make_pair("BertForSequenceClassification", **fields)
    expected = theirs.train(training)(batch.ids, attention_mask=batch.mask, labels=targets)
    out = ours.train(training)(batch.ids, batch.mask, labels=targets)
    torch.testing.assert_close(out.loss, expected.loss, **EXACT)
    torch.testing.assert_close(out.logits, expected.logits, **EXACT)
    expected.loss.backward()
    out.loss.backward()
    assert_same_gradients(theirs, ours)
    assert ours.config.problem_type == problem  # not changed by what the first batch looked like


def test_integer_targets_of_floating_point_losses(make_pair, batch):
    _, ours = make_pair("BertForSequenceClassification", num_labels=1)
    whole = torch.tensor([1, 0, 2])
    torch.testing.assert_close(
        ours(batch.ids, labels=whole).loss, ours(batch.ids, labels=whole.double()).loss
    )
    _, ours = make_pair("BertForSequenceClassification", problem_type="multi_label_classification")
    pairs = torch.tensor([[1, 0], [0, 0], [1, 1]])
    torch.testing.assert_close(
        ours(batch.ids, labels=pairs).loss, ours(batch.ids, labels=pairs.double()).loss
    )


@pytest.mark.parametrize("classifier_dropout", [None, 0.0, 0.5])
def test_classifier_dropout(make_pair, batch, classifier_dropout):
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}
    theirs, ours = make_pair("BertForSequenceClassification", classifier_dropout=classifier_dropout, **rates)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        results.append(model.train()(batch.ids).logits)
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert ours.dropout.p == (0.2 if classifier_dropout is None else classifier_dropout)


@pytest.mark.parametrize(
    ("cls", "fields", "kwargs", "error", "message"),
    [
        (
            BertForMaskedLM,
            {},
            {"labels": torch.ones(2, 5, dtype=torch.long)},
            ValueError,
            r"labels.*\(2, 4\).*\(2, 5\)",
        ),
        (BertForMaskedLM, {}, {"labels": torch.ones(2, 4)}, TypeError, "labels.*int64.*got torch.float32"),
        (BertForMaskedLM, {}, {"labels": torch.full((2, 4), 61)}, IndexError, "61 is out of bounds"),
        (
            BertForPreTraining,
            {},
            {"labels": torch.ones(2, dtype=torch.long)},
            ValueError,
            r"labels.*got \(2,\)",
        ),
        (
            BertForPreTraining,
            {},
            {"next_sentence_label": torch.ones(3, dtype=torch.long)},
            ValueError,
            r"next_sentence_label: expected shape \(2,\) or \(2, 1\), got \(3,\)",
        ),
        (
            BertForPreTraining,
            {},
            {"next_sentence_label": torch.ones(2)},
            TypeError,
            "next_sentence_label.*int64",
        ),
        (
            BertForSequenceClassification,
            {"num_labels": 3},
            {"labels": torch.ones(3, dtype=torch.long)},
            ValueError,
            r"labels: expected shape \(2,\)",
        ),
        (
            BertForSequenceClassification,
            {"num_labels": 3},
            {"labels": torch.ones(2)},
            ValueError,
            r"labels: expected shape \(2, 3\), got \(2,\)",
        ),
        (
            BertForSequenceClassification,
            {"problem_type": "regression"},
            {"labels": torch.ones(2)},  # would broadcast to (2, 2)
            ValueError,
            r"labels: expected shape \(2, 2\), got \(2,\)",
        ),
        (
            BertForSequenceClassification,
            {"problem_type": "single_label_classification"},
            {"labels": torch.ones(2)},
            TypeError,
            "labels.*int64.*got torch.float32",
        ),
    ],
)
def test_bad_labels(sizes, cls, fields, kwargs, error, message):
    model = cls(BertConfig(**sizes, **fields))
    with pytest.raises(error, match=message):
        model(torch.ones(2, 4, dtype=torch.long), **kwargs)


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForPreTraining, BertForSequenceClassification])
def test_missing_input_is_named_before_the_labels(sizes, cls):
    with pytest.raises(ValueError, match="input_ids and inputs_embeds, got neither"):
        cls(BertConfig(**sizes))(labels=torch.ones(2, 4, dtype=torch.long))


def test_inputs_embeds_with_labels(make_pair, batch, labels):
    theirs, ours = make_pair("BertForMaskedLM")
    embeds = torch.randn(3, 13, 48, generator=batch.generator, dtype=torch.float64)
    expected = theirs(inputs_embeds=embeds, attention_mask=batch.mask, labels=labels).loss
    torch.testing.assert_close(
        ours(inputs_embeds=embeds, attention_mask=batch.mask, labels=labels).loss, expected
    )


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_masked_lm_training_compiles_into_one_graph(make_pair, batch, labels, assert_same_gradients, backend):
    _, ours = make_pair("BertForMaskedLM", num_hidden_layers=1)
    _, eager = make_pair("BertForMaskedLM", num_hidden_layers=1)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for targets in (
        labels,
        labels.roll(1, dims=0),
        torch.full_like(labels, -100),
    ):  # another number of labels
        out, expected = (
            compiled(batch.ids, batch.mask, labels=targets),
            eager(batch.ids, batch.mask, labels=targets),
        )
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-9, atol=1e-10, equal_nan=True)
        out.loss.backward()
        expected.loss.backward()
    assert_same_gradients(eager, ours, atol=1e-10)


def test_exports(make_pair, batch):
    _, ours = make_pair("BertForMaskedLM")
    exported = torch.export.export(ours, (batch.ids, batch.mask)).module()
    out = exported(batch.ids, batch.mask)
    assert type(out) is type(ours(batch.ids))
    torch.testing.assert_close(out.logits, ours(batch.ids, batch.mask).logits, **EXACT)


def test_masked_lm_under_autocast(make_pair, batch, labels):
    theirs, ours = make_pair("BertForMaskedLM", torch.float32)
    exact = theirs(batch.ids, attention_mask=batch.mask, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(batch.ids, attention_mask=batch.mask, labels=labels).loss
        out = ours(batch.ids, batch.mask, labels=labels).loss
    out.backward()
    limit = max(2 * (expected - exact).abs(), 0.01 * exact)
    assert (out - exact).abs() < limit < 0.1 * exact
