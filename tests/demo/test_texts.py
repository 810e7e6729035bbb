"""The demo's texts: docstrings of the standard library, and files."""

import inspect

import pytest

from pytorch_ext.demo import texts
from pytorch_ext.demo.options import DemoError


@pytest.fixture
def library(tmp_path):
    """A small library with everything that may come up."""
    (tmp_path / "one.py").write_text(
        '"""A module.\n\n    Indented.\n"""\n\n'
        'def f():\n    """Twice."""\n\n'
        'class C:\n    """A class."""\n\n    async def m(self):\n        """A method."""\n\n'
        'def silent():\n    pass\n\ndef empty():\n    """   """\n'
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text('"""A package."""\n\ndef g():\n    """Twice."""\n')
    (tmp_path / "package" / "broken.py").write_text("def (:\n")
    (tmp_path / "package" / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n'''Caf\xe9.'''\n")
    for skipped in ("test", "site-packages", "idlelib"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "module.py").write_text('"""Not this."""\n')
    return tmp_path


def test_docstrings_with_qualified_names(library):
    found = {text.name: text.text for text in texts.standard_library(library)}
    assert found == {
        "one": "A module.\n\nIndented.",
        "one.f": "Twice.",  # and not again as package.g
        "one.C": "A class.",
        "one.C.m": "A method.",
        "package": "A package.",
        "package.latin": "Café.",
    }


@pytest.mark.full
def test_the_real_standard_library():
    found = texts.collect(None)
    assert len(found) > 4000
    by_name = {text.name: text.text for text in found}
    assert by_name["json.dumps"] == inspect.getdoc(__import__("json").dumps)
    assert len({text.text for text in found}) == len(found)
    assert not any(text.name.startswith(("test.", "idlelib.")) for text in found)
    lengths = [len(text.text) for text in found]
    assert max(lengths) > 50 * sorted(lengths)[len(lengths) // 2]  # naturally uneven
    assert texts.collect(None) == found  # the order is mixed, and always the same
    assert found != sorted(found, key=lambda text: text.name)


def test_no_sources_is_one_sentence(tmp_path):
    with pytest.raises(DemoError, match="give texts with --texts"):
        texts.standard_library(tmp_path)


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\ufeffone\n\n  two \u2028 parts  \n漢字\n", encoding="utf-8")
    assert texts.from_file(file) == [
        texts.Text("line 1", "one"),
        texts.Text("line 3", "two \u2028 parts"),
        texts.Text("line 4", "漢字"),
    ]


def test_objects_of_a_jsonl_file(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": ""}\n{"text": "three"}\n')
    assert [text.text for text in texts.from_file(file)] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "no such file: .*missing.txt"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.txt", b" \n\n\t\n", "blank.txt holds no text"),
        ("latin.txt", b"caf\xe9\n", r"latin.txt is not UTF-8 \(byte 3"),
        ("bad.jsonl", b'{"text": "a"}\nno json\n', "bad.jsonl, line 2: not a JSON object"),
        ("other.jsonl", b'{"txt": "a"}\n', 'line 1: no field "text"'),
        ("list.jsonl", b"[1]\n", 'line 1: no field "text"'),
        ("number.jsonl", b'{"text": 3}\n', 'line 1: the field "text" is no string'),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, sentence):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DemoError, match=sentence) as raised:
        texts.collect(file)
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DemoError, match="no such file"):
        texts.from_file(tmp_path)
