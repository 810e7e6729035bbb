"""Replays measured times into pytest-benchmark through a clock: its records, comparisons and gates then hold for them.

pytest runs this file with the plugin ``Replayed``; a contender's times in a case become a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any


class Clock:
    """Shows 0 and the first duration, 0 and the second one, and so on."""

    def __init__(self, seconds: list[float]) -> None:
        self._marks: Iterator[float] = iter([mark for one in seconds for mark in (0.0, one)])

    def __call__(self) -> float:
        return next(self._marks)


class Replayed:
    """Gives pytest the series of a run, and the record what pytest-benchmark has no place for."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def pytest_generate_tests(self, metafunc: Any) -> None:
        metafunc.parametrize("series", self.run.series, ids=[one.name for one in self.run.series])

    def pytest_benchmark_update_machine_info(self, config: Any, machine_info: dict[str, Any]) -> None:
        machine_info["pytorch_ext"] = self.run.environment

    def pytest_benchmark_update_json(self, config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
        from .runs import facts_of

        output_json["pytorch_ext"] = facts_of(self.run)


def test_measured(benchmark: Any, series: Any) -> None:
    benchmark.group, benchmark.params = series.group, None
    benchmark.extra_info["series"] = {
        name: value for name, value in asdict(series).items() if name != "seconds"
    }
    benchmark._timer = Clock(series.seconds)
    benchmark.pedantic(lambda: None, rounds=len(series.seconds))
