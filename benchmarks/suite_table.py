"""The table at the end of a run, and the one of a comparison."""

from __future__ import annotations

import statistics

from .console import in_red, table
from .runs import Change, Run, Series


def as_text(run: Run) -> str:
    """Each case with its contenders, then who disagreed, then who was left out and why."""
    parts = [header(run), ""]
    if run.series:
        columns = ["", "ms", "speed-up", "quartiles", "rounds"]
        body: list[list[str]] = []
        for group in dict.fromkeys(one.group for one in run.series):
            body.append([group, "", "", "", ""])
            body += [_row(one) for one in run.series if one.group == group]
        parts += [table(columns, body), ""]
    if run.memory:
        body = [[f"{one['case']}: {one['contender']}", f"{one['bytes'] / 1e6:,.0f} MB"] for one in run.memory]
        parts += [table(["peak memory of a call", ""], body), ""]
    parts += [in_red(sentence) for sentence in run.red]
    parts += [
        *_gathered(run.notes),
        "A speed-up is the median over pairs of the baseline's time by the contender's.",
    ]
    return "\n".join(parts)


def _gathered(notes: list[str]) -> list[str]:
    """One line for all who were left out for the same reason."""
    who: dict[str, list[str]] = {}
    for note in notes:
        head, *rest = note.split(": ", 2)
        name, why = rest if head == "left out" and len(rest) == 2 else ("", note)
        who.setdefault(why, []).append(name)
    return [f"left out: {', '.join(names)}: {why}" if names[0] else why for why, names in who.items()]


def summary(run: Run) -> str:
    """One line: the geometric mean of each contender's speed-ups in each suite, and how many disagreed."""
    suites: dict[str, dict[str, list[float]]] = {}
    for one in run.series:
        if one.speedup and one.contender not in ("eager", "PyTorch"):
            own = suites.setdefault(one.suite, {})
            own.setdefault(one.contender, []).append(one.speedup["median"])
    parts = [f"{len(run.red)} red"]
    for suite, ratios in suites.items():
        means = [
            f"{name} {statistics.geometric_mean(own):.2f} x ({len(own)})" for name, own in ratios.items()
        ]
        parts.append(f"{suite}, geometric means over the baseline (cases): {', '.join(means)}")
    return "; ".join(parts)


def header(run: Run) -> str:
    """The machine, the versions and the commit in one line."""
    found = run.environment
    threads = f", {found['threads']} threads" if found["device_type"] == "cpu" else ""
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    return f"{found['device']}{threads}; {versions}; commit {found['commit']}; {found['date'][:10]}"


def _row(one: Series) -> list[str]:
    ratio = one.speedup
    cells = [f"{ratio['median']:.2f} x", f"{ratio['low']:.2f}-{ratio['high']:.2f}"] if ratio else ["", ""]
    return [f"  {one.contender}", f"{one.median * 1e3:,.3f}", *cells, str(len(one.seconds))]


def of_changes(found: list[Change]) -> str:
    """What became slower in red; below, how many stayed within their bands."""
    outside = [one for one in found if one.verdict]
    red = frozenset(place for place, one in enumerate(outside) if one.verdict == "slower")
    body = [
        [
            one.name,
            f"{one.old * 1e3:,.3f}",
            f"{one.new * 1e3:,.3f}",
            f"{one.ratio:.2f} x",
            f"{one.band:.0%}",
            one.verdict,
        ]
        for one in outside
    ]
    lines = [table(["", "old ms", "new ms", "new / old", "band", ""], body, red)] if body else []
    within = len(found) - len(outside)
    return "\n".join([*lines, f"{within} of {len(found)} series within their noise"])
