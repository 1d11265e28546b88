"""Where steps begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conftest import frames, rule, video
from kvsieve.dialogue.records import parse_record
from kvsieve.dialogue.transitions import QUESTION, Transitions, prompts_of
from kvsieve.dialogue.vlm import VisionLanguageModel
from kvsieve.errors import PolicyError

BLANK = np.zeros((32, 32, 3), np.uint8)


def steps(*rows: tuple[float, float, str], kind: str = "SUBSTEP") -> list[dict[str, Any]]:
    return [{"type": kind, "start_ts": start, "end_ts": end, "name": name} for start, end, name in rows]


def seen(count: int, annotations: list[dict[str, Any]], fps: float = 1.0) -> list[tuple[int, str, str]]:
    """Frame, step before, and step, of every transition."""
    record = parse_record({**video(count), "fps": fps, "dst_annotations": annotations})
    found = Transitions(record)
    return [(i, found.before, found.step) for i in range(count) if found.begins(i, BLANK)]


def test_gaps_and_equal_names_hide_nothing_and_the_first_step_counts() -> None:
    rows = steps((1.0, 2.2, "a"), (4.6, 5.0, "b"), (5.0, 6.0, "b"), (9.0, 9.5, "a"))
    assert seen(11, rows) == [(1, "nothing", "a"), (5, "a", "b"), (9, "b", "a")]
    assert seen(30, rows, fps=2.0) == [(2, "nothing", "a"), (10, "a", "b"), (18, "b", "a")]
    assert seen(50, rows, fps=5.0)[1:3] == [(23, "a", "b"), (25, "b", "b")]


def test_overlaps_are_not_late_and_order_does_not_matter() -> None:
    rows = steps((3.0, 9.0, "b"), (0.0, 8.0, "a"))
    assert seen(5, rows) == [(0, "nothing", "a"), (3, "a", "b")]


def test_other_kinds_of_rows_count_only_where_there_are_no_substeps() -> None:
    actions = steps((1.0, 2.0, "x"), kind="ACTION")
    assert seen(4, actions) == [(1, "nothing", "x")]
    assert seen(4, actions + steps((2.0, 3.0, "a"))) == [(2, "nothing", "a")]


def test_a_model_that_is_asked(vlm: VisionLanguageModel) -> None:
    record = parse_record(video(6))
    answers = ["one", "one", "two", "two", "one", ""]
    shots = frames(6)
    found = Transitions(record, vlm, "Answer step")
    events = []
    for i, answer in enumerate(answers):
        with rule(vlm, ends=True) as fed:
            stock = vlm.forward
            script = [*vlm.encode(answer), vlm.format.end]

            def forward(*args: Any, stock: Any = stock, script: list[int] = script) -> Any:
                logits = stock(*args)
                logits[:] = -50.0
                logits[script.pop(0)] = 50.0
                return logits

            vlm.forward = forward  # type: ignore[method-assign]
            if found.begins(i, shots[i]):
                events.append((i, found.before, found.step))
        first = fed[0]
        assert first.before == 0
        want = f"<|im_start|>User: {'<image>' * 4} Answer step<end_of_utterance>\nAssistant:"
        assert first.ids == vlm.encode(want)
    assert events == [(0, "nothing", "one"), (2, "one", "two"), (4, "two", "one")]


def test_prompts() -> None:
    assert prompts_of("", "", False, True) == (QUESTION, "")
    asked = prompts_of("<image>what now", "<image>\nafter {prev_substep}: {curr_substep}", True, False)
    assert asked == ("what now", "after {prev_substep}: {curr_substep}")
    with pytest.raises(PolicyError, match=r'go with speak="transitions"'):
        prompts_of("", "say it", False, True)
    with pytest.raises(PolicyError, match="use_gt_substeps=False"):
        prompts_of("what now", "", True, True)
    for wrong in ("{step}", "{", "{0}", "{prev_substep.x}"):
        with pytest.raises(PolicyError, match="no other braces"):
            prompts_of("", wrong, True, True)
