"""The procedural videos: what is said belongs to what is seen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvsieve.dialogue import parse_record
from kvsieve.dialogue.assembly import COLOURS, HELD_OUT, PLACES, SHAPES, SIDE, AssemblyVideo, Task


def test_same_seed_same_video_and_other_seeds_differ():
    first, again, other = (AssemblyVideo(seed, steps=5) for seed in (3, 3, 4))
    assert np.array_equal(first.frames, again.frames)
    assert first.events == again.events
    assert first.task != other.task


@pytest.mark.parametrize("gap", [(1, 1), (1, 3), (8, 24)])
def test_every_step_ends_once_in_order(gap):
    video = AssemblyVideo(HELD_OUT, steps=PLACES, gap=gap)
    assert list(video.events.values()) == list(range(1, PLACES + 1))
    frames = [-1, *video.events]
    steps = np.diff(frames)
    assert steps.min() >= gap[0]
    assert steps.max() <= gap[1]
    assert len(video.frames) == frames[-1] + 1 + video.tail
    assert video.frames.shape[1:] == (SIDE, SIDE, 3)
    assert video.frames.dtype == np.uint8


def test_a_video_may_begin_in_the_middle_of_its_task():
    video = AssemblyVideo(7, steps=6, start=4)
    assert list(video.events.values()) == [5, 6]
    whole = AssemblyVideo(7, steps=6)
    assert video.task == whole.task


def test_the_picture_changes_where_a_step_ends_and_the_part_stays():
    """A place that is filled differs from the empty one in every later frame, by far more than noise and shake."""
    video = AssemblyVideo(HELD_OUT + 5, steps=8, gap=(6, 9))
    counts = []
    for frame in video.frames:
        bright = frame[2:25].max(-1) > 110
        counts.append(int(bright.sum()))
    ends = list(video.events)
    quiet = [ends[0] - 4, *ends]
    levels = [counts[max(0, at)] for at in quiet]
    assert levels == sorted(levels)
    assert levels[-1] > levels[0] + 8 * 15


def test_what_is_said():
    task = Task((("red", "circle"), ("blue", "square")))
    assert task.instruction == "task 1 red circle 2 blue square"
    assert task.line(1) == "step 1 done now place 2 blue square"
    assert task.line(2) == "step 2 done all finished"
    assert task.summary(1) == "task 1 red circle 2 blue square done 1"


def test_tasks_have_different_parts():
    task = Task.draw(random.Random(0), PLACES)
    assert len(set(task.parts)) == PLACES
    assert {colour for colour, _ in task.parts} <= COLOURS.keys()
    assert {shape for _, shape in task.parts} <= set(SHAPES)


def test_its_record_is_one_the_runner_reads():
    video = AssemblyVideo(HELD_OUT, steps=4)
    record = parse_record(video.record())
    assert record.num_frames == len(video.frames)
    assert [said.frame for said in record.references] == list(video.events)
    assert [turn.role for turn in record.conversation[:2]] == ["system", "user"]
    assert [record.time_of(at) for at in video.events] == [said.time for said in record.references]
