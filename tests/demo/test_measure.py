"""Batches, comparison and timing of the demo, with a tiny encoder."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from pytorch_ext.benchmarks import timing
from pytorch_ext.demo import finetune, measure, model
from pytorch_ext.demo.batches import AS_THEY_COME, BY_LENGTH, max_tokens, plan
from pytorch_ext.demo.measure import EAGER, OURS, Contender, Setting

TEXTS = ["word " * (1 + (7 * number) % 13) for number in range(22)]


@pytest.fixture
def setting(tiny_bert):
    return Setting(tiny_bert, torch.device("cpu"), torch.float32)


@pytest.fixture
def made(setting):
    return plan(TEXTS, model.load_tokenizer(setting.folder), 40, 4, setting.device)


def test_batches_as_they_come_and_by_length(made):
    assert made.order[AS_THEY_COME] == [
        list(range(at, at + 4)) for at in range(0, 20, 4)
    ]  # 21 and 22 are left out
    longest_first = [len(TEXTS[index]) for batch in made.order[BY_LENGTH] for index in batch]
    assert longest_first == sorted(longest_first, reverse=True)
    assert made.series(BY_LENGTH, 5).padding < made.series(AS_THEY_COME, 5).padding
    assert 0 <= made.padding_if_sorted_by_tokens() < 0.5


def test_a_batch_is_padded_to_its_longest_text(made):
    batch = made.batch([0, 1, 2])
    assert batch.padded_length == max(batch.lengths)
    assert batch.mask.sum(1).tolist() == list(batch.lengths)
    assert batch.positions == 3 * batch.padded_length
    assert batch.head(2).lengths == batch.lengths[:2]


def test_a_series_is_spread_over_all_lengths(made):
    padded = [batch.padded_length for batch in made.series(BY_LENGTH, 2).batches]
    assert padded[0] > padded[1]
    assert made.series(BY_LENGTH, 1000).available == len(made.series(BY_LENGTH, 1000).batches) == 5


def test_the_budget_decides_between_least_and_most(made):
    mean_positions = sum(made.positions(batch) for batch in made.order[AS_THEY_COME]) / 5
    for seconds, count in ((1e-9, 2), (4 * 2.5 * mean_positions, 3), (1e9, 10)):
        assert made.fitting(AS_THEY_COME, seconds, per_position=1.0, least=2, most=10) == count


def test_fewer_texts_than_a_batch_make_one(setting):
    small = plan(["one", "two"], model.load_tokenizer(setting.folder), 40, 32, setting.device)
    assert small.order[AS_THEY_COME] == [[0, 1]]


def test_the_length_is_what_tokenizer_and_positions_allow(setting):
    tokenizer = model.load_tokenizer(setting.folder)
    config = model.load_model(setting.folder, "cpu", torch.float32).config
    assert max_tokens(256, tokenizer, config) == 64
    assert max_tokens(32, tokenizer, config) == 32


def test_embeddings_are_normalised_means_over_real_tokens():
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]]])
    pooled = measure.pool(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8]]))


def run(setting, made, spoil=None):
    field = measure.contenders(setting, compiled=False)
    if spoil is not None:
        spoil(field[-1].model)
    series = made.series(AS_THEY_COME, 2)
    limits = measure.rounding(setting, [series.batches[0].head(2)], field[0])
    for batch in series.batches:
        measure.check(field, batch, limits)
    measure.measure(series, field, seconds=0.01, progress=lambda: None)
    return field, series


def test_contenders_agree_and_are_timed(setting, made):
    field, series = run(setting, made)
    assert [contender.name for contender in field] == [EAGER, OURS]
    assert field[-1].agreement.ok
    assert set(series.timings.seconds) == {EAGER, OURS}
    assert series.timings.rounds >= 3
    assert measure.removes_padding(field[-1].model, series.batches[0])
    assert not measure.removes_padding(field[0].model, series.batches[0])


def test_a_red_comparison_gives_no_time(setting, made):
    def spoil(ours):
        with torch.no_grad():
            ours.encoder.layer[1].output.dense.bias[0] += 1e-3

    field, series = run(setting, made, spoil)
    assert field[-1].red
    assert not field[-1].usable
    assert set(series.timings.seconds) == {EAGER}


def test_a_compiler_that_is_missing_leaves_a_reason(made):
    def broken(**inputs):
        raise RuntimeError("wrapped") from FileNotFoundError("no C++ compiler\nsecond line")

    field = [Contender(measure.COMPILED, broken)]
    measure.first_calls(field, made.batch([0, 1]), lambda: None)
    assert not field[0].usable
    assert field[0].note == "not available here: FileNotFoundError: no C++ compiler"


def test_any_other_contender_that_fails_is_an_error(made):
    def broken(**inputs):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure.first_calls([Contender(OURS, broken)], made.batch([0]), lambda: None)


def test_a_fine_tuning_step_agrees_and_is_timed(setting, made):
    step = finetune.measure(setting, made.batch([0, 1, 2]), seconds=0.01, progress=lambda: None)
    assert step.agreement.ok
    assert step.agreement.cosine == pytest.approx(1.0, abs=1e-6)
    assert step.loss > 0
    assert set(step.timings.seconds) == {EAGER, OURS}


def test_a_fine_tuning_step_that_disagrees_is_not_timed(setting, made, monkeypatch):
    red = timing.Agreement(1.0, 0.0, 9.0)
    monkeypatch.setattr(finetune, "compare", lambda *_: (red, 0.7))
    step = finetune.measure(setting, made.batch([0, 1]), seconds=0.01, progress=lambda: None)
    assert step.timings is None


def test_memory_is_probed_by_a_function_that_a_fresh_process_can_make(setting, made):
    inputs = {name: tensor.tolist() for name, tensor in made.batch([0, 1]).inputs.items()}
    warm_up, call = measure.memory_probe(OURS, setting, torch.get_num_threads(), inputs)
    assert warm_up().shape == (1, 32)
    assert call().shape == (2, 32)
    assert isinstance(setting.folder, Path)
