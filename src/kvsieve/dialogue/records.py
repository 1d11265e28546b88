"""Videos with a dialogue: the two record formats in use, checked and turned into one.

Times are seconds on the clock of the video, frames are counted from 0 at the first frame of the stream. A record cut
out of a longer video keeps the times it had there: its frame `i` is shown at `(start_frame + i) / fps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._fields import Fields, read_objects, read_table
from ..errors import DataError

__all__ = ["ROLES", "Substep", "Turn", "Utterance", "VideoRecord", "parse_record", "read_records"]

ROLES = ("system", "user", "assistant")
_NEARLY = 1e-6
"""Frames by which a time may fall short of a frame, from rounding in the file, and still belong to it."""


@dataclass(frozen=True)
class Utterance:
    """Something that is said.

    Attributes:
        time: seconds on the clock of the video.
        text: what is said; never blank.
        frame: the frame of the stream it is said at, where that is known.
    """

    time: float
    text: str
    frame: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise DataError(f"an utterance needs a text, not {self.text!r}; leave silence out")
        if not math.isfinite(self.time):
            raise DataError(f"the utterance {self.text!r} has no time that can be used: {self.time!r}")


@dataclass(frozen=True)
class Turn:
    """One line of a conversation.

    Attributes:
        role: one of `ROLES`.
        text: what is said.
        time: seconds; a system turn without one has the time of the first frame.
        frames_before: how many frames of the stream come before it, `0` for what opens the conversation.
        labels: as in the file, such as `"initiative|instruction"`.
        progress: what has happened so far, in words, as annotated for a summary at this turn.
    """

    role: str
    text: str
    time: float
    frames_before: int
    labels: str = ""
    progress: str = ""


@dataclass(frozen=True)
class Substep:
    """A part of the task, as annotated: its kind (`STEP`, `SUBSTEP`, `ACTION`), first and last second, and name."""

    kind: str
    start: float
    end: float
    name: str


@dataclass(frozen=True)
class VideoRecord:
    """One video, or a clip of one, and what is said in it.

    Attributes:
        video_id: the video's name in its data set.
        key: unique among the records of a data set, where one video may occur with several users and clips.
        fps: frames per second of the stream.
        conversation: in the order of time.
        frames: where the frames come from: a `Path`, a tuple of `Path`, or whatever the caller handed over.
        num_frames: how many frames the stream has, where that is known without opening them.
        duration: seconds, where known.
        start_frame: where the stream begins, in frames of the video.
        dataset: name of the data set, which decides the matching window; may be empty.
        task_goal: what the user wants to do.
        knowledge: the recipe of the task.
        progress: what happened before the clip begins.
        substeps: annotated parts of the task.
        metadata: what else the file says.
        where: file and record, for messages.
    """

    video_id: str
    key: str
    fps: float
    conversation: tuple[Turn, ...]
    frames: Any = field(default=None, compare=False, repr=False)
    num_frames: int | None = None
    duration: float | None = None
    start_frame: int = 0
    dataset: str = ""
    task_goal: str = ""
    knowledge: str = ""
    progress: str = ""
    substeps: tuple[Substep, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def time_of(self, frame: int) -> float:
        """Seconds at which frame `frame` of the stream is shown."""
        return (self.start_frame + frame) / self.fps

    @property
    def references(self) -> tuple[Utterance, ...]:
        """What the assistant says, each line with its time and the one frame it belongs to: the last one before it."""
        return tuple(
            Utterance(turn.time, turn.text, max(0, turn.frames_before - 1))
            for turn in self.conversation
            if turn.role == "assistant"
        )


def read_records(
    path: str | Path,
    *,
    frames_root: str | Path | None = None,
    fps: float | None = None,
    need_references: bool = True,
    on_error: Callable[[DataError], None] | None = None,
) -> list[VideoRecord]:
    """Read all records of a `.json` file (one object, or a list), a `.jsonl` file, or a folder of such files.

    Args:
        path: file or folder; the files of a folder are read in the order of their names, folders inside it are not.
        frames_root: folder that paths of frames in the records start from; by default the folder of the file.
        fps: frames per second of records that do not say.
        need_references: refuse records in which the assistant never speaks, as there is nothing to score.
        on_error: called with what is wrong with a record, which is then left out and the rest read; by default the
            first wrong record ends the reading.

    Raises:
        DataError: a file is missing, empty or malformed, a field is missing or wrong, times go backwards, or two
            records have the same key. The message names file, record and field.
    """
    records: list[VideoRecord] = []
    seen: dict[str, str] = {}
    for file, where, data in read_objects(Path(path)):
        root = file.parent if frames_root is None else Path(frames_root)
        try:
            if isinstance(data, DataError):
                raise data
            record = parse_record(data, where=where, root=root, fps=fps, need_references=need_references)
            if record.key in seen:
                raise DataError(
                    f"{where}: {record.key} is there already ({seen[record.key]}); results would be mixed up"
                )
        except DataError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        seen[record.key] = where
        records.append(record)
    return records


def parse_record(
    data: Mapping[str, Any],
    *,
    where: str = "record",
    root: Path | None = None,
    fps: float | None = None,
    need_references: bool = True,
) -> VideoRecord:
    """One record, from either format.

    *Runner format*: `video_id`, `frames`, `conversation` of `{from, timestamp, value, labels}`, `fps`, and optionally
    `dataset`, `duration`, `knowledge`, `task_goal`, `progress`, `dst_annotations` (a table file, or rows of
    `{type, start_ts, end_ts, name}`). At time t frame `floor(t * fps)` is in view: the user is heard before it, the
    assistant speaks after it, and at least one frame lies between a question and its answer.

    *Prepared stream*: `video_uid`, `frames_file`, `fps`, `start_frame_idx`, `end_frame_idx`, `metadata`, and
    `conversation` of `{role, content, time, labels, progress}` in which turns `{role: "frames", start, end}`, end
    excluded, say where the frames are.

    Args:
        data: the record; a mapping made in Python may hold frames of any kind, which are handed on as they are.
        where: what messages call it.
        root: folder that relative paths start from.
        fps: frames per second if the record does not say.
        need_references: refuse a record in which the assistant never speaks.

    Raises:
        DataError: see `read_records`.
    """
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: a record is an object with fields, not {type(data).__name__}")
    fields = Fields(data, where)
    if "conversations" in data:
        raise fields.error(
            "conversations", "belongs to a file of generated dialogues; give the prepared streams, or one conversation"
        )
    prepared = "video_uid" in data
    if not prepared and "video_id" not in data:
        raise fields.error("video_id", "is missing (a prepared stream has video_uid instead)")
    rate = fields.number("fps", least=0, default=fps)
    if rate == 0:
        raise fields.error("fps", "must be above 0")
    record = _prepared(fields, rate, root) if prepared else _plain(fields, rate, root)
    if need_references and not any(turn.role == "assistant" for turn in record.conversation):
        raise fields.error("conversation", "has no line of the assistant, so there is nothing to score")
    return record


def _plain(fields: Fields, fps: float, root: Path | None) -> VideoRecord:
    frames, count = _frames(fields, "frames", root)
    duration = count / fps if count is not None else fields.optional_number("duration")
    turns: list[Turn] = []
    heard = -1
    for item in fields.objects("conversation"):
        role = item.choice("from", ROLES)
        untimed = role == "system" and item.absent("timestamp")
        time = (turns[-1].time if turns else 0.0) if untimed else item.number("timestamp", least=0)
        _in_order(item, "timestamp", time, turns)
        before = math.floor(time * fps + _NEARLY)
        if role == "assistant":
            before = max(before, heard) + 1
        before = max(0 if untimed else before, turns[-1].frames_before if turns else 0)
        before = before if count is None else min(before, count)
        heard = before if role == "user" else heard
        turns.append(Turn(role, item.text("value"), time, before, item.words("labels"), item.words("progress")))
    video = fields.text("video_id")
    return VideoRecord(
        video_id=video,
        key=video,
        fps=fps,
        conversation=tuple(turns),
        frames=frames,
        num_frames=count,
        duration=duration,
        dataset=fields.words("dataset"),
        task_goal=fields.words("task_goal"),
        knowledge=fields.words("knowledge"),
        progress=fields.words("progress"),
        substeps=_substeps(fields, root),
        metadata=fields.mapping("metadata"),
        where=fields.where,
    )


def _prepared(fields: Fields, fps: float, root: Path | None) -> VideoRecord:
    start = fields.whole("start_frame_idx", least=0)
    end = fields.whole("end_frame_idx", least=start)
    if end == start:
        raise fields.error("end_frame_idx", f"is {end}, as the start is: the stream has no frames")
    turns: list[Turn] = []
    shown = start
    for item in fields.objects("conversation"):
        role = item.choice("role", (*ROLES, "frames"))
        if role == "frames":
            if item.whole("start", least=0) != shown:
                raise item.error("start", f"is {item.data['start']}, but the stream stands at frame {shown}")
            shown = item.whole("end", least=shown)
            if shown > end:
                raise item.error("end", f"is {shown}, after the end of the stream at frame {end}")
            continue
        in_view = max(start, shown - 1) / fps
        time = item.number("time", least=0, default=max(in_view, turns[-1].time if turns else in_view))
        _in_order(item, "time", time, turns)
        turns.append(
            Turn(role, item.text("content"), time, shown - start, item.words("labels"), item.words("progress"))
        )
    if shown != end:
        raise fields.error("conversation", f"shows frames up to {shown}, but end_frame_idx is {end}")
    about = Fields(fields.mapping("metadata"), f"{fields.where}: metadata")
    video = fields.text("video_uid")
    frames, _ = _frames(fields, "frames_file", root)
    return VideoRecord(
        video_id=video,
        key="/".join((video, about.words("user_id") or "user", str(fields.whole("clip_idx", least=0, default=0)))),
        fps=fps,
        conversation=tuple(turns),
        frames=frames,
        num_frames=end - start,
        duration=(end - start) / fps,
        start_frame=start,
        dataset=fields.words("dataset"),
        task_goal=about.words("task_goal"),
        knowledge=about.words("knowledge"),
        progress=about.words("progress"),
        substeps=_substeps(fields, root),
        metadata=about.data,
        where=fields.where,
    )


def _in_order(item: Fields, name: str, time: float, turns: Sequence[Turn]) -> None:
    if turns and time < turns[-1].time:
        raise item.error(name, f"is {time:g} s, before the line above it ({turns[-1].time:g} s); sort the conversation")


def _frames(fields: Fields, name: str, root: Path | None) -> tuple[Any, int | None]:
    """What holds the frames, with paths made absolute, and how many there are, if it says."""
    given = fields.data.get(name)
    if given is None:
        return None, None
    if isinstance(given, (str, Path)):
        if not str(given).strip():
            raise fields.error(name, "is empty")
        return _resolved(given, root), None
    if not hasattr(given, "__len__"):
        return given, None
    if len(given) == 0:
        raise fields.error(name, "is empty: the video has no frames")
    if isinstance(given, (list, tuple)) and any(isinstance(one, (str, Path)) for one in given):
        if not all(isinstance(one, (str, Path)) for one in given):
            raise fields.error(name, "mixes paths and pictures; give one or the other")
        return tuple(_resolved(one, root) for one in given), len(given)
    return given, len(given)


def _resolved(path: str | Path, root: Path | None) -> Path:
    return Path(path) if root is None else root / path


def _substeps(fields: Fields, root: Path | None) -> tuple[Substep, ...]:
    given = fields.data.get("dst_annotations")
    if given is None:
        return ()
    if isinstance(given, (str, Path)):
        rows = read_table(_resolved(given, root), numbers=("start_ts", "end_ts"))
    else:
        rows = list(fields.objects("dst_annotations"))
    steps: list[Substep] = []
    for row in rows:
        start = row.number("start_ts", least=0)
        steps.append(Substep(row.text("type"), start, row.number("end_ts", least=start), row.text("name")))
    return tuple(steps)
