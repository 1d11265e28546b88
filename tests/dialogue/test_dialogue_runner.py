"""The runner: when it speaks, what it hands back, and what it says about wrong input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import conftest
from conftest import frames, rule, video
from kvsieve.dialogue.context import StreamContext
from kvsieve.dialogue.records import parse_record
from kvsieve.dialogue.runner import VLMStreamRunner
from kvsieve.dialogue.strategies import SummarizeAndDrop
from kvsieve.dialogue.vlm import VisionLanguageModel
from kvsieve.errors import BudgetError, DataError, PolicyError

STEPS = [
    {"type": "SUBSTEP", "start_ts": 1.0, "end_ts": 2.0, "name": "one"},
    {"type": "SUBSTEP", "start_ts": 4.5, "end_ts": 6.0, "name": "two"},
]
SMALL: dict[str, Any] = {
    "context_strategy_type": "drop_middle",
    "context_strategy_config": {"max_seq_len": 60, "reserved_seq_len": 8, "last_keep_len": 10},
}


def test_what_comes_back(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, **SMALL, max_new_tokens=5)
    lines = (("assistant", 2.0, "one"), ("assistant", 2.5, "two"), ("assistant", 6.0, "three"))
    with rule(vlm, lambda frame: frame in (3, 6)):
        out = made.run_inference_on_video(video(20, lines=lines, dataset="wtag"))
    assert out["video_id"] == "toy"
    outputs, prediction = out["predictions"], out["prediction"]
    assert [one.frame_idx_in_stream for one in outputs] == list(range(20))
    assert [one.timestamp_in_stream for one in outputs] == [float(i) for i in range(20)]
    assert {i: one.ref for i, one in enumerate(outputs) if one.ref} == {2: "one two", 6: "three"}
    assert [i for i, one in enumerate(outputs) if one.gen] == [3, 6]
    assert all(0.0 <= one.silence <= 1.0 and one.seconds > 0 for one in outputs)
    assert [(one.frame, one.time, one.text) for one in prediction.spoken] == [
        (i, float(i), outputs[i].gen) for i in (3, 6)
    ]
    assert (prediction.frames, prediction.dataset, prediction.status) == (20, "wtag", "ok")
    assert prediction.cache_tokens == tuple(one.cache_tokens for one in outputs)
    events = prediction.events
    assert len(events) == prediction.numbers["cache_compressions"] > 1
    for event in events:
        assert (event["kind"], event["strategy"]) == ("compression", "drop_middle")
        assert event["tokens_after"] == 6 + 10 < event["tokens_before"]
        assert 0 < event["bytes_after"] < event["bytes_before"]
        assert event["seconds"] > 0
        assert event["timestamp_in_stream"] == event["frame_idx_in_stream"]
    numbers = prediction.numbers
    assert numbers["avg_cache_size"] == pytest.approx(np.mean(prediction.cache_tokens))
    assert numbers["max_cache_size"] >= max(prediction.cache_tokens)
    assert numbers["tokens_fed"] == 6 + 20 * 4 + 17 + 2 * 6  # what opens, frames, silences, two lines with their ends
    assert 0 < numbers["mean_silence"] < 1


def test_the_threshold(vlm: VisionLanguageModel) -> None:
    record = video(8)

    made = VLMStreamRunner(vlm, max_new_tokens=2, context_strategy_type="none")
    silence = sorted(one.silence for one in made.run_inference_on_video(record)["predictions"])
    middle = (silence[3] + silence[4]) / 2
    made = VLMStreamRunner(vlm, max_new_tokens=2, not_talk_threshold=middle, context_strategy_type="none")
    with rule(vlm, None) as fed:
        made.run_inference_on_video(record)
    assert sum(len(one.ids) == 1 for one in fed) == 4  # lines of two tokens, one of which is fed at once


def test_silence_and_pictures_are_never_words(vlm: VisionLanguageModel) -> None:
    """What silence and a picture are written with cannot begin a line, however probable."""
    stock = vlm.forward

    def forward(*args: Any) -> torch.Tensor:
        logits = stock(*args)
        logits[vlm.image_token] = logits.max() + 9.0
        logits[vlm.format.silence] = logits.max() - 4.0
        return logits

    vlm.forward = forward  # type: ignore[method-assign]
    try:
        made = VLMStreamRunner(vlm, context_strategy_type="full", max_new_tokens=4)
        out = made.run_inference_on_video(video(5))
    finally:
        del vlm.forward  # type: ignore[method-assign]
    assert made.context.fed > 5 * 8
    assert len(out["predictions"]) == 5


def test_greedy_and_drawn(vlm: VisionLanguageModel) -> None:
    record = video(6)

    def said(**options: Any) -> list[str]:
        made = VLMStreamRunner(vlm, context_strategy_type="full", max_new_tokens=6, **options)
        with rule(vlm, lambda frame: frame % 2 == 1):
            return [one.gen for one in made.run_inference_on_video(record)["predictions"] if one.gen]

    plain = said()
    assert plain == said(seed=5) == said(temperature=0.0, do_sample=True) == said(temperature=2.0, do_sample=False)
    assert plain == said(temperature=2.0, top_p=1e-9) == said(temperature=1e-4)
    drawn = said(temperature=2.0, top_p=1.0)
    assert drawn == said(temperature=2.0, top_p=1.0) != plain
    assert drawn != said(temperature=2.0, top_p=1.0, seed=1)


def test_speaking_where_steps_begin(vlm: VisionLanguageModel) -> None:
    record = video(8, dst_annotations=STEPS)
    made = VLMStreamRunner(vlm, context_strategy_type="full", max_new_tokens=3, speak="transitions")
    with rule(vlm, None):
        out = made.run_inference_on_video(record)["predictions"]
    assert [i for i, one in enumerate(out) if one.gen] == [1, 5]
    assert all(one.silence is None for one in out)
    prompt = "<image>done {prev_substep} now {curr_substep}"
    made = VLMStreamRunner(
        vlm, context_strategy_type="full", max_new_tokens=3, speak="transitions", dialogue_generation_prompt=prompt
    )
    with rule(vlm, None) as fed:
        out = made.run_inference_on_video(record)["predictions"]
    asked = [one.ids for one in fed if vlm.encode("done")[0] in one.ids]
    want = "<silent>User: done {} now {}<end_of_utterance>\nAssistant:"
    assert asked == [vlm.encode(want.format("nothing", "one")), vlm.encode(want.format("one", "two"))]
    assert [i for i, one in enumerate(out) if one.gen] == [1, 5]


def test_asking_the_model_for_steps_leaves_its_context_alone(vlm: VisionLanguageModel) -> None:
    options: dict[str, Any] = {"context_strategy_type": "full", "max_new_tokens": 3, "speak": "transitions"}
    made = VLMStreamRunner(vlm, **options, use_gt_substeps=False, transition_detection_prompt="Answer step")
    with rule(vlm, None) as fed:
        made.run_inference_on_video(video(4))
    asked = [one for one in fed if vlm.encode("Answer")[0] in one.ids and one.pictures]
    mine = [one for one in fed if one.cache == id(made.context.cache)]
    assert [one.before for one in asked] == [0] * 4
    assert not any(one.cache == id(made.context.cache) for one in asked)
    assert sum(bool(one.pictures) for one in mine) == 4
    assert all(one.before == last.after for last, one in pairwise(mine))
    assert made.context.fed == sum(len(one.ids) for one in mine) < sum(len(one.ids) for one in fed)


def test_a_question_of_the_user_is_heard_in_time(vlm: VisionLanguageModel) -> None:
    lines = (("user", 3.0, "what next"), ("assistant", 4.0, "one"), ("user", 20.0, "go on"))
    for initial in ("system", "user_turn"):
        made = VLMStreamRunner(
            vlm, context_strategy_type="drop_all", context_strategy_config={"initial": initial}, max_new_tokens=3
        )
        with rule(vlm) as fed:
            made.run_inference_on_video(video(24, lines=lines))
        order = ["picture" if one.pictures else vlm.decode(one.ids) for one in fed]
        assert order.index("User: what next") == 1 + 3
        assert [i for i, one in enumerate(order) if one == "User: go on"] == [1 + 20 + 1]
        assert made.context.initial == (6 if initial == "system" else 6 + 3 * 5 + 4)


def test_lines_after_the_last_frame_hold_nothing_up(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, context_strategy_type="drop_all", max_seq_len=60, reserved_seq_len=8, max_new_tokens=3)
    with rule(vlm):
        made.run_inference_on_video(video(30, lines=(("assistant", 2.0, "one"), ("user", 30.0, "what next"))))
    assert made.context.compressions > 1


def test_streams_need_no_references_and_no_end(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, **SMALL, max_new_tokens=3)

    def endless() -> Any:
        while True:
            yield frames(1)[0]

    record = {"video_id": "live", "fps": 2.0, "frames": endless(), "conversation": []}
    with rule(vlm):
        for out in made.stream(record):
            if out.frame_idx_in_stream == 30:
                break
    assert out.timestamp_in_stream == 15.0
    assert made.context.compressions > 1


def test_two_streams_at_once(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, context_strategy_type="full", max_new_tokens=3)
    alone = [one.silence for one in made.stream(video(6))]
    pairs = list(zip(made.stream(video(6)), made.stream(video(6)), strict=True))
    assert alone == [one.silence for one, _ in pairs] == [two.silence for _, two in pairs]


def test_an_error_leaves_the_runner_as_it_was(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, **{**SMALL, "context_strategy_type": "h2o"}, max_new_tokens=3)
    want = [one.silence for one in made.stream(video(12))]
    stock, calls = vlm.forward, 0

    def forward(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("out of memory")
        return stock(*args)

    vlm.forward = forward  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(made.stream(video(12)))
    finally:
        del vlm.forward  # type: ignore[method-assign]
    assert [one.silence for one in made.stream(video(12))] == want


def test_a_model_that_gives_no_numbers(vlm: VisionLanguageModel) -> None:
    stock = vlm.forward
    vlm.forward = lambda *args: stock(*args) * math.nan  # type: ignore[method-assign]
    try:
        with pytest.raises(DataError, match="output at frame 0 is not a number"):
            VLMStreamRunner(vlm).run_inference_on_video(video())
    finally:
        del vlm.forward  # type: ignore[method-assign]


def test_the_prompt_for_a_summary_that_a_model_was_trained_with() -> None:
    trained = conftest.build()
    options: dict[str, Any] = {"max_seq_len": 120, "reserved_seq_len": 5, "summary_max_length": 6}
    kinds: list[tuple[Any, Any]] = [("summarize_and_drop", options), (SummarizeAndDrop(**options), None)]
    for prompt in (None, "summarize"):
        if prompt:
            trained.model.config.summary_prompt = prompt
        for kind, config in kinds:
            made = VLMStreamRunner(
                trained, context_strategy_type=kind, context_strategy_config=config, max_new_tokens=4
            )
            with rule(trained):
                out = made.run_inference_on_video(video(24))["prediction"]
            assert {one.prompt for one in out.summaries} == {prompt or SummarizeAndDrop.DEFAULT_PROMPT}
    own = {**options, "summary_prompt": "go on"}
    given = VLMStreamRunner(
        trained, context_strategy_type="summarize_and_drop", context_strategy_config=own, max_new_tokens=4
    )
    assert given.strategy.settings["summary_prompt"] == "go on"


def test_settings_name_all_that_decides(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, speak="transitions", dialogue_generation_prompt="say {curr_substep}", max_new_tokens=9)
    settings = made.settings
    assert settings["prompt"] == "say {curr_substep}"
    assert settings["strategy"] == "none"
    assert settings["strategy_settings"]["reserved_seq_len"] == 128
    options = {
        "max_new_tokens",
        "temperature",
        "top_p",
        "not_talk_threshold",
        "speak",
        "use_gt_substeps",
        "fps",
        "seed",
    }
    assert options | {"split_images", "question", "dtype", "model", "use_knowledge", "use_kv_cache"} <= set(settings)


# ---- wrong input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, PolicyError, "max_new_tokens"),
        ({"temperature": -1.0}, PolicyError, "temperature"),
        ({"top_p": 0.0}, PolicyError, "top_p"),
        ({"not_talk_threshold": 1.5}, PolicyError, "not_talk_threshold"),
        ({"speak": "always"}, PolicyError, "speak='always'"),
        ({"context_strategy_type": "drop_midle"}, PolicyError, "Unknown context strategy"),
        (
            {"context_strategy_type": "drop_all", "context_strategy_config": {"last_kep_len": 1}},
            PolicyError,
            "last_kep",
        ),
        ({"reserved_seq_len": 50}, PolicyError, "has no room for a reply of max_new_tokens=100"),
        ({"max_seq_len": 100}, BudgetError, "leaves nothing"),
        ({"context_strategy_type": "drop_all", "use_kv_cache": False}, PolicyError, "drop_all needs a cache"),
        ({"use_kv_cache": False, "context_strategy_config": {"initial": "first_turn"}}, PolicyError, "first_turn"),
        ({"use_kv_cache": False, "context_strategy_config": {"positions": "original"}}, PolicyError, "original"),
        ({"dialogue_generation_prompt": "say it"}, PolicyError, 'go with speak="transitions"'),
        ({"speak": "transitions", "transition_detection_prompt": "which"}, PolicyError, "use_gt_substeps=False"),
        ({"speak": "transitions", "dialogue_generation_prompt": "{step}"}, PolicyError, "no other braces"),
        ({"torch_dtype": "int8"}, PolicyError, "no type of weights"),
    ],
)
def test_options_that_are_refused(
    vlm: VisionLanguageModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VLMStreamRunner(vlm, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": []}, "has no frames"),
        ({"frames": None}, "holds no frames"),
        ({"frames": [frames(1)[0], frames(1, side=16)[0]]}, "all frames of a video must have one size"),
        ({"conversation": [{"from": "user", "timestamp": 0.0, "value": "go"}]}, "no line of the assistant"),
        (
            {
                "conversation": [
                    {"from": "assistant", "timestamp": 3.0, "value": "one"},
                    {"from": "assistant", "timestamp": 1.0, "value": "two"},
                ]
            },
            "before the line above it",
        ),
        (
            {
                "conversation": [
                    {"from": "user", "timestamp": 0.0, "value": "<image> what next"},
                    {"from": "assistant", "timestamp": 1.0, "value": "two"},
                ]
            },
            "asks for a picture, and has none",
        ),
        ({"fps": 0}, "fps must be above 0"),
    ],
)
def test_videos_that_are_refused(vlm: VisionLanguageModel, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        VLMStreamRunner(vlm, max_new_tokens=2).run_inference_on_video({**video(3), **wrong})


def test_steps_that_are_not_annotated(vlm: VisionLanguageModel) -> None:
    with pytest.raises(DataError, match="no annotated steps"):
        VLMStreamRunner(vlm, speak="transitions").run_inference_on_video(video(3))


def test_without_a_cache_the_initial_context_has_no_frames(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, use_kv_cache=False)
    with rule(vlm), pytest.raises(DataError, match="cannot compute afresh"):
        made.run_inference_on_video(video(5, lines=(("user", 3.0, "go on"), ("assistant", 4.0, "one"))))


def test_fewer_frames_than_the_record_says(vlm: VisionLanguageModel) -> None:
    record = parse_record(video(5))
    short = type(record)(**{**vars(record), "frames": iter(frames(3))})
    with rule(vlm), pytest.raises(DataError, match="the frames end after 3, there should be 5"):
        VLMStreamRunner(vlm).run_inference_on_video(short)


def test_the_context_of_the_last_video_is_at_hand(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm)
    assert made.context is None
    with rule(vlm):
        made.run_inference_on_video(video(2))
    assert isinstance(made.context, StreamContext)
