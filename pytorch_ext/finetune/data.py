"""Texts and their classes from a CSV or JSON-lines file, and the parts that they are used in."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import FinetuneError

HELD_OUT = 0.1  # of every class, for validation and once more for the report
UNSEEN = -100  # the number of a label that training never saw; no loss is computed there
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Rows:
    """Texts and labels of equal length; ``left_out`` rows had no text or no label."""

    texts: list[str]
    labels: list[str]
    left_out: int = 0

    def part(self, numbers: list[int]) -> Rows:
        return Rows([self.texts[n] for n in numbers], [self.labels[n] for n in numbers])

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Parts:
    """What is learned from, what says when to stop, and what the report is about."""

    train: Rows
    validation: Rows
    test: Rows
    classes: list[str]
    left_out: int

    def numbers(self, rows: Rows) -> list[int]:
        """The class of each row, ``UNSEEN`` for a label that is in no row of ``train``."""
        known = {name: number for number, name in enumerate(self.classes)}
        return [known.get(label, UNSEEN) for label in rows.labels]

    def unseen(self, rows: Rows) -> Counter[str]:
        """The labels that training never saw, and how often each occurs."""
        known = set(self.classes)
        return Counter(label for label in rows.labels if label not in known)


def read(path: Path, text: str, label: str) -> Rows:
    """The rows of a file; those without text or without a label are left out and counted.

    Raises:
        FinetuneError: no such file, none of its kind, not UTF-8, a missing column, a text that is none, no row at all.
    """
    if not path.is_file():
        raise FinetuneError(f"no such file: {path}")
    if path.suffix not in (*DELIMITERS, ".jsonl"):
        raise FinetuneError(f"{path.name}: expected a .csv, .tsv or .jsonl file")
    texts, labels, left_out = [], [], 0
    try:
        for where, row in _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path, text, label):
            for column in (text, label):
                if column not in row:
                    found = ", ".join(map(repr, row))
                    raise FinetuneError(f"{where}: expected a column {column!r}, got {found}")
            value, name = row[text], _label(row[label], where, label)
            if value is not None and not isinstance(value, str):
                raise FinetuneError(
                    f"{where}: expected a string in column {text!r}, got {type(value).__name__}"
                )
            if not (value or "").strip() or not name:
                left_out += 1
                continue
            texts.append(value.strip())
            labels.append(name)
    except UnicodeDecodeError as error:
        raise FinetuneError(f"{path.name} is not UTF-8 (byte {error.start} cannot be read)") from None
    except (OSError, csv.Error) as error:
        raise FinetuneError(f"{path.name} cannot be read: {error}") from None
    if not texts:
        rows = f"{left_out} rows, all without text or label" if left_out else "no row"
        raise FinetuneError(f"{path.name}: expected texts in column {text!r}, got {rows}")
    return Rows(texts, labels, left_out)


def split(rows: Rows, validation: Rows | None, test: Rows | None, seed: int) -> Parts:
    """Cut validation and test rows, a tenth of every class each, out of ``rows`` unless they came in files.

    Raises:
        FinetuneError: fewer than two classes, labels that are no classes, too few rows to hold some out.
    """
    counts = Counter(rows.labels)
    if len(counts) < 2:
        raise FinetuneError(f"labels: expected at least two classes, got one: {next(iter(counts))!r}")
    if len(counts) > len(rows) / 2:
        raise FinetuneError(f"labels: expected classes, got {len(counts)} labels in {len(rows)} rows")
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    wanted = [name for name, given in (("validation", validation), ("test", test)) if given is None]
    of_class = defaultdict(list)
    for number, label in enumerate(rows.labels):
        of_class[label].append(number)
    for label in sorted(of_class):
        numbers = of_class[label]
        random.Random(f"{seed} {label}").shuffle(numbers)
        share = round(HELD_OUT * len(numbers)) or len(numbers) // 3  # a rare class has one of three held out
        share = min(share, len(numbers) // 3)
        for name in wanted:
            parts[name] += numbers[:share]
            numbers = numbers[share:]
        parts["train"] += numbers
    for name in wanted:
        if not parts[name]:
            raise FinetuneError(
                f"data: expected at least three rows of some class, got at most {max(counts.values())}"
            )
    return Parts(
        rows.part(sorted(parts["train"])),
        validation or rows.part(sorted(parts["validation"])),
        test or rows.part(sorted(parts["test"])),
        sorted({rows.labels[n] for n in parts["train"]}),
        rows.left_out + sum(part.left_out for part in (validation, test) if part),
    )


def _csv_rows(path: Path, text: str, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    limit = csv.field_size_limit(sys.maxsize)  # by default a field of 131,073 characters is an error
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
            missing = [column for column in (text, label) if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(map(repr, reader.fieldnames or ())) or "an empty file"
                raise FinetuneError(f"{path.name}: expected a column {missing[0]!r}, got {found}")
            for row in reader:
                yield f"{path.name}, line {reader.line_num}", row
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise FinetuneError(f"{where}: expected a JSON object, got {line.strip()[:40]!r}") from None
            if not isinstance(row, dict):
                raise FinetuneError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


def _label(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int):
        raise FinetuneError(f"{where}: expected a class in column {column!r}, got {type(value).__name__}")
    return str(value).strip()
