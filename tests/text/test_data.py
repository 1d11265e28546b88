"""Reading texts."""

from __future__ import annotations

import json

import pytest

from kvsieve.errors import DataError
from kvsieve.text.data import python_reference, read_jsonl


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("records", "field", "texts"),
    [
        ([{"id": "a", "text": "one", "content": "x"}, {"text": "two"}], None, ["one", "two"]),
        ([{"id": "a", "content": "one"}], None, ["one"]),
        ([{"n": 1, "body": "one", "other": "x"}, {"body": "two"}], None, ["one", "two"]),
        ([{"text": 5, "body": "one"}], None, ["one"]),
        ([{"text": "x", "body": "one"}], "body", ["one"]),
    ],
)
def test_field_is_named_or_found_in_the_first_record(tmp_path, records, field, texts):
    assert [d.text for d in read_jsonl(write(tmp_path / "d.jsonl", *records), field)] == texts


def test_blank_lines_are_skipped_and_ids_are_line_numbers(tmp_path):
    file = write(tmp_path / "d.jsonl", "\ufeff" + json.dumps({"text": "a"}), "", {"text": "b"}, {"text": "c"})
    assert [(d.id, d.text) for d in read_jsonl(file, max_samples=2)] == [("line 1", "a"), ("line 3", "b")]


@pytest.mark.parametrize(
    ("lines", "field", "message"),
    [
        ([{"text": "a"}, '{"text": '], None, r"line 2: not valid JSON"),
        ([{"text": "a"}, "[1]"], None, r"line 2: a JSON object is expected, not list"),
        ([{"text": "a"}, {"body": "b"}], None, r"line 2: no field 'text' \(fields: body\)"),
        ([{"text": "a"}, {"text": 3}], None, r"line 2: field 'text' holds int, not a string"),
        ([{"text": "a"}], "body", r"line 1: no field 'body'"),
        ([{"n": 1}], None, r"line 1: no field holds a string"),
        ([""], None, r"is empty"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path, lines, field, message):
    with pytest.raises(DataError, match=message):
        read_jsonl(write(tmp_path / "d.jsonl", *lines), field)


def test_missing_binary_and_wrong_count_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_jsonl(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="max_samples must be 1 or more"):
        read_jsonl(write(tmp_path / "d.jsonl", {"text": "a"}), max_samples=0)


def test_lines_after_the_last_sample_are_not_read(tmp_path):
    assert len(read_jsonl(write(tmp_path / "d.jsonl", {"text": "a"}, "{broken"), max_samples=1)) == 1


def test_python_reference_is_long_sorted_and_without_repetition():
    documents = python_reference()
    names = [d.id for d in documents]
    assert len(documents) >= 8
    assert names == sorted(names)
    assert all(len(d.text) >= 8000 for d in documents)
    assert "specialnames" in names
    assert "customization" not in names, "a part of specialnames"
    assert python_reference(max_samples=2) == documents[:2]


def test_python_reference_says_when_there_is_none(monkeypatch):
    with pytest.raises(DataError, match="lower min_chars"):
        python_reference(min_chars=10**9)
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="give a JSONL file"):
        python_reference()
