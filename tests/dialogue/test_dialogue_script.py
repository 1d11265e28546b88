"""What the model hears and is to say, and which frames it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import frames, video
from kvsieve.dialogue.records import Turn, VideoRecord, parse_record
from kvsieve.dialogue.script import frames_of, script_of
from kvsieve.errors import DataError


def test_the_opening_is_one_line() -> None:
    record = parse_record(
        {
            **video(8, lines=(("user", 1.0, "what next"), ("assistant", 2.0, "one"))),
            "conversation": [
                {"from": "system", "value": "Be kind."},
                {"from": "system", "value": "Task knowledge: 1. Wheels"},
                {"from": "user", "timestamp": 1.0, "value": "what next"},
                {"from": "system", "timestamp": 3.0, "value": "be quick"},
                {"from": "assistant", "timestamp": 4.0, "value": "one"},
            ],
            "progress": "Two are on.",
        }
    )
    script = script_of(record)
    assert (script.system, script.knowledge) == ("Be kind.", "Task knowledge: 1. Wheels")
    assert [(turn.role, turn.text, turn.frames_before) for turn in script.turns] == [
        ("system", "Be kind. Two are on. Task knowledge: 1. Wheels", 0),
        ("user", "what next", 1),
        ("system", "be quick", 3),
    ]
    assert script.due == {4: "one"}


def test_knowledge_beside_the_conversation_is_told_on_request() -> None:
    record = parse_record(video(4, knowledge="1. Wheels"))
    assert script_of(record).knowledge == ""
    told = script_of(record, use_knowledge=True)
    assert told.knowledge == "Task knowledge: 1. Wheels"
    assert told.turns[0].text == "Watch and help Task knowledge: 1. Wheels"
    assert script_of(parse_record(video(4, system=""))).turns == ()


@pytest.mark.parametrize("fps", [1.0, 2.0, 5.0, 30.0])
def test_every_line_is_due_at_exactly_one_frame(fps: float) -> None:
    lines = (
        ("assistant", 1.0, "one"),
        ("assistant", 1.2, "two"),
        ("assistant", 3.9, "three"),
        ("assistant", 4.0, "four"),
    )
    record = parse_record({**video(int(6 * fps), lines=lines), "fps": fps})
    due = script_of(record).due
    assert " ".join(due[i] for i in sorted(due)) == "one two three four"
    for line in record.references:
        assert line.text in due[line.frame]
        assert abs(record.time_of(line.frame) - line.time) <= 1 / fps


def clip(source: Any, count: int | None = 4, start: int = 3) -> VideoRecord:
    turns = (Turn("assistant", "one", 4.0, 2),)
    return VideoRecord("v", "v", 1.0, turns, frames=source, num_frames=count, start_frame=start)


def test_a_clip_is_shown_from_where_it_begins(tmp_path: Path) -> None:
    whole = frames(10)
    np.save(tmp_path / "whole.npy", whole)
    np.save(tmp_path / "cut.npy", whole[3:7])
    for source in (tmp_path / "whole.npy", tmp_path / "cut.npy", list(whole[3:7])):
        assert np.array_equal(np.stack(list(frames_of(clip(source)))), whole[3:7])
    assert len(list(frames_of(clip(tmp_path / "whole.npy", count=None)))) == 7
    np.save(tmp_path / "short.npy", whole[:6])
    with pytest.raises(DataError, match=r"there are 6 frames, which are neither those of the stream \(4\)"):
        frames_of(clip(tmp_path / "short.npy"))
