"""A run's record on disk: one JSON line per finished piece of work, flushed before the next one begins.

A killed run loses the piece it was at and nothing else. Summaries are made from these rows alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from .errors import DataError, KvsieveError

__all__ = ["RowLog", "jsonable", "read_json", "read_rows", "write_text"]


_Log = TypeVar("_Log", bound="RowLog")


class RowLog:
    """Appends rows to one file, which it locks: a context manager.

    Args:
        path: the file; its folder is made if it is not there.
        resume: keep what is there. Otherwise an earlier run's files move to a folder `previous-1`, `previous-2`, ...
        others: names of the other files a run leaves in that folder.

    Raises:
        KvsieveError: another process is writing this file, or the folder cannot be written.
    """

    def __init__(self, path: Path, resume: bool, others: Sequence[str] = ()) -> None:
        self.path, self.resume, self.others = path, resume, tuple(others)
        self.folder = path.parent
        self.moved_to: Path | None = None
        self._file: BinaryIO | None = None
        self._guard: BinaryIO | None = None

    def __enter__(self: _Log) -> _Log:
        path = self.path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._guard = path.with_name(f".{path.name}.lock").open("ab")
            _lock(self._guard, path)
            if not self.resume and self.earlier():
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

    def earlier(self) -> list[Path]:
        """Files of an earlier run."""
        return [file for file in (self.path, *(self.folder / name for name in self.others)) if filled(file)]

    def _set_aside(self) -> None:
        number = 1
        while True:
            target = self.folder / f"previous-{number}"
            try:
                target.mkdir()
                break
            except FileExistsError:
                number += 1
        for file in self.earlier():
            file.rename(target / file.name)
        self.moved_to = target

    def _drop_torn_line(self, path: Path) -> None:
        """A process that was killed while writing leaves half a line: cut it off."""
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)


def filled(file: Path) -> bool:
    """Whether there is something in this place: a file that is not empty, or a folder."""
    return file.is_dir() or (file.is_file() and file.stat().st_size > 0)


def read_rows(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Rows by their `key`; a finished row wins over a failed one. Unreadable lines count as absent."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                key = row["key"]
            except (ValueError, KeyError, TypeError):
                continue
            if rows.get(key, {}).get("status") != "ok":
                rows[key] = row
    return rows


def read_json(path: Path, hint: str = "check the path") -> Any:
    """A JSON file; `hint`: what to do if there is none.

    Raises:
        DataError: it is missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {hint}") from None
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
        raise KvsieveError(f"another run is writing {path}; wait for it, or choose another output folder") from None


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # folders cannot be opened on this system
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
