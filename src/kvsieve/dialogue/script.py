"""What a model is shown of a video and told of its conversation, and what it is to say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .frames import open_frames
from .records import Turn, VideoRecord

__all__ = ["Script", "frames_of", "name_of", "script_of"]

KNOWLEDGE = "Task knowledge:"
"""What the recipe of a task begins with, where the system tells it."""


@dataclass(frozen=True)
class Script:
    """A conversation, seen from the model.

    Attributes:
        system: what the system says at the start, the recipe aside.
        knowledge: the recipe, where it is told; else empty.
        turns: what the model hears, in order: all that the system says at the start in one turn, then the user and
            later lines of the system.
        due: what it is to say, by the frame it belongs to; several lines at one frame are joined by a space.
    """

    system: str
    knowledge: str
    turns: tuple[Turn, ...]
    due: dict[int, str]


def script_of(record: VideoRecord, use_knowledge: bool = False) -> Script:
    """The script of a video.

    Args:
        use_knowledge: tell the recipe of a record that has one beside its conversation.
    """
    lines = [turn.text for turn in record.conversation if turn.role == "system" and not turn.frames_before]
    system, mark, told = (part.strip() for part in " ".join(lines).partition(KNOWLEDGE))
    if not mark and use_knowledge and record.knowledge:
        mark, told = KNOWLEDGE, record.knowledge
    knowledge = f"{mark} {told}".strip()
    opening = " ".join(part for part in (system, record.progress, knowledge) if part)
    first = [Turn("system", opening, 0.0, 0)] if opening else []
    later = [turn for turn in record.conversation if turn.role == "system" and turn.frames_before]
    heard = [turn for turn in record.conversation if turn.role == "user" or turn in later]
    due: dict[int, str] = {}
    for said in record.references:
        at = said.frame or 0
        due[at] = f"{due[at]} {said.text}" if at in due else said.text
    return Script(system, knowledge, (*first, *heard), due)


def name_of(record: VideoRecord) -> str:
    """What messages begin with."""
    return record.where or record.key


def frames_of(record: VideoRecord) -> Iterator[NDArray[np.uint8]]:
    """The frames of the stream, `[height, width, 3]` each. A file or folder may hold the whole video that the stream
    was cut out of.

    Raises:
        DataError: see `open_frames`; or there are fewer than the record says.
    """
    frames = open_frames(record.frames, fps=record.fps, where=name_of(record))
    count, wanted, begin = frames.count, record.num_frames, record.start_frame
    if not isinstance(record.frames, (str, Path)) or count == wanted is not None:
        begin = 0
    if count is not None and count < begin + (wanted or 1):
        raise DataError(
            f"{name_of(record)}: there are {count} frames, which are neither those of the stream ({wanted}) nor a "
            f"video that goes on to frame {begin + (wanted or 1)}"
        )
    return islice(frames, begin, None if wanted is None else begin + wanted)
