"""Plain text for the benchmarks' terminals: a progress line or bar and a table. Only the bar needs rich."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any


class Progress:
    """One line that is written over on a terminal; in a log, one line per label."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._label = ""
        self._steps = 0

    def start(self, label: str) -> None:
        self._label, self._steps = label, 0
        if self._live:
            self._draw()
        else:
            print(f"... {label}", file=sys.stderr, flush=True)

    def step(self) -> None:
        self._steps += 1
        if self._live:
            self._draw()

    def done(self) -> None:
        if self._live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        print(f"\r\x1b[2K... {self._label} {'.' * (self._steps % 40)}", end="", file=sys.stderr, flush=True)


class Bar:
    """Progress over a known number of parts, drawn by rich on a terminal; else one line for each part.

    With `seconds`, about what each part takes, it says how much time is left, by what the parts so far took.
    """

    def __init__(self, total: int, seconds: Sequence[float] | None = None) -> None:
        self._seconds, self._begin = seconds, time.monotonic()
        self._drawn = None
        self._label, self._parts = "", -1
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # it comes with the extra `bench`
                self._drawn = _rich(total)

    def __enter__(self) -> Bar:
        if self._drawn:
            self._drawn.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._drawn:
            self._drawn.stop()

    def start(self, label: str) -> None:
        """The next part begins."""
        self._label, self._parts = label + self._left(self._parts + 1), self._parts + 1
        label = self._label
        if self._drawn:
            self._drawn.update(self._drawn.task_ids[0], completed=self._parts, label=label)
            self._drawn.refresh()
        else:
            print(f"... {label}", file=sys.stderr, flush=True)

    def _left(self, done: int) -> str:
        if self._seconds is None:
            return ""
        expected, left = sum(self._seconds[:done]), sum(self._seconds[done:])
        if expected:
            left *= (time.monotonic() - self._begin) / expected
        return f" (about {left // 60:.0f}:{left % 60:02.0f} left)"

    def step(self, what: str) -> None:
        """What the part is at."""
        if self._drawn:
            self._drawn.update(self._drawn.task_ids[0], label=f"{self._label}: {what}")
            self._drawn.refresh()


def _rich(total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[label]}"))
    # Drawn when something is said and not by a thread, which would run while something is timed.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    bar.add_task("", total=total, label="")
    return bar


def table(header: Sequence[str], rows: Sequence[Sequence[str]], red: frozenset[int] = frozenset()) -> str:
    """Columns as wide as they need, the first one left, the others right; the rows in `red` in red."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    lines = [line(header), "  ".join("-" * width for width in widths)]
    lines += [in_red(line(row)) if place in red else line(row) for place, row in enumerate(rows)]
    return "\n".join(lines)


def reason(error: BaseException) -> str:
    """The innermost cause of an error in one line; the compiler wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def in_red(text: str) -> str:
    """Red on a terminal that may show colours."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[31m{text}\x1b[0m" if coloured else text
