"""Batches by their real tokens, and the figures of a report."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytorch_ext.finetune.batches import TokenBudget, fill
from pytorch_ext.finetune.data import UNSEEN
from pytorch_ext.finetune.metrics import report


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(128, 400), st.integers(0, 9))
def test_every_text_is_in_one_batch_and_no_batch_is_empty_or_large(lengths, tokens, epoch):
    sampler = TokenBudget(lengths, tokens, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert len(batches) == len(sampler) and all(batches)
    share = sum(lengths) / len(batches)
    assert share <= tokens
    assert max(sum(lengths[n] for n in batch) for batch in batches) <= share + max(lengths)


def test_an_epoch_has_an_order_of_its_own_and_always_the_same():
    sampler = TokenBudget([5] * 50, 40, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first and len(list(sampler)) == len(first)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(itertools.chain(*TokenBudget([5] * 50, 40))) == list(range(50))


def test_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="tokens: expected at least twice the longest text, 9, got 17"):
        TokenBudget([3, 9], 17)


def test_fill():
    assert fill([1, 3, 4], [[0, 1], [2]]) == 8 / 10


def test_figures_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics", reason="to compare with")
    actual, predicted = [0, 0, 1, 1, 1, 2, 2, 3], [0, 1, 1, 1, 0, 2, 0, 2]
    found = report(actual, predicted, list("abcde"))
    assert found["accuracy"] == sklearn.accuracy_score(actual, predicted)
    assert found["f1"] == pytest.approx(sklearn.f1_score(actual, predicted, average="macro", zero_division=0))
    matrix = sklearn.confusion_matrix(actual, predicted, labels=range(5)).tolist()
    assert found["confusion"] == matrix
    precision, recall, _, rows = sklearn.precision_recall_fscore_support(
        actual, predicted, labels=range(5), zero_division=0
    )
    for row, p, r, n in zip(found["classes"], precision, recall, rows, strict=True):
        assert (row["precision"], row["recall"], row["rows"]) == (pytest.approx(p), pytest.approx(r), n)
    assert found["classes"][4]["f1"] is None


def test_a_label_that_training_never_saw_counts_as_wrong():
    found = report([0, UNSEEN, 1], [0, 0, 1], ["a", "b"])
    assert found["accuracy"] == 2 / 3 and found["unseen"] == 1
    assert found["confusion"] == [[1, 0], [0, 1], [1, 0]]
    assert found["classes"][0]["precision"] == 0.5
