"""A run of the suite: what was timed, what disagreed, what was left out; kept as a record of pytest-benchmark."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import op_report, timing

IN_BATCHES = "texts in batches"  # in the name of a case that is many batches and not one


class RecordError(Exception):
    """A file that is no record; the message says which and why."""


@dataclass
class Series:
    """The times of one contender in one case: seconds per call, round by round."""

    suite: str  # ops, bert, train, first call
    case: str
    dtype: str
    contender: str
    seconds: list[float]
    ours: bool = False
    speedup: dict[str, Any] | None = None  # over the baseline: median, low, high, pairs
    facts: dict[str, Any] = field(default_factory=dict)  # shapes, rates, agreement

    @property
    def group(self) -> str:
        return f"{self.suite}: {self.case}, {self.dtype}"

    @property
    def name(self) -> str:
        return f"{self.group}: {self.contender}"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Run:
    """All that a run found."""

    suite: str
    environment: dict[str, Any]
    series: list[Series] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)  # case, contender, bytes, method
    red: list[str] = field(default_factory=list)  # who disagreed, where
    notes: list[str] = field(default_factory=list)  # who was left out, and why

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def add(
        self, timings: timing.Timings, baseline: str, ours: set[str], facts: dict[str, Any], **where
    ) -> None:
        """One series for each contender of interleaved timings; `facts` by contender."""
        for name, seconds in timings.seconds.items():
            ratio = asdict(timings.ratio(name, baseline)) if baseline in timings.seconds else None
            self.series.append(
                Series(
                    contender=name,
                    seconds=seconds,
                    ours=name in ours,
                    speedup=ratio,
                    facts=facts[name],
                    **where,
                )
            )


# --- Records --------------------------------------------------------------------------------------


def save(run: Run, file: Path) -> Path:
    """Writes the record; pytest-benchmark makes it, where it is there, out of the times that were measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not run.series or importlib.util.find_spec("pytest_benchmark") is None:
        file.write_text(json.dumps({"pytorch_ext": asdict(run)}, indent=2), encoding="utf-8")
        return file
    import pytest

    from . import replay

    words = [replay.__file__, f"--benchmark-json={file}", "-q", "-p", "no:cacheprovider"]
    words += ["-c", os.devnull, f"--rootdir={Path(replay.__file__).parent}", "--import-mode=importlib"]
    words += ["-p", "no:xdist", "--benchmark-enable"]
    said = io.StringIO()
    # A worker of pytest-xdist measures nothing by itself; here nothing is measured any more.
    worker = os.environ.pop("PYTEST_XDIST_WORKER", None)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = pytest.main(words, plugins=[replay.Replayed(run)])
    if worker is not None:
        os.environ["PYTEST_XDIST_WORKER"] = worker
    if status:
        raise RuntimeError(f"pytest-benchmark made no record:\n{said.getvalue()}")
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(op_report.rounded(whole)) + "\n", encoding="utf-8")  # a quarter of the bytes
    return file


def facts_of(run: Run) -> dict[str, Any]:
    """What pytest-benchmark has no place for."""
    return {name: value for name, value in asdict(run).items() if name != "series"}


def load(file: Path) -> Run:
    """Reads a record of the suite, of bench_bert or of a benchmark of single ops."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} is no record: {error}") from None
    if "pytorch_ext" in found:
        told = found["pytorch_ext"]
        lines = [Series(**one) for one in told.pop("series", [])]
        lines += [
            Series(**one["extra_info"]["series"], seconds=one["stats"]["data"])
            for one in found.get("benchmarks", [])
        ]
        return Run(**told, series=lines)
    if "contenders" in found:
        return _of_bert(found)
    if "lines" in found:
        return _of_ops(found)
    raise RecordError(f"{file} is no record of the suite, of bench_bert or of a benchmark of single ops")


def bert_name(case: dict[str, Any]) -> str:
    """A case in a few words."""
    kind = {"bert": "BERT", "vit": "ViT"}[case.get("family", "bert")]
    shape = f"{kind} {case['hidden']} x {case['layers']}, {case['batch']} x {case['seq']}"
    return f"{shape}, {'sorted' if case['fill'] == 'sorted' else case['fill'] + ' %'}"


def _of_bert(found: dict[str, Any]) -> Run:
    case = found["case"]
    run = Run("bert", found["environment"])
    for row in found["contenders"]:
        if "seconds" in row:
            facts = {
                **case,
                "real_tokens": found["real_tokens"],
                "filled": found["filled"],
                "what": row["what"],
            }
            suite = "train" if case["mode"] == "train" else "bert"
            run.series.append(
                Series(
                    suite,
                    bert_name(case),
                    case["dtype"],
                    row["name"],
                    row["seconds"],
                    row["what"].startswith("pytorch_ext"),
                    row["speedup"],
                    facts,
                )
            )
        if row.get("memory"):
            run.memory.append({"case": bert_name(case), "contender": row["name"], **row["memory"]})
    return run


def _of_ops(found: dict[str, Any]) -> Run:
    """Such a record keeps medians alone."""
    run = Run("ops", found["environment"], notes=found["notes"])
    for line in found["lines"]:
        case = f"{line['name']} {line['shape']}, {line['mode']}"
        seconds = [line["median_us"] / 1e6]
        ratio = line["speedup"].get("eager")
        run.series.append(
            Series("ops", case, line["dtype"], line["contender"], seconds, line["ours"], ratio, line)
        )
    return run


def together(found: list[Run]) -> Run:
    """Several records of one machine as one run; the environment is the latest one's."""
    latest = max(found, key=lambda run: run.environment["date"])
    whole = Run(" ".join(dict.fromkeys(run.suite for run in found)), latest.environment)
    for run in found:
        whole.series += run.series
        whole.memory += run.memory
        whole.red += run.red
        for sentence in run.notes:
            whole.note(sentence)
    return whole


# --- Regressions ----------------------------------------------------------------------------------

LEAST_BAND = 0.05
"""Of a median: what two runs of the same code differ by on a machine that nobody else uses."""


@dataclass(frozen=True)
class Change:
    """One series before and after: `ratio` above 1 is slower; it counts beyond 1 + `band`."""

    name: str
    old: float
    new: float
    band: float

    @property
    def ratio(self) -> float:
        return self.new / self.old

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.band:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.band) else ""


def changes(old: list[Run], new: list[Run]) -> list[Change]:
    """What stands in both, each side a run or several repeated ones."""
    before, after = _by_name(old), _by_name(new)
    found = []
    for name in (name for name in before if name in after):
        sides = before[name], after[name]
        medians = [statistics.median([one.median for one in side]) for side in sides]
        found.append(Change(name, *medians, max(LEAST_BAND, sum(_spread(side) for side in sides))))
    return found


def _by_name(runs: list[Run]) -> dict[str, list[Series]]:
    found: dict[str, list[Series]] = {}
    for run in runs:
        for one in run.series:
            found.setdefault(one.name, []).append(one)
    return found


def _spread(repeated: list[Series]) -> float:
    """Of the median: how far repeated runs lie apart; of a single one, how far apart its quartiles are."""
    if len(repeated) > 1:
        medians = [one.median for one in repeated]
        return (max(medians) - min(medians)) / statistics.median(medians)
    (one,) = repeated
    if len(one.seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(one.seconds, n=4, method="inclusive")
    return (high - low) / middle
