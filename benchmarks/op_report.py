"""The record, the table and the winners of the benchmarks of single ops."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import record, timing
from .console import in_red, table

if TYPE_CHECKING:
    from .op_bench import Contender, Result

RESULTS = Path(__file__).resolve().parent / "results"
LEAST = 0.97  # of the speed of the better peer: below it an op is a loss for somebody
BUSY = 0.5  # processes on average; what they disturb most are short calls on several threads
PEERS = ("eager", "compile")
Line = dict[str, Any]


def as_record(name: str, results: list[Result], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, and what the numbers depend on."""
    from .op_bench import COMPILE_MODE, DTYPES

    device = options.device
    environment = record.environment(device)
    environment["how_timed"] = environment["how_timed"].replace("rotating order", "balanced order")
    found: dict[str, Any] = {
        "benchmark": name,
        "environment": environment,
        "peers": {"eager": "PyTorch's function or composition of functions", "compile": COMPILE_MODE},
        "quick": options.quick,
        "load_before": options.load,
        "cases": [],
        "lines": [],
        "notes": [],
    }
    for result in results:
        case = result.case
        found["cases"].append(
            {
                "op": case.op,
                "name": case.name,
                "shape": case.shape,
                "dtype": result.dtype,
                "eager": "composition"
                if case.sdpa is None
                else f"SDPA ({record.sdpa_backend(**case.sdpa, dtype=DTYPES[result.dtype], device=device)} kernel)",
                "rates": asdict(result.rates) if result.rates else None,
                "disagree": [contender.name for contender in result.contenders if contender.failures],
                "outside_the_contract": {c.name: c.broken for c in result.contenders if c.broken},
                "missing": [contender.name for contender in result.contenders if contender.note],
            }
        )
        found["notes"] += _notes(result)
        for mode, timings in result.timings.items():
            lines = [_line(result, mode, timings, contender) for contender in result.contenders]
            found["lines"] += [line for line in lines if line]
    found["notes"] = [*_skipped(results), *_broken(results), *found["notes"]]
    found["geomeans"] = _geomeans(found["lines"])
    return found


def _line(result: Result, mode: str, timings: timing.Timings, contender: Contender) -> Line | None:
    """One contender in one mode of a case; None where it was not timed."""
    from .op_bench import DTYPES

    name = contender.name
    if name not in timings.seconds:
        return None
    seconds = timings.median(name)
    cost = result.case.cost(mode, DTYPES[result.dtype])
    unit, rate, limit = cost.limit(seconds, result.rates)
    over = [other for other in timings.seconds if other != name and (other in PEERS or other == "native")]
    return {
        "op": result.case.op,
        "name": result.case.name,
        "shape": result.case.shape,
        "dtype": result.dtype,
        "mode": mode,
        "contender": name,
        "ours": contender.backend is not None,
        "median_us": seconds * 1e6,
        "speedup": {other: asdict(timings.ratio(name, other)) for other in over},
        **asdict(cost),
        "unit": unit,
        "rate": rate,
        "limit": limit,
    }


def _notes(result: Result) -> list[str]:
    """What went wrong with one case."""
    where = f"{result.case.name} {result.case.shape} {result.dtype}"
    if result.note:
        return [f"left out: {where}: {result.note}"]
    return [
        f"{contender.name}: {where} DISAGREES: {'; '.join(contender.failures)}; no time is shown"
        for contender in result.contenders
        if contender.failures
    ]


def _skipped(results: list[Result]) -> list[str]:
    """Who cannot run what: each reason once, with the ops that it is true for."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for contender in result.contenders:
            if contender.note:
                reasons.setdefault((contender.name, contender.note), {})[result.case.op] = None
    return [f"skipped: {name} for {', '.join(ops)}: {why}" for (name, why), ops in reasons.items()]


def _broken(results: list[Result]) -> list[str]:
    """Peers that err more than ours may: their times are shown, and the reader is told."""
    where: dict[str, list[str]] = {}
    for result in results:
        for contender in result.contenders:
            if contender.broken and not contender.failures:
                case = f"{result.case.name} {result.case.shape} {result.dtype}"
                where.setdefault(contender.name, []).append(f"{case} ({contender.broken[0]})")
    return [
        f"{name} errs more than the contract allows ours in {len(cases)} of {len(results)} cases, such as {cases[0]}"
        for name, cases in where.items()
    ]


def _geomeans(lines: list[Line]) -> list[dict[str, Any]]:
    """Of each backend's speed-ups over each peer, by op, dtype and mode."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line["ours"]:
            key = tuple(line[part] for part in ("name", "dtype", "mode", "contender"))
            groups.setdefault(key, []).append(line)
    return [
        {
            **dict(zip(("name", "dtype", "mode", "contender"), key, strict=True)),
            "cases": len(group),
            **{peer: geomean(_over(line, peer) for line in group) for peer in PEERS},
        }
        for key, group in groups.items()
    ]


def geomean(ratios: Iterable[float | None]) -> float | None:
    """None where there is nothing, or where a ratio is missing: it would be one of other cases."""
    ratios = list(ratios)
    if not ratios or None in ratios:
        return None
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _over(line: Line, peer: str) -> float | None:
    return line["speedup"][peer]["median"] if peer in line["speedup"] else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x"


def as_text(found: dict[str, Any]) -> str:
    """The table, the geometric means, and who is slower than what a user has already."""
    environment = found["environment"]
    threads = f", {environment['threads']} threads" if environment["device_type"] == "cpu" else ""
    parts = [
        f"{environment['device']} ({environment['cpu_capability']}){threads}; "
        f"torch {environment['versions']['torch']}, commit {environment['commit']}",
        "rate: what the call must move or compute, by its time; limit: copying or torch.mm, whichever binds. "
        "A tensor that stays in the caches moves faster than the limit.",
    ]
    if found["load_before"] > BUSY:
        parts.append(f"Others used this machine: a load of {found['load_before']:.1f} before the start.")
    parts.append("")
    ours = [line for line in found["lines"] if line["ours"]]
    if ours:
        parts += [_lines(ours, found["lines"]), "", _means(found["geomeans"]), "", *_under(ours)]
    parts += [in_red(note) if "DISAGREES" in note else note for note in found["notes"]]
    return "\n".join(parts)


def _lines(ours: list[Line], everything: list[Line]) -> str:
    eager = {_place(line): line["median_us"] for line in everything if line["contender"] == "eager"}
    header = ["op", "shape", "dtype", "direction", "backend", "eager us", "us", "/ eager", "/ compile"]
    header += ["rate", "limit", "share"]
    body, slow = [], set()
    for place, line in enumerate(ours):
        if _slower(line):
            slow.add(place)
        body.append(
            [
                *(line[part] for part in ("name", "shape", "dtype", "mode", "contender")),
                f"{eager[_place(line)]:,.0f}",
                f"{line['median_us']:,.0f}",
                *(_times(_over(line, peer)) for peer in PEERS),
                f"{line['rate']:.1f} {line['unit']}",
                f"{line['limit']:.1f}",
                f"{line['rate'] / line['limit']:.0%}",
            ]
        )
    return table(header, body, frozenset(slow))


def _place(line: Line) -> tuple[str, ...]:
    return tuple(line[part] for part in ("name", "shape", "dtype", "mode"))


def _means(geomeans: list[dict[str, Any]]) -> str:
    header = ["geometric mean", "dtype", "direction", "backend", "cases", "/ eager", "/ compile"]
    body = [
        [
            *(mean[part] for part in ("name", "dtype", "mode", "contender")),
            str(mean["cases"]),
            *(_times(mean[peer]) for peer in PEERS),
        ]
        for mean in geomeans
    ]
    return table(header, body)


def better_peer(line: Line) -> float:
    """The speed-up over the better of eager and compile."""
    return min(found["median"] for peer, found in line["speedup"].items() if peer in PEERS)


def _slower(line: Line) -> bool:
    return better_peer(line) < LEAST


def _under(ours: list[Line]) -> list[str]:
    """For each backend one line that names every case in which it is slower than a peer."""
    sentences = []
    for name in dict.fromkeys(line["contender"] for line in ours):
        slow = [line for line in ours if line["contender"] == name and _slower(line)]
        cases = [f"{' '.join(_place(line))} ({better_peer(line):.2f})" for line in slow]
        text = "; ".join(cases) or "none"
        sentences.append(f"{name}, under {LEAST} x the better of eager and compile: {text}")
    return sentences


def winners(found: dict[str, Any]) -> str:
    """Rows for FASTEST of pytorch_ext/backends/_auto.py: per op the backend with the best geometric mean over native.

    Each case counts with every direction and dtype, alike. A backend that could not run all that native ran, or
    disagreed once, wins nothing.
    """
    device = _architecture(found["environment"])
    sentences = ["Fastest by the geometric mean over native, all cases, dtypes and directions alike:"]
    for op in dict.fromkeys(line["op"] for line in found["lines"]):
        lines = [line for line in found["lines"] if line["op"] == op and line["ours"]]
        whole = {_place(line) for line in lines if line["contender"] == "native"}
        wrong = {name for case in found["cases"] if case["op"] == op for name in case["disagree"]}
        means, why = {"native": 1.0}, []
        for name in dict.fromkeys(line["contender"] for line in lines):
            own = [line for line in lines if line["contender"] == name]
            if name == "native" or not whole:
                continue
            if name in wrong or {_place(line) for line in own} != whole:
                why.append(f"{name} {'disagrees' if name in wrong else 'did not run'} in some cases")
                continue
            means[name] = geomean(_over(line, "native") for line in own)
            why.append(f"{name} {means[name]:.2f} x native over {len(own)} ({_by_part(own)})")
        sentences.append(
            f'    ("{op}", "{device}"): "{max(means, key=means.__getitem__)}",  # {"; ".join(why) or "alone"}'
        )
    return "\n".join(sentences)


def _by_part(lines: list[Line]) -> str:
    """The geometric mean of each dtype and direction, and the worst case."""
    parts = []
    for part in ("dtype", "mode"):
        for value in dict.fromkeys(line[part] for line in lines):
            mean = geomean(_over(line, "native") for line in lines if line[part] == value)
            parts.append(f"{value} {mean:.2f}")
    return f"{', '.join(parts)}, lowest {min(_over(line, 'native') for line in lines):.2f}"


def _architecture(environment: dict[str, Any]) -> str:
    if environment["device_type"] == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def folder(environment: dict[str, Any]) -> str:
    """The name of the device's folder under results, such as amd-epyc-avx2-2-threads."""
    words = [environment["device"]]
    if environment["device_type"] == "cpu":
        words += [environment["cpu_capability"], f"{environment['threads']} threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def save(found: dict[str, Any], file: Path) -> Path:
    """Writes the record; into the folder of its device where no file is named."""
    if file == RESULTS:
        dtypes = "-".join(dict.fromkeys(case["dtype"] for case in found["cases"]))
        file = RESULTS / folder(found["environment"]) / f"{found['benchmark']}-{dtypes}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_json(found) + "\n", encoding="utf-8")
    return file


def _json(found: dict[str, Any]) -> str:
    """A line of text for each case and each result, so that two records can be compared line by line."""
    short: Callable[[Any], str] = lambda value: json.dumps(rounded(value))  # noqa: E731
    parts = []
    for key, value in found.items():
        if isinstance(value, list) and value:
            inner = ",\n    ".join(map(short, value))
            parts.append(f'  "{key}": [\n    {inner}\n  ]')
        else:
            parts.append(f'  "{key}": {short(value)}')
    return "{\n" + ",\n".join(parts) + "\n}"


def rounded(value: Any) -> Any:
    """Five digits: no clock tells more."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value
