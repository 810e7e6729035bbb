"""Reading and splitting rows: what is an error, and what is a rule."""

import csv
import json
from collections import Counter

import pytest

from pytorch_ext.finetune import FinetuneError, Options
from pytorch_ext.finetune.data import UNSEEN, Rows, read, split


@pytest.fixture
def file(tmp_path):
    def file(content, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return file


def many(**counts):
    labels = [name for name, count in counts.items() for _ in range(count)]
    return Rows([f"{name} {number}" for number, name in enumerate(labels)], labels)


def test_csv_and_json_lines_say_the_same(file):
    texts = ['with "quotes", a comma', "two\nlines", "separator\u2028inside"]
    with (path := file("")).open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([("other", "label", "text"), *(("x", "a", text) for text in texts)])
    lines = "\n".join(json.dumps({"text": text, "label": "a"}, ensure_ascii=False) for text in texts)
    assert (
        read(path, "text", "label")
        == read(file(lines, "data.jsonl"), "text", "label")
        == Rows(texts, ["a"] * 3)
    )
    assert read(file("label\ttext\na\tb, c\n", "data.tsv"), "text", "label") == Rows(["b, c"], ["a"])


def test_labels_that_are_no_strings(file):
    lines = '{"text": "x", "label": 1}\n\n{"text": "y", "label": true}\n'
    assert read(file(lines, "data.jsonl"), "text", "label").labels == ["1", "true"]


def test_rows_without_text_or_label_are_left_out_and_counted(file):
    csv_file = file("text,label\nx,a\n  ,a\ny,\n,\nonly text\n")
    assert read(csv_file, "text", "label") == Rows(["x"], ["a"], left_out=4)
    lines = '{"text": null, "label": "a"}\n{"text": "x", "label": null}\n{"text": "x", "label": "b"}'
    assert read(file(lines, "data.jsonl"), "text", "label") == Rows(["x"], ["b"], left_out=2)


def test_a_field_of_a_million_characters(file):
    before = csv.field_size_limit()
    rows = read(file(f"text,label\n{'word ' * 250_000},a\n"), "text", "label")
    assert len(rows.texts[0]) == 1_249_999
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "body,label\nx,a\n", "data.csv: expected a column 'text', got 'body', 'label'"),
        ("data.csv", "text,class\nx,a\n", "data.csv: expected a column 'label', got 'text', 'class'"),
        ("data.csv", "", "data.csv: expected a column 'text', got an empty file"),
        ("data.csv", "text,label\n", "expected texts in column 'text', got no row"),
        ("data.csv", "text,label\n ,a\n", "got 1 rows, all without text or label"),
        ("data.csv", b"text,label\n\xff,a\n", "data.csv is not UTF-8 (byte 11 cannot be read)"),
        ("data.txt", "x", "data.txt: expected a .csv, .tsv or .jsonl file"),
        ("data.jsonl", '{"text": "x"}', "data.jsonl, line 1: expected a column 'label', got 'text'"),
        ("data.jsonl", "\n[1]", "data.jsonl, line 2: expected a JSON object, got list"),
        ("data.jsonl", "text", "data.jsonl, line 1: expected a JSON object, got 'text'"),
        ("data.jsonl", '{"text": 3, "label": "a"}', "line 1: expected a string in column 'text', got int"),
        ("data.jsonl", '{"text": "x", "label": [1]}', "line 1: expected a class in column 'label', got list"),
    ],
)
def test_bad_files(file, name, content, message):
    with pytest.raises(FinetuneError) as caught:
        read(file(content, name), "text", "label")
    assert message in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FinetuneError, match="no such file"):
        read(tmp_path / "data.csv", "text", "label")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (many(a=30), "labels: expected at least two classes, got one: 'a'"),
        (many(**{f"t{n}": 1 for n in range(30)}), "labels: expected classes, got 30 labels in 30 rows"),
        (many(a=2, b=2), "data: expected at least three rows of some class, got at most 2"),
    ],
)
def test_labels_that_are_no_classes(rows, message):
    with pytest.raises(FinetuneError) as caught:
        split(rows, None, None, 0)
    assert str(caught.value) == message


def test_a_tenth_of_every_class_is_held_out_twice():
    parts = split(many(a=100, b=40, c=5, d=1), None, None, 0)
    assert Counter(parts.validation.labels) == Counter(parts.test.labels) == Counter(a=10, b=4, c=1)
    assert Counter(parts.train.labels) == Counter(a=80, b=32, c=3, d=1)
    assert parts.classes == ["a", "b", "c", "d"]
    everything = [*parts.train.texts, *parts.validation.texts, *parts.test.texts]
    assert len(set(everything)) == 146
    again = split(many(a=100, b=40, c=5, d=1), None, None, 0)
    other = split(many(a=100, b=40, c=5, d=1), None, None, 1)
    assert again == parts and other.test != parts.test


def test_parts_that_came_in_files_are_not_cut():
    test, validation = many(b=3, z=2), many(a=1)
    parts = split(many(a=4, b=4), validation, test, 0)
    assert len(parts.train) == 8 and parts.test is test and parts.validation is validation
    assert parts.classes == ["a", "b"]
    assert parts.numbers(test) == [1, 1, 1, UNSEEN, UNSEEN]
    assert parts.unseen(test) == Counter(z=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tune": "last:0"}, "tune: expected full, last:N, lora or auto, got 'last:0'"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number above 0, got -1.0"),
        ({"tokens_per_batch": 300}, "tokens_per_batch: expected at least twice max_length, 512, got 300"),
        ({"max_length": 4}, "max_length: expected at least 8 tokens, got 4"),
        ({"precision": "fp16"}, "precision: expected one of auto, fp32, bf16, got 'fp16'"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"dropout": 1.0}, "dropout: expected a probability from 0 up to 1, got 1.0"),
        ({"label": "text"}, "label: expected another column than text, got 'text' for both"),
    ],
)
def test_options_that_make_no_sense(tmp_path, changed, message):
    with pytest.raises(FinetuneError) as caught:
        Options(data=tmp_path, **changed)
    assert str(caught.value) == message
