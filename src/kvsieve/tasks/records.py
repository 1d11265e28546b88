"""Samples of long-text tasks, from files or, where none are given, from the hub."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from .._fields import Fields
from ..errors import DataError, KvsieveError

__all__ = ["HUB_MIRROR", "SUFFIXES", "Sample", "hub_rows", "load_samples", "parse_sample", "read_rows", "read_samples"]

HUB_MIRROR = "Xnhyacinth/LongBench"
"""A copy of LongBench in parquet files. The original, THUDM/LongBench, needs a script that `datasets` 4 refuses."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")

_PROMPTS = ("prompt", "origin_prompt")
_ANSWERS = ("answers", "gold", "outputs", "answer", "expected_number")
_CONTENT = ("context", "input", "question", "all_classes", "length", "dataset", "language", "_id", "id")


@dataclass(frozen=True)
class Sample:
    """One question about one long text.

    Attributes:
        id: the `_id` of the file; where there is none, a hash of data set, texts and answers, which does not depend
            on the file or the order in it. Unique among the samples read together from one data set.
        dataset: name of the data set; may be empty.
        context: the long text; empty if there is a `prompt`.
        input: the question; empty for tasks that need none.
        answers: right answers, at least one.
        classes: names of all classes, for classification.
        length: of the context as the file counts it: words for English, characters for Chinese; `None` if not given.
        language: `en`, `zh` or a programming language, if given.
        prompt: a prompt that is complete, where the file has one in place of context and input.
        more: what else the file says.
        where: file and record, for messages.
    """

    id: str
    dataset: str
    context: str = field(repr=False)
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = field(default=(), repr=False)
    length: int | None = None
    language: str = ""
    prompt: str | None = field(default=None, repr=False)
    more: Mapping[str, Any] = field(default_factory=dict, repr=False)
    where: str = field(default="", compare=False, repr=False)


def load_samples(
    dataset: str,
    data: str | Path | None = None,
    *,
    hub: str = HUB_MIRROR,
    split: str = "test",
    limit: int | None = None,
) -> list[Sample]:
    """The samples of one data set, from local files if `data` is given, else from the hub, and from nowhere else.

    Args:
        dataset: its name, such as `"qasper"` or `"qasper_e"`.
        data: file or folder, see `read_samples`.
        hub: repository of the hub, read with the package `datasets`.
        split: split of that repository.
        limit: read no more than this many samples.

    Raises:
        DataError: see `read_samples`; or the hub cannot be reached or has no such data set.
        KvsieveError: the hub is needed and `datasets` is not installed.
    """
    if data is not None:
        return read_samples(data, dataset=dataset, limit=limit)
    rows = hub_rows(hub, dataset, split=split, limit=_checked(limit))
    return _samples(rows, dataset=dataset, limit=limit, on_error=None)


def read_samples(
    path: str | Path,
    *,
    dataset: str | None = None,
    limit: int | None = None,
    on_error: Callable[[DataError], None] | None = None,
) -> list[Sample]:
    """Read samples from a file, or from a folder of files.

    Args:
        path: a file that ends in one of `SUFFIXES`, or a folder. With `dataset`, the folder holds a file or a folder
            of that name; without, all its files are read in the order of their names, folders inside it are not.
        dataset: name of the data set. A file that says something else is refused; one that says nothing belongs to
            `dataset`, or without it to the data set it is named after.
        limit: read no more than this many samples.
        on_error: called with what is wrong with a sample, which is then left out and the rest read; by default the
            first wrong sample ends the reading. A file that is malformed ends it in any case.

    Raises:
        DataError: a file is missing, empty or malformed, a sample lacks a text or an answer, or two samples have the
            same id. The message names file and record or line.
        KvsieveError: a parquet file is to be read and pyarrow is not installed.
    """
    return _samples(read_rows(path, dataset), dataset=dataset, limit=_checked(limit), on_error=on_error)


def parse_sample(row: Mapping[str, Any], *, dataset: str = "", where: str = "sample") -> Sample:
    """One sample, from the fields of LongBench or of its relatives.

    LongBench: `context`, `input`, `answers`, `all_classes`, `length`, `dataset`, `language`, `_id`. In place of
    `context` and `input` there may be a complete `prompt` or `origin_prompt`, or an `input` beside `outputs`, as in
    RULER. Answers may be called `answers`, `gold` (a list, or an object with `answers` and `all_classes`, also
    written out as a string), `outputs`, `answer` or `expected_number`. A question may be called `question`.

    Args:
        row: the fields.
        dataset: name of the data set if the row does not say.
        where: what messages call it.

    Raises:
        DataError: there is no text or no answer, or a field has the wrong type.
    """
    fields = Fields(row, where)
    name = next((name for name in _ANSWERS if not fields.absent(name)), None)
    if name is None:
        raise fields.error("answers", f"is missing (fields: {', '.join(map(str, row)) or 'none'})")
    given = row[name]
    if name == "gold" and isinstance(given, str):
        given = _written_out(given)
    classes = row.get("all_classes")
    if isinstance(given, Mapping):
        classes = given.get("all_classes") if classes is None else classes
        given = given.get("answers")
    answers = _texts(fields, name, given)
    if not any(answer.strip() for answer in answers):
        raise fields.error(name, "has no answer that is not blank")

    prompt = next((fields.text(name) for name in _PROMPTS if name in row), None)
    complete = name == "outputs" and fields.absent("context") and prompt is None
    if complete:
        prompt = fields.text("input")
    context = fields.text("context") if prompt is None else fields.words("context")
    question = "" if complete else fields.words("input") or fields.words("question")
    dataset = fields.words("dataset") or dataset
    length = row.get("length")
    return Sample(
        id=_id(row, dataset, context, question, prompt or "", *answers),
        dataset=dataset,
        context=context,
        input=question,
        answers=answers,
        classes=() if classes is None else _texts(fields, "all_classes", classes),
        length=None if length is None else fields.whole("length", least=0),
        language=fields.words("language"),
        prompt=prompt,
        more={key: value for key, value in row.items() if key not in (*_PROMPTS, *_ANSWERS, *_CONTENT)},
        where=where,
    )


def read_rows(path: str | Path, dataset: str | None = None) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Every object of a file, or of a folder of files, one at a time: its file, what to call it, itself.

    A JSON file holds one object, a list of objects, or an object of objects.

    Args:
        path: see `read_samples`.
        dataset: see `read_samples`.

    Raises:
        DataError: nothing there, or what is no object; with file and line.
        KvsieveError: a parquet file is to be read and pyarrow is not installed.
    """
    for file in _files(Path(path), dataset):
        kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
        found = {"jsonl": _lines, "json": _records, "parquet": _parquet}[kind](file)
        empty = True
        for where, row in found:
            empty = False
            if not isinstance(row, dict):
                raise DataError(f"{where}: a sample is an object with fields, not {type(row).__name__}")
            yield file, where, row
        if empty:
            raise DataError(f"{file} holds no sample")


def hub_rows(
    hub: str, name: str | None, *, split: str, limit: int | None = None
) -> Iterator[tuple[Path | None, str, dict[str, Any]]]:
    """Every row of a data set on the hub: nothing, what to call it, itself.

    Args:
        hub: the repository.
        name: the data set in it, if it has several.
        split: the split.
        limit: stop after so many rows.

    Raises:
        DataError: it cannot be had.
        KvsieveError: `datasets` is not installed.
    """
    advice = "give local files instead (JSONL, JSON or parquet)"
    try:
        library = import_module("datasets")
    except ImportError:
        raise KvsieveError(
            f"reading {hub} from the hub needs the package datasets: pip install 'kvsieve[data]', or {advice}"
        ) from None
    called = f"{hub}{f' ({name})' if name else ''}"
    try:
        rows = library.load_dataset(hub, name, split=split)
    except Exception as error:
        # The library raises its own errors, those of the hub's client and those of the network.
        raise DataError(f"{called}, split {split}: cannot be read from the hub ({error}); {advice}") from error
    for number, row in enumerate(islice(rows, limit)):
        yield None, f"{called}, row {number}", dict(row)


def _samples(
    rows: Iterator[tuple[Path, str, dict[str, Any]]] | Iterator[tuple[Path | None, str, dict[str, Any]]],
    *,
    dataset: str | None,
    limit: int | None,
    on_error: Callable[[DataError], None] | None,
) -> list[Sample]:
    samples: list[Sample] = []
    seen: dict[tuple[str, str], str] = {}
    for file, where, row in rows:
        if limit is not None and len(samples) == limit:
            break
        try:
            sample = parse_sample(row, dataset=dataset or (_stem(file) if file else ""), where=where)
            if dataset is not None and sample.dataset not in (dataset, dataset.removesuffix("_e")):
                raise DataError(f"{where}: belongs to {sample.dataset!r}, not to {dataset!r}")
            key = (sample.dataset, sample.id)
            if key in seen:
                raise DataError(f"{where}: the sample {sample.id} is there already ({seen[key]}); leave one out")
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        seen[key] = where
        samples.append(sample)
    return samples


def _checked(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise DataError(f"limit must be 1 or more, not {limit}")
    return limit


def _id(row: Mapping[str, Any], *texts: str) -> str:
    for name in ("_id", "id"):
        if isinstance(row.get(name), (str, int)) and str(row[name]).strip():
            return str(row[name])
    # Lengths keep texts apart that would be the same when joined.
    content = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _texts(fields: Fields, name: str, given: Any) -> tuple[str, ...]:
    """A list of strings; a lone string or number counts as a list of one."""
    values = [given] if isinstance(given, (str, int, float)) else given
    if not isinstance(values, Sequence) or not values:
        raise fields.error(name, f"must be a list of at least one text, not {values!r:.60}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise fields.error(name, f"must hold texts only, not {value!r:.60}")
    return tuple(map(str, values))


def _written_out(text: str) -> Any:
    """A list or an object in the notation of JSON or Python, else the text as it is."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _stem(file: Path) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file.name.endswith(suffix):
            return file.name.removesuffix(suffix)
    return file.stem


def _files(path: Path, dataset: str | None) -> list[Path]:
    if path.is_dir():
        if dataset is not None:
            named = [path / f"{dataset}{suffix}" for suffix in SUFFIXES]
            found = [file for file in named if file.is_file()]
            if len(found) > 1:
                raise DataError(f"{path} holds {' and '.join(file.name for file in found)}; give one of them")
            if found:
                return found
            if not (path / dataset).is_dir():
                raise DataError(f"{path}: no file and no folder of the name {dataset} ({', '.join(SUFFIXES)})")
            path = path / dataset
        files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise DataError(f"{path}: the folder holds no file that ends in {', '.join(SUFFIXES)}")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: give a file that ends in {', '.join(SUFFIXES)}, or a folder of them")
    return [path]


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, line {number}: not UTF-8 text ({error.reason})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}, after line {number}: cannot be unpacked ({error})") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _numbered_lines(file):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not valid JSON ({error})") from None
            yield f"{file}, line {number}", row


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads("".join(line for _, line in _numbered_lines(file)))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if isinstance(data, dict) and data and all(isinstance(value, dict) for value in data.values()):
        for key, value in data.items():
            yield f"{file}, record {key!r}", value
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield f"{file}, record {i}", value
    else:
        yield str(file), data


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        library = import_module("pyarrow.parquet")
    except ImportError:
        raise KvsieveError(
            f"{file}: reading parquet needs pyarrow: pip install 'kvsieve[data]', or give JSONL"
        ) from None
    number = 0
    try:
        for batch in library.ParquetFile(file).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                yield f"{file}, row {number}", row
                number += 1
    except (OSError, ValueError) as error:
        # pyarrow's own errors derive from these.
        raise DataError(f"{file}: not a parquet file that can be read ({error})") from None
