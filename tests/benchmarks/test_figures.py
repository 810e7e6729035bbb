"""What the README quotes is what the records say."""

import pytest

pytest.importorskip("transformers")

from pytorch_ext.benchmarks import figures

README = figures.RESULTS.parents[1] / "README.md"


def test_every_row_of_the_readme_comes_from_a_record():
    if not README.exists():
        pytest.skip("the README is not part of an installation")
    section = README.read_text(encoding="utf-8").partition("## How fast")[2].partition("\n## ")[0]
    quoted = {line for line in section.splitlines() if line.startswith("|") and "×" in line}
    recorded = {
        line for device in figures.TABLES for line in figures.bert_rows(device) + figures.family_rows(device)
    }
    assert len(quoted) >= 20
    assert quoted <= recorded


def test_a_row_is_written_as_the_readme_has_it():
    assert figures.row(["a", "", "", "b"]) == "| a | | | b |"
    assert [figures.digits(ratio) for ratio in (1.004, 4.578, 29.1)] == ["1.00 ×", "4.58 ×", "29.1 ×"]
    assert [figures.digits(ratio, 1) for ratio in (1.083, 4.712)] == ["1.08 ×", "4.7 ×"]
