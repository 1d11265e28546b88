"""Both record formats, and what is said about a wrong one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvsieve.dialogue import Utterance, parse_record, read_records
from kvsieve.errors import DataError

PLAIN: dict[str, Any] = {
    "video_id": "kitchen-1",
    "fps": 2.0,
    "frames": [f"{i}.png" for i in range(20)],
    "dataset": "wtag",
    "conversation": [
        {"from": "system", "value": "Help with the tea."},
        {"from": "user", "timestamp": 0.0, "value": "How do I make tea?"},
        {"from": "assistant", "timestamp": 0.0, "value": "Boil water.", "labels": "responsive|instruction"},
        {"from": "assistant", "timestamp": 5.5, "value": "Now pour it."},
    ],
}
PREPARED: dict[str, Any] = {
    "dataset": "assembly101",
    "video_uid": "toy-7",
    "clip_idx": 1,
    "frames_file": "frames/toy-7.arrow",
    "start_frame_idx": 11,
    "end_frame_idx": 21,
    "fps": 2,
    "metadata": {"user_id": "quiet_0", "task_goal": "Build it", "knowledge": "1. Wheels", "progress": None, "x": 9},
    "conversation": [
        {"role": "system", "content": "Be useful."},
        {"role": "frames", "start": 11, "end": 15},
        {"role": "user", "time": 7.8, "content": "What now?", "labels": ""},
        {"role": "frames", "start": 15, "end": 16},
        {"role": "assistant", "time": 7.8, "content": "The wheels.", "labels": "responsive", "progress": "none"},
        {"role": "frames", "start": 16, "end": 21},
    ],
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_runner_format(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "a.json", PLAIN))
    assert (record.video_id, record.key, record.fps, record.num_frames) == ("kitchen-1", "kitchen-1", 2.0, 20)
    assert record.duration == 10.0
    assert record.frames[3] == tmp_path / "3.png"
    assert record.time_of(3) == 1.5
    assert [(turn.role, turn.time, turn.frames_before) for turn in record.conversation] == [
        ("system", 0.0, 0),
        ("user", 0.0, 0),
        ("assistant", 0.0, 1),
        ("assistant", 5.5, 12),
    ]
    assert record.conversation[2].labels == "responsive|instruction"
    assert record.references == (Utterance(0.0, "Boil water.", 0), Utterance(5.5, "Now pour it.", 11))


def test_a_prepared_stream_keeps_the_clock_of_its_video(tmp_path: Path) -> None:
    (record,) = read_records(write(tmp_path / "c.jsonl", json.dumps(PREPARED) + "\n\n"), frames_root="/data")
    assert (record.video_id, record.key) == ("toy-7", "toy-7/quiet_0/1")
    assert (record.num_frames, record.duration, record.start_frame) == (10, 5.0, 11)
    assert record.frames == Path("/data/frames/toy-7.arrow")
    assert (record.time_of(0), record.time_of(4)) == (5.5, 7.5)
    assert [(turn.role, turn.time, turn.frames_before) for turn in record.conversation] == [
        ("system", 5.5, 0),
        ("user", 7.8, 4),
        ("assistant", 7.8, 5),
    ]
    assert (record.task_goal, record.knowledge, record.progress) == ("Build it", "1. Wheels", "")
    assert record.conversation[2].progress == "none"
    assert record.metadata["x"] == 9
    assert record.references == (Utterance(7.8, "The wheels.", 4),)


def test_a_question_and_its_answer_have_a_frame_between_them() -> None:
    lines = [("assistant", 2.0), ("user", 2.0), ("assistant", 2.0), ("user", 99.0), ("assistant", 99.0)]
    data = PLAIN | {"conversation": [{"from": who, "timestamp": time, "value": "words"} for who, time in lines]}
    before = [turn.frames_before for turn in parse_record(data).conversation]
    assert before == [5, 5, 6, 20, 20], "the stream has 20 frames"


@pytest.mark.parametrize(("time", "fps", "frame"), [(0.29, 100, 29), (2.3, 10, 23), (1 / 3, 30, 10), (0.999, 1, 0)])
def test_a_time_belongs_to_the_frame_in_view(time: float, fps: float, frame: int) -> None:
    line = {"from": "assistant", "timestamp": time, "value": "now"}
    record = parse_record({"video_id": "v", "fps": fps, "conversation": [line]})
    assert record.references[0].frame == frame


def test_frames_made_in_python_are_handed_on() -> None:
    frames = [object(), object()]
    record = parse_record(PLAIN | {"frames": frames})
    assert record.frames is frames
    assert record.num_frames == 2
    assert parse_record(PLAIN | {"frames": iter(frames)}).num_frames is None
    assert parse_record(PLAIN | {"frames": "clips/v"}, root=Path("/d")).frames == Path("/d/clips/v")


def test_a_folder_a_list_and_a_rate_for_all(tmp_path: Path) -> None:
    other = {name: value for name, value in PLAIN.items() if name != "fps"} | {"video_id": "kitchen-0"}
    write(tmp_path / "b.json", [PLAIN, other])
    write(tmp_path / "a.jsonl", json.dumps(PREPARED))
    write(tmp_path / "notes.txt", "nothing")
    records = read_records(tmp_path, fps=4)
    assert [record.video_id for record in records] == ["toy-7", "kitchen-1", "kitchen-0"]
    assert [record.fps for record in records] == [2.0, 2.0, 4.0]


def test_annotated_steps_from_a_table_or_rows(tmp_path: Path) -> None:
    write(tmp_path / "steps.tsv", "type\tstart_ts\tend_ts\tname\nSTEP\t0\t4.5\t7\nSUBSTEP\t1\t2\tfill the pot\n")
    (record,) = read_records(write(tmp_path / "a.json", PLAIN | {"dst_annotations": "steps.tsv"}))
    assert [(step.kind, step.start, step.end, step.name) for step in record.substeps] == [
        ("STEP", 0.0, 4.5, "7"),
        ("SUBSTEP", 1.0, 2.0, "fill the pot"),
    ]
    rows = [{"type": "STEP", "start_ts": 0, "end_ts": 4.5, "name": "7"}]
    assert parse_record(PLAIN | {"dst_annotations": rows}).substeps == record.substeps[:1]
    for bad, message in (
        ("type\tstart_ts\tend_ts\tname\nSTEP\tsoon\t4\tx\n", r"steps.tsv, line 2: start_ts must be a number"),
        ("type\tstart_ts\tend_ts\tname\nSTEP\t5\t4\tx\n", r"line 2: end_ts is 4; it must be 5 or more"),
        ("type\tstart_ts\tend_ts\tname\nSTEP\t5\n", r"line 2: 2 columns, but the first line names 4"),
        ("type\tend_ts\tname\nSTEP\t5\tx\n", r"line 2: start_ts is missing"),
        ("type\n", r"at least one row"),
    ):
        write(tmp_path / "steps.tsv", bad)
        with pytest.raises(DataError, match=message):
            read_records(tmp_path / "a.json")


def change(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy in which the field at `a.0.b` has another value, or, for `...`, is gone."""
    out: Any = copy.deepcopy(record)
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    inner = out
    for step in way:
        inner = inner[step]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return out


@pytest.mark.parametrize(
    ("record", "path", "value", "message"),
    [
        (PLAIN, "video_id", ..., r"video_id is missing"),
        (PLAIN, "video_id", 7, r"video_id must be a text, not int"),
        (PLAIN, "fps", ..., r"fps is missing \(fields: video_id, frames"),
        (PLAIN, "fps", 0, r"fps must be above 0"),
        (PLAIN, "fps", -1, r"fps is -1; it must be 0 or more"),
        (PLAIN, "fps", "2", r"fps must be a number, not str"),
        (PLAIN, "fps", True, r"fps must be a number, not bool"),
        (PLAIN, "fps", float("nan"), r"fps must be a finite number"),
        (PLAIN, "frames", [], r"frames is empty: the video has no frames"),
        (PLAIN, "frames", " ", r"frames is empty"),
        (PLAIN, "frames", ["a.png", 3], r"frames mixes paths and pictures"),
        (PLAIN, "dataset", 3, r"dataset must be a text"),
        (PLAIN, "conversation", ..., r"conversation is missing"),
        (PLAIN, "conversation", {}, r"conversation must be a list of objects"),
        (PLAIN, "conversation", [], r"no line of the assistant"),
        (PLAIN, "conversation", ["hi"], r"conversation\[0\] must be an object"),
        (PLAIN, "conversation.1.timestamp", ..., r"conversation\[1\]: timestamp is missing"),
        (PLAIN, "conversation.1.timestamp", 6.0, r"conversation\[2\]: timestamp is 0 s, before .*\(6 s\); sort"),
        (PLAIN, "conversation.2.timestamp", -1, r"conversation\[2\]: timestamp is -1"),
        (PLAIN, "conversation.2.from", "gpt", r"from is 'gpt'; it must be one of system, user, assistant"),
        (PLAIN, "conversation.2.value", "  ", r"conversation\[2\]: value is blank"),
        (PLAIN, "conversation.2.value", None, r"conversation\[2\]: value is missing"),
        (PLAIN, "dst_annotations", [{"type": "STEP"}], r"dst_annotations\[0\]: start_ts is missing"),
        (PREPARED, "start_frame_idx", 1.5, r"start_frame_idx is 1.5; it must be a whole number"),
        (PREPARED, "end_frame_idx", 3, r"end_frame_idx is 3; it must be 11 or more"),
        (PREPARED, "end_frame_idx", 11, r"the stream has no frames"),
        (PREPARED, "end_frame_idx", 30, r"shows frames up to 21, but end_frame_idx is 30"),
        (PREPARED, "conversation.3.start", 14, r"conversation\[3\]: start is 14, but the stream stands at frame 15"),
        (PREPARED, "conversation.5.end", 40, r"conversation\[5\]: end is 40, after the end of the stream"),
        (PREPARED, "conversation.2.role", "narrator", r"one of system, user, assistant, frames"),
        (PREPARED, "conversation.4.time", 7.0, r"conversation\[4\]: time is 7 s, before"),
        (PREPARED, "conversation.4.content", "", r"conversation\[4\]: content is blank"),
        (PREPARED, "metadata", [], r"metadata must be an object"),
        (PREPARED, "metadata.knowledge", 3, r"metadata: knowledge must be a text"),
        (PREPARED, "conversations", [], r"generated dialogues"),
    ],
)
def test_errors_name_file_record_and_field(
    tmp_path: Path, record: dict[str, Any], path: str, value: Any, message: str
) -> None:
    bad = change(record, path, value)
    file = write(tmp_path / "bad.json", [PLAIN | {"video_id": "good"}, bad])
    with pytest.raises(DataError, match=message) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}, record 1: ")
    lines = write(tmp_path / "bad.jsonl", json.dumps(PLAIN | {"video_id": "good"}) + "\n" + json.dumps(bad))
    with pytest.raises(DataError, match=message) as caught:
        read_records(lines)
    assert str(caught.value).startswith(f"{lines}, line 2: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"not valid JSON"),
        ("a.json", "[]", r"holds no record"),
        ("a.jsonl", "\n", r"holds no record"),
        ("a.json", "3", r"a record is an object, not int"),
        ("a.jsonl", "{}\n{", r"line 1: video_id is missing"),
        ("a.jsonl", "{", r"line 1: not valid JSON"),
        ("a.csv", "x", r"give a .json file"),
    ],
)
def test_files_that_hold_nothing_of_use(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / name, content))


def test_missing_files_wrong_bytes_and_repeated_videos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"holds no \.json"):
        read_records(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"not UTF-8 text \(.* at byte 0\)"):
        read_records(tmp_path / "b.json")
    write(tmp_path / "b.json", [PLAIN, PLAIN])
    with pytest.raises(DataError, match=r"record 1: kitchen-1 is there already \(.*record 0\)"):
        read_records(tmp_path / "b.json")


def test_one_wrong_record_need_not_stop_the_rest(tmp_path: Path) -> None:
    lines = [PLAIN, PLAIN, PLAIN | {"video_id": "b", "fps": 0}, 7, PREPARED]
    file = write(tmp_path / "a.jsonl", "\n".join([*(json.dumps(line) for line in lines), "{"]))
    errors: list[DataError] = []
    records = read_records(file, on_error=errors.append)
    assert [record.video_id for record in records] == ["kitchen-1", "toy-7"]
    assert [str(error).removeprefix(f"{file}, ")[:8] for error in errors] == [f"line {i}: " for i in (2, 3, 4, 6)]
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "b.jsonl", on_error=errors.append)


def test_records_without_references_can_be_asked_for() -> None:
    silent = PLAIN | {"conversation": PLAIN["conversation"][:2]}
    with pytest.raises(DataError, match="nothing to score"):
        parse_record(silent)
    assert parse_record(silent, need_references=False).references == ()


@pytest.mark.parametrize(("text", "time"), [("", 1.0), ("  ", 1.0), (None, 1.0), ("hi", float("nan"))])
def test_silence_is_no_utterance(text: Any, time: float) -> None:
    with pytest.raises(DataError):
        Utterance(time, text)


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, kvsieve.dialogue as d\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "light = ('matching', 'metrics', 'predictions', 'records', 'results', 'similarity')\n"
        "[getattr(d, name) for name in d.__all__ if d._LAZY[name] in light]\n"
        "assert 'torch' not in sys.modules and 'sentence_transformers' not in sys.modules\n"
        "assert set(d._LAZY) == set(d.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
