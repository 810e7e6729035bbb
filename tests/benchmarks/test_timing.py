"""The timing core: the order of turns, medians and ratios, comparisons, memory, and the record."""

import itertools
import json
import math
import sys
import time

import pytest
import torch

from pytorch_ext.benchmarks import record, timing


class Clock:
    """Stands in for time.perf_counter: only the contenders move it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *seconds):
        """A contender whose calls take so long, one after the other; the last duration stays."""
        durations = list(seconds)

        def call(item):
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", fake)
    return fake


def test_every_contender_starts_equally_often():
    assert timing.rotated("abc", 0) == ["a", "b", "c"]
    assert timing.rotated("abc", 1) == ["b", "c", "a"]
    assert timing.rotated("abc", 5) == ["c", "a", "b"]


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd", "abcde"])
def test_in_a_balanced_order_everyone_follows_everyone_equally_often(names):
    turns = len(names) * (2 if len(names) % 2 else 1)
    orders = [timing.balanced(names, turn) for turn in range(turns)]
    assert all(sorted(order) == list(names) for order in orders)
    assert timing.balanced(names, turns) == orders[0]
    for place in range(len(names)):
        assert len({[order[place] for order in orders].count(name) for name in names}) == 1
    pairs = [pair for order in orders for pair in itertools.pairwise(order)]
    assert {pairs.count(pair) for pair in itertools.permutations(names, 2)} <= {turns // len(names)}


def test_contenders_take_turns_on_every_item():
    seen = []
    contenders = {name: (lambda item, name=name: seen.append((name, item))) for name in "ab"}
    timings = timing.interleave(contenders, ["x", "y"], rounds=2, warmup=0)
    # The order turns with the round and with the item.
    assert seen == [
        *[("a", "x"), ("b", "x"), ("b", "y"), ("a", "y")],
        *[("b", "x"), ("a", "x"), ("a", "y"), ("b", "y")],
    ]
    assert timings.rounds == 2
    assert set(timings.seconds) == {"a", "b"}


def test_the_median_is_taken_for_each_item_and_then_summed(clock):
    durations = (1, 10, 2, 20, 900, 30)  # the 900 is somebody else's burst
    timings = timing.interleave({"a": clock.takes(*durations)}, ["x", "y"], rounds=3, warmup=0)
    assert timings.seconds["a"] == [1, 10, 2, 20, 900, 30]
    assert timings.rounds == 3
    assert timings.median("a") == 2 + 20


def test_a_pair_is_the_same_item_in_the_same_round(clock):
    slow, fast = clock.takes(4, 40, 8, 80), clock.takes(1, 10, 4, 40)
    timings = timing.interleave({"slow": slow, "fast": fast}, ["x", "y"], rounds=2, warmup=0)
    assert timings.ratio("fast", "slow") == timing.Ratio(median=3.0, low=2.0, high=4.0, pairs=4)


def test_warm_up_calls_are_not_timed(clock):
    timings = timing.interleave({"a": clock.takes(100, 100, 1)}, rounds=3, warmup=2)
    assert timings.seconds["a"] == [1, 1, 1]


def test_the_ratio_is_the_median_over_pairs_and_not_of_medians():
    timings = timing.Timings({"base": [1.0, 8.0, 9.0], "fast": [0.5, 1.0, 9.0]})
    ratio = timings.ratio("fast", "base")
    assert ratio.median == 2.0  # of 2, 8 and 1; the ratio of the medians would be 8
    assert (ratio.low, ratio.high) == (1.5, 5.0)
    assert ratio.pairs == 3
    assert timings.ratio("base", "base").median == 1.0


def test_one_pair_is_a_ratio_without_spread():
    ratio = timing.Timings({"base": [3.0], "fast": [1.5]}).ratio("fast", "base")
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (2.0, 2.0, 2.0, 1)


def test_the_budget_ends_it_after_a_whole_round(clock):
    contenders = {"a": clock.takes(1), "b": clock.takes(1)}
    timings = timing.interleave(contenders, ["x", "y"], rounds=100, warmup=0, seconds=21)
    assert timings.rounds == 5  # of four seconds each; a sixth would end at 24
    short = timing.interleave(contenders, rounds=100, warmup=0, seconds=0.1, min_rounds=3)
    assert short.rounds == 3


def test_progress_is_outside_the_timing(clock):
    def progress():
        clock.now += 1000

    timings = timing.interleave({"a": clock.takes(1)}, rounds=2, warmup=0, progress=progress)
    assert timings.seconds["a"] == [1, 1]


def test_steps_hand_on_what_they_return_and_are_timed_apart(clock):
    seen = []

    def steps(name, first, second):
        def forward(item):
            clock.now += first
            return f"{name} of {item}"

        def backward(out):
            clock.now += second
            seen.append(out)

        return [forward, backward]

    contenders = {"a": steps("a", 2, 3), "b": steps("b", 4, 1)}
    forward, backward = timing.interleave_steps(contenders, ["x"], rounds=2, warmup=0)
    assert seen == ["a of x", "b of x", "b of x", "a of x"]
    assert forward.seconds == {"a": [2, 2], "b": [4, 4]}
    assert backward.seconds == {"a": [3, 3], "b": [1, 1]}
    assert forward.ratio("a", "b").median == 2.0


def test_real_time_is_measured():
    contenders = {"short": lambda item: time.sleep(0.01), "long": lambda item: time.sleep(0.05)}
    timings = timing.interleave(contenders, rounds=3, warmup=0)
    assert 0.01 <= timings.median("short") < timings.median("long")
    assert timings.ratio("short", "long").median > 1.2


def test_an_error_in_a_contender_is_raised_and_collection_goes_on():
    import gc

    with pytest.raises(ZeroDivisionError):
        timing.interleave({"a": lambda item: 1 / 0}, rounds=1, warmup=0)
    assert gc.isenabled()


WANT = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
TRUTH = {"x": WANT["x"].double() + 1e-6}


def test_limits_are_a_multiple_of_the_baselines_rounding():
    limits = timing.rounding_limits(WANT, TRUTH)
    assert limits["x"] == pytest.approx(timing.SLACK * 1e-6, rel=1e-3)


def test_a_small_tensor_that_is_exact_by_luck_gets_the_usual_relative_error():
    want = {name: torch.tensor([10.0]) for name in "abc"}
    truth = {"a": want["a"].double() + 1e-5, "b": want["b"].double() + 1e-5, "c": want["c"].double()}
    limits = timing.rounding_limits(want, truth)
    assert limits["c"] == pytest.approx(timing.SLACK * 1e-5, rel=1e-3)


def test_what_rounding_explains_is_green():
    got = {"x": WANT["x"] + 2e-6}
    agreement = timing.compare(got, WANT, timing.rounding_limits(WANT, TRUTH))
    assert agreement.ok
    assert agreement.largest == pytest.approx(2e-6, rel=0.1)
    assert agreement.cosine == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("damage", [1e-3, float("nan"), float("inf")])
def test_one_wrong_value_is_red(damage):
    got = {"x": WANT["x"].clone()}
    got["x"][1, 0] += damage
    agreement = timing.compare(got, WANT, timing.rounding_limits(WANT, TRUTH))
    assert not agreement.ok
    assert "DISAGREES" in str(agreement)


def test_a_missing_or_misshapen_output_is_red():
    limits = timing.rounding_limits(WANT, TRUTH)
    assert not timing.compare({}, WANT, limits).ok
    assert not timing.compare({"x": WANT["x"][:1]}, WANT, limits).ok


def test_an_exact_baseline_admits_an_exact_contender_only():
    limits = timing.rounding_limits(WANT, {"x": WANT["x"].double()})
    assert timing.compare(WANT, WANT, limits).ok
    assert not timing.compare({"x": WANT["x"] + 1e-6}, WANT, limits).ok


def test_the_lowest_cosine_is_that_of_the_worst_row():
    got = {"x": torch.tensor([[1.0, 2.0], [4.0, -3.0]])}
    assert timing.compare(got, WANT, {"x": 100.0}).cosine == pytest.approx(0.0, abs=1e-6)
    assert timing.compare(got, WANT, {"x": 100.0}, rows=False).cosine == pytest.approx(5 / 30, abs=1e-6)


def test_the_worse_of_two_agreements_keeps_nan():
    good, bad = timing.Agreement(1e-6, 1.0, 0.5), timing.Agreement(float("nan"), 0.9, float("nan"))
    for worse in (good.worse(bad), bad.worse(good)):
        assert math.isnan(worse.largest)
        assert worse.cosine == 0.9
        assert not worse.ok


def test_no_rows_at_all_agree():
    empty = {"x": torch.empty(0, 4)}
    assert timing.compare(empty, empty, timing.rounding_limits(empty, empty)).ok


PROBE = """
import torch

def prepare(megabytes):
    def run():
        kept = torch.ones(megabytes * 1_000_000 // 4)
        return kept * 2
    return run

def prepare_what_keeps_its_scratch(megabytes):
    scratch = {}
    def run(megabytes):
        if megabytes not in scratch:
            scratch.clear()
            scratch[megabytes] = torch.ones(megabytes * 1_000_000 // 4)
    return lambda: run(1), lambda: run(megabytes)

def broken():
    raise RuntimeError("no")
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A module that a fresh process can import."""
    (tmp_path / "memory_probe_of_a_test.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import memory_probe_of_a_test

    yield memory_probe_of_a_test
    del sys.modules["memory_probe_of_a_test"]


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_fresh_process(probe):
    memory = timing.peak_memory(probe.prepare, 100)
    assert memory.bytes == pytest.approx(200e6, rel=0.05)
    assert "fresh process" in memory.method
    kept = timing.peak_memory(probe.prepare_what_keeps_its_scratch, 100)
    assert kept.bytes == pytest.approx(100e6, rel=0.05)


@pytest.mark.full
def test_a_process_that_fails_has_no_figure(probe):
    assert timing.peak_memory(probe.broken) is None


def test_the_record_says_what_the_numbers_depend_on():
    found = record.environment("cpu")
    assert found["device_type"] == "cpu"
    assert found["device"] and found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].count(".") == 2
    assert "interleaved" in found["how_timed"]
    json.dumps(found)


def test_the_attention_kernel_is_named():
    name = record.sdpa_backend(2, 2, 16, 8, dtype=torch.float32, device="cpu", masked=True)
    assert name in {"flash_attention", "math"}
