"""The record of a run: one JSON line per finished cell, flushed to disk before the next one begins.

A killed run loses the cell it was in and nothing else. Summaries are made from these rows alone.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import DataError, KvsieveError

__all__ = ["FORMAT", "OUTPUTS", "PLAN", "CellLog", "jsonable", "log_name", "read_json", "read_rows", "write_text"]

FORMAT = 1
"""Version of the files in an output folder."""

PLAN = "plan.json"
OUTPUTS = ("detailed_results.json", "comparison_summary.json", "comparison.csv", "comparison.md", "comparison.png")


def log_name(part: tuple[int, int]) -> str:
    """File name of a shard's rows."""
    index, count = part
    return "cells.jsonl" if count == 1 else f"cells.shard-{index}-of-{count}.jsonl"


class CellLog:
    """Appends rows to one file, which it locks: a context manager.

    Args:
        folder: output folder; made if it is not there.
        part: shard as (index, count).
        resume: keep what is there. Otherwise an earlier run's files move to a folder `previous-1`, `previous-2`, ...

    Raises:
        KvsieveError: another process is writing this file, or the folder cannot be written.
    """

    def __init__(self, folder: Path, part: tuple[int, int], resume: bool) -> None:
        self.folder, self.part, self.resume = folder, part, resume
        self.moved_to: Path | None = None
        self._file: BinaryIO | None = None
        self._guard: BinaryIO | None = None

    def __enter__(self) -> CellLog:
        path = self.folder / log_name(self.part)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._guard = path.with_name(f".{path.name}.lock").open("ab")
            _lock(self._guard, path)
            if not self.resume and self._earlier():
                self._set_aside()
            self._drop_torn_line(path)
            self._file = path.open("ab")
            _sync_folder(self.folder)
        except OSError as error:
            self._close()
            raise KvsieveError(f"cannot write to {self.folder}: {error.strerror or error}") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for file in (self._file, self._guard):
            if file is not None:
                file.close()
        self._file = self._guard = None

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; on return it is on disk."""
        assert self._file is not None
        self._file.write(json.dumps(jsonable(row), allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _earlier(self) -> list[Path]:
        """Files of an earlier run. A shard owns its rows only: the others may be at work."""
        names = [log_name(self.part)] if self.part[1] > 1 else [PLAN, *OUTPUTS]
        files = [self.folder / name for name in names]
        if self.part[1] == 1:
            files += sorted(self.folder.glob("cells*.jsonl"))
        return [file for file in files if file.is_file() and file.stat().st_size]

    def _set_aside(self) -> None:
        number = 1
        while True:
            target = self.folder / f"previous-{number}"
            try:
                target.mkdir()
                break
            except FileExistsError:
                number += 1
        for file in self._earlier():
            file.rename(target / file.name)
        self.moved_to = target

    def _drop_torn_line(self, path: Path) -> None:
        """A process that was killed while writing leaves half a line: cut it off."""
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of all shards by cell key; a finished row wins over a failed one. Unreadable lines count as absent."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("cells*.jsonl")):
        for line in file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                key = row["key"]
            except (ValueError, KeyError, TypeError):
                continue
            if rows.get(key, {}).get("status") != "ok":
                rows[key] = row
    return rows


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: it is missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run `kvsieve compare` with this output folder first") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def write_text(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: a reader sees the old content or the new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def jsonable(value: Any) -> Any:
    """Numbers that JSON does not know become strings that `float()` reads back: "Infinity", "NaN"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise KvsieveError(
            f"another run is writing {path}; wait for it, or choose another --output-dir (or --shard)"
        ) from None


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # folders cannot be opened on this system
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
