"""Reading samples: formats, names of fields, ids, and what is said when something is wrong."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvsieve.errors import DataError, KvsieveError
from kvsieve.tasks.records import HUB_MIRROR, load_samples, parse_sample, read_rows, read_samples

ROW: dict[str, Any] = {
    "input": "Who?", "context": "Ann did it.", "answers": ["Ann", "Miss Ann"], "length": 3, "dataset": "qasper",
    "language": "en", "all_classes": None, "_id": "a1",
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def write(path: Path, *rows: Any, text: str | None = None) -> Path:
    """Rows as JSONL, or a JSON file of one value, or a given text; packed if the name says so."""
    if text is None:
        text = "".join(json.dumps(one) + "\n" for one in rows) if ".jsonl" in path.name else json.dumps(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_official_fields() -> None:
    sample = parse_sample(row(all_classes=["x", "y"], extra=1), where="here")
    assert (sample.id, sample.dataset, sample.context, sample.input) == ("a1", "qasper", "Ann did it.", "Who?")
    assert sample.answers == ("Ann", "Miss Ann")
    assert sample.classes == ("x", "y")
    assert (sample.length, sample.language, sample.prompt, sample.where) == (3, "en", None, "here")
    assert sample.more == {"extra": 1}


@pytest.mark.parametrize(
    ("fields", "context", "question", "prompt", "answers", "classes"),
    [
        ({"origin_prompt": "P", "gold": ["g"], "prediction": "p", "time": 1.5}, "", "", "P", ("g",), ()),
        ({"prompt": "P", "gold": {"answers": ["g"], "all_classes": ["g", "h"]}}, "", "", "P", ("g",), ("g", "h")),
        ({"prompt": "P", "gold": "['g', \"h\"]"}, "", "", "P", ("g", "h"), ()),
        ({"prompt": "P", "gold": '{"answers": ["g"], "all_classes": ["g"]}'}, "", "", "P", ("g",), ("g",)),
        ({"prompt": "P", "gold": "[x"}, "", "", "P", ("[x",), ()),
        ({"index": 0, "input": "P", "outputs": ["g"], "length": 7}, "", "", "P", ("g",), ()),
        ({"prompt": "P", "expected_number": 2416}, "", "", "P", ("2416",), ()),
        ({"context": "C", "question": "Q", "answer": "g"}, "C", "Q", None, ("g",), ()),
        ({"context": "C", "answers": ["", "g"]}, "C", "", None, ("", "g"), ()),
    ],
)
def test_relatives(
    fields: dict[str, Any],
    context: str,
    question: str,
    prompt: str | None,
    answers: tuple[str, ...],
    classes: tuple[str, ...],
) -> None:
    sample = parse_sample(fields, dataset="d")
    assert (sample.context, sample.input, sample.prompt) == (context, question, prompt)
    assert (sample.answers, sample.classes, sample.dataset) == (answers, classes, "d")


def test_ids_without_one_in_the_file() -> None:
    plain = {key: value for key, value in ROW.items() if key != "_id"}
    first = parse_sample(plain, where="here").id
    assert len(first) == 24
    # The same content has the same id wherever it stands, and other content another, also where texts joined are equal.
    assert parse_sample(dict(reversed(plain.items())), where="there").id == first
    others = [
        {"context": "Ann did it.W", "input": "ho?"}, {"answers": ["Ann"]}, {"dataset": "hotpotqa"}, {"input": "Who"},
    ]  # fmt: skip
    ids = {parse_sample({**plain, **changes}).id for changes in others}
    assert len(ids | {first}) == 5
    assert parse_sample({**plain, "id": 7}).id == "7"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": ""}, "f: context is blank"),
        ({"context": " \n"}, "f: context is blank"),
        ({"context": None}, "f: context is missing"),
        ({"context": 3}, "f: context must be a text, not int"),
        ({"answers": []}, "f: answers must be a list of at least one text, not "),
        ({"answers": [" "]}, "f: answers has no answer that is not blank"),
        ({"answers": [None]}, "f: answers must hold texts only, not None"),
        ({"answers": None}, r"f: answers is missing \(fields: input, context, "),
        ({"gold": {"all_classes": []}, "answers": None}, "f: gold must be a list of at least one text, not None"),
        ({"length": "long"}, "f: length must be a number, not str"),
        ({"length": -1}, "f: length is -1; it must be 0 or more"),
        ({"all_classes": [1, None]}, "f: all_classes must hold texts only, not None"),
        ({"prompt": ""}, "f: prompt is blank"),
    ],
)
def test_what_is_wrong_with_a_sample(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_sample(row(**changes), where="f")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_lines(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, text=f"\ufeff{json.dumps(row())}\n\n{json.dumps(row(_id='a2'))}\n")
    samples = read_samples(file)
    assert [sample.id for sample in samples] == ["a1", "a2"]
    assert samples[1].where == f"{file}, line 3"


@pytest.mark.parametrize("name", ["d.json", "d.json.gz"])
@pytest.mark.parametrize(
    ("data", "where"),
    [
        ([row(), row(_id="a2")], ["{}, record 0", "{}, record 1"]),
        ({"0": row(), "1": row(_id="a2")}, ["{}, record '0'", "{}, record '1'"]),
        (row(), ["{}"]),
    ],
)
def test_json(tmp_path: Path, name: str, data: Any, where: list[str]) -> None:
    file = write(tmp_path / name, data)
    assert [sample.where for sample in read_samples(file)] == [one.format(file) for one in where]


def test_a_data_set_is_named_after_its_file(tmp_path: Path) -> None:
    plain = row(dataset=None)
    assert read_samples(write(tmp_path / "hotpotqa.json.gz", [plain]))[0].dataset == "hotpotqa"
    assert read_samples(tmp_path / "hotpotqa.json.gz", dataset="qasper")[0].dataset == "qasper"


def test_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "qasper.jsonl", row())
    write(tmp_path / "hotpotqa.json.gz", [row(dataset="hotpotqa")])
    write(tmp_path / "musique" / "part.jsonl", row(dataset="musique"))
    write(tmp_path / "notes.txt", text="nothing")
    assert [sample.dataset for sample in read_samples(tmp_path)] == ["hotpotqa", "qasper"]
    for name in ("qasper", "hotpotqa", "musique"):
        assert [sample.dataset for sample in read_samples(tmp_path, dataset=name)] == [name]
        assert [sample.dataset for sample in load_samples(name, tmp_path)] == [name]
    with pytest.raises(DataError, match=r"no file and no folder of the name trec"):
        read_samples(tmp_path, dataset="trec")
    write(tmp_path / "qasper.json", [row()])
    with pytest.raises(DataError, match=r"holds qasper.jsonl and qasper.json; give one of them"):
        read_samples(tmp_path, dataset="qasper")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder holds no file that ends in .jsonl, "):
        read_samples(tmp_path / "empty")


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", row())
    assert read_samples(file, dataset="qasper_e")[0].dataset == "qasper"
    with pytest.raises(DataError, match=r"line 1: belongs to 'qasper', not to 'trec'"):
        read_samples(file, dataset="trec")


def test_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", text="".join(json.dumps(row(_id=f"a{i}")) + "\n" for i in range(3)) + "{")
    # What lies behind the limit is not looked at.
    assert [sample.id for sample in read_samples(file, limit=2)] == ["a0", "a1"]
    with pytest.raises(DataError, match="limit must be 1 or more, not 0"):
        read_samples(file, limit=0)


def test_samples_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", row(), row(context=""), row(), row(_id="a4"))
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: context is blank"):
        read_samples(file)
    wrong: list[DataError] = []
    assert [sample.id for sample in read_samples(file, on_error=wrong.append)] == ["a1", "a4"]
    assert [str(error).split(", ", 1)[1].split(" (")[0] for error in wrong] == [
        "line 2: context is blank",
        "line 3: the sample a1 is there already",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a"\n', "x.jsonl, line 2: not valid JSON"),
        ("x.jsonl.gz", '{"a": 1}\n{"a"\n', "x.jsonl.gz, line 2: not valid JSON"),
        ("x.json", '[\n{"a": 1},\n{"a"}]', "x.json, line 3: not valid JSON"),
        ("x.jsonl", "3\n", "x.jsonl, line 1: a sample is an object with fields, not int"),
        ("x.json", "[3]", "x.json, record 0: a sample is an object with fields, not int"),
        ("x.json", "[]", "x.json holds no sample"),
        ("x.jsonl", "\n", "x.jsonl holds no sample"),
        ("x.csv", "a", r"give a file that ends in .jsonl, "),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_rows(write(tmp_path / name, text=text)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_samples(tmp_path / "x.jsonl")
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: not UTF-8 text"):
        list(read_rows(file))
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(row()).encode() * 1000)[:-20])
    with pytest.raises(DataError, match="cannot be unpacked"):
        list(read_rows(packed))
    packed.write_bytes(b"plain")
    with pytest.raises(DataError, match="after line 0: cannot be unpacked"):
        list(read_rows(packed))


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(KvsieveError, match=r"pip install 'kvsieve\[data\]', or give JSONL"):
        read_samples(write(tmp_path / "x.parquet", text="P"))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Batch:
        def to_pylist(self) -> list[dict[str, Any]]:
            return [row(), row(_id="a2")]

    class File:
        def __init__(self, file: Path) -> None:
            if file.name == "broken.parquet":
                raise ValueError("no magic bytes")

        def iter_batches(self, batch_size: int) -> list[Batch]:
            return [Batch()]

    library = types.ModuleType("pyarrow.parquet")
    library.ParquetFile = File  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", library)
    file = write(tmp_path / "x.parquet", text="P")
    assert [sample.where for sample in read_samples(file)] == [f"{file}, row 0", f"{file}, row 1"]
    with pytest.raises(DataError, match="not a parquet file that can be read"):
        read_samples(write(tmp_path / "broken.parquet", text="P"))


def test_the_hub_is_asked_only_without_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def load_dataset(hub: str, name: str, split: str) -> list[dict[str, Any]]:
        asked.append((hub, name, split))
        return [row(), row(_id="a2")]

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load_samples("qasper", write(tmp_path / "x.jsonl", row()))[0].id == "a1"
    with pytest.raises(DataError, match="no such file"):
        load_samples("qasper", tmp_path / "absent.jsonl")
    assert asked == []
    assert [sample.id for sample in load_samples("qasper", limit=1)] == ["a1"]
    samples = load_samples("qasper", hub="a/b", split="train")
    assert samples[1].where == "a/b (qasper), row 1"
    assert asked == [(HUB_MIRROR, "qasper", "test"), ("a/b", "qasper", "train")]


def test_the_hub_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KvsieveError, match=r"pip install 'kvsieve\[data\]', or give local files instead"):
        load_samples("qasper")

    def load_dataset(hub: str, name: str, split: str) -> None:
        raise ConnectionError("no network")

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(DataError, match=r"cannot be read from the hub \(no network\); give local files instead"):
        load_samples("qasper")
