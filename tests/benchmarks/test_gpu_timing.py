"""Timing by a GPU's events, on a device with a clock of its own."""

import pytest

from pytorch_ext.benchmarks import gpu_timing
from pytorch_ext.benchmarks.gpu_timing import COLD, COPIES, GRAPH, WARM


class Event:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.at = self.gpu.now

    def elapsed_time(self, other):
        assert self.gpu.synchronized, "events are read once the GPU is done"
        return other.at - self.at


class Fake:
    """Counts milliseconds; the first touch of a copy after a flush takes twice as long."""

    def __init__(self):
        self.now, self.cached, self.log, self.synchronized = 0.0, None, [], 0

    def event(self):
        return Event(self)

    def flush(self):
        self.now, self.cached = self.now + 7.0, None

    def stall(self):
        self.now += 3.0

    def synchronize(self):
        self.synchronized += 1

    def captured(self, call):
        return lambda _: [call(copy) for copy in range(COPIES)]

    def contender(self, name, milliseconds):
        def call(copy):
            self.now += milliseconds * (1 if self.cached == (name, copy) else 2)
            self.cached = (name, copy)
            self.log.append((name, copy))

        return call


@pytest.mark.parametrize(("how", "factor"), [(COLD, 2), (WARM, 1), (GRAPH, 2)])
def test_what_an_event_tells_is_the_call_alone(how, factor):
    gpu = Fake()
    calls = {"fast": gpu.contender("fast", 2.0), "slow": gpu.contender("slow", 5.0)}
    if how == GRAPH:
        calls = {name: gpu.captured(call) for name, call in calls.items()}
    found = gpu_timing.measure(calls, how, rounds=6, gpu=gpu)
    assert found.seconds["fast"] == pytest.approx([0.002 * factor] * 6)
    assert found.seconds["slow"] == pytest.approx([0.005 * factor] * 6)
    assert found.ratio("fast", "slow").median == pytest.approx(2.5)
    assert gpu.synchronized == 1  # not once for each call
    assert {copy for _, copy in gpu.log} == set(range(COPIES))  # inputs rotate


def test_no_contender_is_always_first():
    gpu = Fake()
    calls = {name: gpu.contender(name, 1.0) for name in ("a", "b")}
    gpu_timing.measure(calls, COLD, rounds=2, gpu=gpu)
    assert [name for name, _ in gpu.log][2:] == ["a", "b", "b", "a"]
