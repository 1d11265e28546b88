"""Reading JSON that others wrote: every complaint names file, record and field."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError

__all__ = ["Fields", "read_json", "read_objects", "read_table"]

_SUFFIXES = (".json", ".jsonl")


class Fields:
    """The fields of one JSON object.

    A field is absent if it is missing or null.

    Args:
        data: the object.
        where: file and record, for messages.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def error(self, name: str, problem: str) -> DataError:
        """An error about a field, to be raised."""
        return DataError(f"{self.where}: {name} {problem}")

    def absent(self, name: str) -> bool:
        """Whether the field is missing or null."""
        return self.data.get(name) is None

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self._present(name)
        if not isinstance(value, str):
            raise self.error(name, f"must be a text, not {_kind(value)}")
        if not value.strip():
            raise self.error(name, "is blank")
        return value

    def words(self, name: str) -> str:
        """A string, empty where absent."""
        value = self.data.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error(name, f"must be a text, not {_kind(value)}")
        return value

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """One of the allowed strings."""
        value = self.text(name)
        if value not in allowed:
            raise self.error(name, f"is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    def number(self, name: str, least: float = -math.inf, default: float | None = None) -> float:
        """A finite number of at least `least`."""
        if default is not None and self.absent(name):
            return default
        value = self._present(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, not {_kind(value)}")
        if not math.isfinite(value):
            raise self.error(name, f"must be a finite number, not {value}")
        if value < least:
            raise self.error(name, f"is {value:g}; it must be {least:g} or more")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number of 0 or more, or nothing."""
        return None if self.absent(name) else self.number(name, least=0)

    def whole(self, name: str, least: int, default: int | None = None) -> int:
        """An integer of at least `least`."""
        value = self.number(name, least, default)
        if value != int(value):
            raise self.error(name, f"is {value:g}; it must be a whole number")
        return int(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object, empty where absent."""
        value = self.data.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, not {_kind(value)}")
        return value

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list."""
        value = self._present(name)
        if not isinstance(value, (list, tuple)):
            raise self.error(name, f"must be a list of objects, not {_kind(value)}")
        for i, item in enumerate(value):
            where = f"{self.where}: {name}[{i}]"
            if not isinstance(item, Mapping):
                raise DataError(f"{where} must be an object, not {_kind(item)}")
            yield Fields(item, where)

    def _present(self, name: str) -> Any:
        value = self.data.get(name)
        if value is None:
            have = ", ".join(str(key) for key in self.data) or "none"
            raise self.error(name, f"is missing (fields: {have})")
        return value


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(_content(file))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from None


def read_objects(path: Path) -> Iterator[tuple[Path, str, dict[str, Any] | DataError]]:
    """Every object of a `.json` or `.jsonl` file, or of all such files in a folder: its file, what to call it, itself.

    In place of what is no object comes the error that says so, so that the rest can still be read.

    Raises:
        DataError: nothing there, or a file that cannot be read at all.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path}: the folder holds no .json or .jsonl file")
    elif path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: give a .json file, a .jsonl file, or a folder of them")
    else:
        files = [path]
    for file in files:
        found = _lines(file) if file.suffix == ".jsonl" else _records(file)
        empty = True
        for where, data in found:
            empty = False
            if not isinstance(data, (dict, DataError)):
                data = DataError(f"{where}: a record is an object, not {_kind(data)}")
            yield file, where, data
        if empty:
            raise DataError(f"{file} holds no record")


def read_table(file: Path, numbers: Sequence[str]) -> list[Fields]:
    """The rows of a table with tabs between its columns and their names in the first line.

    Args:
        file: the table, UTF-8.
        numbers: columns that hold numbers; all others hold text.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a row has too few or too many columns, or a number is none.
    """
    table = list(csv.reader(io.StringIO(_content(file)), delimiter="\t"))
    if len(table) < 2:
        raise DataError(f"{file}: a table has a line of names and at least one row")
    names = [name.strip() for name in table[0]]
    rows: list[Fields] = []
    for number, row in enumerate(table[1:], start=2):
        if not row:
            continue
        if len(row) != len(names):
            raise DataError(f"{file}, line {number}: {len(row)} columns, but the first line names {len(names)}")
        where = f"{file}, line {number}"
        values: dict[str, Any] = dict(zip(names, row, strict=True))
        for name in numbers:
            try:
                values[name] = float(values[name]) if name in values else None
            except ValueError:
                raise DataError(f"{where}: {name} must be a number, not {values[name]!r}") from None
        rows.append(Fields(values, where))
    return rows


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_content(file).split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                data = json.loads(line)
            except ValueError as error:
                data = DataError(f"{where}: not valid JSON ({error})")
            yield where, data


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    data = read_json(file)
    if not isinstance(data, list):
        yield str(file), data
        return
    for i, item in enumerate(data):
        yield f"{file}, record {i}", item


def _content(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({value!r:.60})"
