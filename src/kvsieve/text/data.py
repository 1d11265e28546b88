"""Texts to measure on: JSONL files, and the Python language reference that comes with every Python."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

__all__ = ["Document", "python_reference", "read_jsonl"]


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: where it comes from: `"line 12"` of a file, or the topic of a reference.
        text: the text itself.
    """

    id: str
    text: str


def read_jsonl(path: str | Path, text_field: str | None = None, max_samples: int | None = None) -> list[Document]:
    """Read texts from a file with one JSON object per line; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        text_field: the field that holds the text. By default `"text"`, else `"content"`, else the first field of the
            first record that holds a string. The first record decides for all.
        max_samples: read no further than this many records.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a line is not a JSON object, or a record lacks the field.
    """
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples must be 1 or more, not {max_samples}")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a JSONL file with one object and its text per line")
    documents: list[Document] = []
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = _record(file, number, line)
                text_field = text_field or _find_field(file, number, record)
                documents.append(Document(f"line {number}", _text(file, number, record, text_field)))
                if len(documents) == max_samples:
                    break
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, after line {number}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if not documents:
        raise DataError(f"{file} is empty; it must hold at least one JSON object with a text")
    return documents


def _record(file: Path, number: int, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{file}, line {number}: a JSON object is expected, not {type(record).__name__}")
    return record


def _find_field(file: Path, number: int, record: dict[str, object]) -> str:
    strings = [key for key, value in record.items() if isinstance(value, str)]
    for name in ("text", "content", *strings):
        if name in strings:
            return name
    fields = ", ".join(record) or "none"
    raise DataError(f"{file}, line {number}: no field holds a string (fields: {fields})")


def _text(file: Path, number: int, record: dict[str, object], field: str) -> str:
    if field not in record:
        raise DataError(f"{file}, line {number}: no field {field!r} (fields: {', '.join(record) or 'none'})")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{file}, line {number}: field {field!r} holds {type(text).__name__}, not a string")
    return text


def python_reference(min_chars: int = 8000, max_samples: int | None = None) -> list[Document]:
    """The Python language reference, one document per topic, in alphabetical order of topics.

    The text belongs to the interpreter that runs this, so it differs between Python versions (results record a
    hash of it). Topics that a longer one contains in full are left out.

    Args:
        min_chars: leave out shorter topics.
        max_samples: stop after this many documents.

    Raises:
        DataError: this Python comes without its reference, or nothing is long enough.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python comes without its language reference (pydoc_data); give a JSONL file with --data instead"
        ) from None
    long_enough = {name: text.strip() for name, text in sorted(topics.items()) if len(text.strip()) >= min_chars}
    plain = {name: _without_underlines(text) for name, text in long_enough.items()}
    documents = [
        Document(name, text)
        for name, text in long_enough.items()
        if not any(other != name and plain[name] in longer for other, longer in plain.items())
    ]
    if not documents:
        raise DataError(f"no topic of the language reference has {min_chars} characters or more; lower min_chars")
    return documents[:max_samples]


def _without_underlines(text: str) -> str:
    """A topic inside another has the same lines, but its headings are underlined with other characters."""
    return "\n".join(line for line in text.splitlines() if set(line) - set("*=-~^"))
