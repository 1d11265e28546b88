"""Strategies by name, their options, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conftest import rule, video
from kvsieve import list_methods
from kvsieve.dialogue import factory
from kvsieve.dialogue.factory import ContextStrategyFactory, PolicyStrategy, register_strategy
from kvsieve.dialogue.runner import VLMStreamRunner
from kvsieve.dialogue.strategies import BaseContextStrategy, DropMiddle, SummarizeAndDrop
from kvsieve.dialogue.vlm import VisionLanguageModel
from kvsieve.errors import BudgetError, PolicyError

make = ContextStrategyFactory.create_strategy


@pytest.fixture
def registry() -> Iterator[None]:
    """Names registered within are forgotten afterwards."""
    before = dict(factory._STRATEGIES)
    yield
    factory._STRATEGIES.clear()
    factory._STRATEGIES.update(before)


def test_the_documented_defaults() -> None:
    made = make("drop_middle")
    assert isinstance(made, DropMiddle)
    assert (made.max_seq_len, made.reserved_seq_len, made.last_keep_len) == (4096, 128, 512)
    assert made.ctxlen_to_reduce == 3968
    assert [made.should_reduce_cache(n) for n in (0, 3967, 3968, 9999)] == [False, False, True, True]
    assert repr(made).startswith("DropMiddle(max_seq_len=4096, reserved_seq_len=128, last_keep_len=512, positions='slo")


def test_every_name_makes_a_strategy_of_that_name() -> None:
    names = ContextStrategyFactory.available()
    assert names[:4] == ["none", "drop_all", "drop_middle", "summarize_and_drop"]
    assert set(list_methods()) <= set(names)
    for name in [*names[:4], "full", "h2o", "snapkv", "tova", "streaming_llm", "expected_attention", "pyramidkv"]:
        made = make(name, 300, 20, 40, **({"summary_max_length": 60} if name == "summarize_and_drop" else {}))
        assert made.name == made.label == name
        assert made.settings["max_seq_len"] == 300


def test_results_under_other_positions_are_filed_apart() -> None:
    assert make("drop_middle", positions="naive").label == "drop_middle+naive"


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("drop_midle", {}, PolicyError, r"Unknown context strategy: drop_midle. Available: \['none', 'drop_all'"),
        (None, {}, PolicyError, "Unknown context strategy: None"),
        ("drop_middle", {"last_kep_len": 9}, PolicyError, "drop_middle has no option 'last_kep_len'; it has: "),
        ("drop_all", {"summary_prompt": "x"}, PolicyError, "drop_all has no option 'summary_prompt'"),
        ("snapkv", {"last_kep_len": 9}, PolicyError, "last_kep_len"),
        ("full", {"window_size": 9}, PolicyError, "window_size"),
        ("drop_middle", {"max_seq_len": 100, "reserved_seq_len": 100}, BudgetError, "leaves nothing"),
        ("drop_middle", {"max_seq_len": 100, "reserved_seq_len": 200}, BudgetError, "leaves nothing"),
        ("drop_all", {"max_seq_len": 0}, PolicyError, "max_seq_len must be a whole number of 1 or more, not 0"),
        ("drop_all", {"max_seq_len": 64.0}, PolicyError, "max_seq_len"),
        ("drop_all", {"reserved_seq_len": True}, PolicyError, "reserved_seq_len"),
        ("drop_middle", {"last_keep_len": -1}, PolicyError, "last_keep_len must be a whole number of 0 or more"),
        ("drop_middle", {"positions": "slots"}, PolicyError, "slot, original, naive"),
        ("drop_middle", {"initial": "user"}, PolicyError, "user_turn, system, first_turn"),
        ("summarize_and_drop", {"summary_max_length": 0}, PolicyError, "summary_max_length"),
        ("summarize_and_drop", {"summary_prompt": ""}, PolicyError, "summary_prompt must be a text"),
        ("summarize_and_drop", {"summary_prompt": {"role": "system"}}, PolicyError, "summary_prompt"),
        ("summarize_and_drop", {"max_seq_len": 600}, BudgetError, "summary_max_length=512"),
    ],
)
def test_what_is_refused(kind: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **options)


def test_a_summary_prompt_may_be_a_message() -> None:
    message = {"role": "system", "content": "say what is done"}
    for given in ("say what is done", message):
        assert make("summarize_and_drop", summary_prompt=given).settings["summary_prompt"] == "say what is done"


def test_room_for_a_reply_and_a_summary() -> None:
    made = SummarizeAndDrop(1000, 100, summary_prompt="summarize", summary_max_length=200)
    assert made.ctxlen_to_reduce <= 1000 - 100 - 200
    longer = SummarizeAndDrop(1000, 100, summary_prompt="总结一下进展" * 5, summary_max_length=200)
    assert longer.ctxlen_to_reduce <= made.ctxlen_to_reduce - 60


def test_settings_that_no_video_could_meet() -> None:
    DropMiddle(100, 20, 30).check(initial=29, frame=20)
    with pytest.raises(BudgetError, match="a frame of 20 tokens behind an initial context of 30 and last_keep_len=30"):
        DropMiddle(100, 20, 30).check(initial=30, frame=20)
    with pytest.raises(
        BudgetError, match=r"a frame of 80 tokens does not fit below 80, which is max_seq_len=100 without"
    ):
        make("drop_all", 100, 20).check(initial=0, frame=80)
    with pytest.raises(BudgetError, match="last_keep_len=30"):
        make("h2o", 100, 20, 30).check(initial=30, frame=20)
    make("full", 100, 20, 30).check(initial=300, frame=200)
    with pytest.raises(BudgetError, match="summary_max_length=50 does not fit below"):
        SummarizeAndDrop(200, 20, summary_max_length=50, summary_prompt="go").check(initial=55, frame=10)


def test_windows_follow_what_is_kept() -> None:
    assert make("snapkv", last_keep_len=8).settings["window_size"] == 4
    assert make("snapkv", last_keep_len=8, window_size=6).settings["window_size"] == 6
    assert make("snapkv", last_keep_len=0).settings["window_size"] == 1


def test_the_initial_context_is_protected_on_request(vlm: VisionLanguageModel) -> None:
    own = {"max_seq_len": 64, "reserved_seq_len": 6, "last_keep_len": 12}
    for protect in (True, False):
        strategy = make("random", **own, protect_initial=protect)
        made = VLMStreamRunner(vlm, context_strategy_type=strategy, max_new_tokens=4)
        with rule(vlm):
            made.run_inference_on_video(video(40))
        assert made.context.compressions > 2
        kept = made.context.cache.kept_positions(0)[0, 0].tolist()
        assert (kept[:6] == list(range(6))) is protect


def test_full_never_reduces(vlm: VisionLanguageModel) -> None:
    made = VLMStreamRunner(vlm, context_strategy_type="full", max_seq_len=20, reserved_seq_len=5, max_new_tokens=9)
    with rule(vlm):
        made.run_inference_on_video(video(12))
    assert (made.context.length, made.context.compressions) == (6 + 12 * 5 - 1, 0)


# ---- one's own


class Alternate(BaseContextStrategy):
    """Keeps the initial context and as many of the last tokens as `share` says."""

    name = "alternate"

    def __init__(self, *args: Any, share: float = 0.5, **options: Any) -> None:
        super().__init__(*args, **options)
        self.share = share
        self.calls: list[dict[str, Any]] = []

    def handle_overflow(self, past_key_values: Any, last_msg: list[int], **context: Any) -> Any:
        self.calls.append({"last_msg": last_msg, **context})
        past_key_values.evict(context["initial"] + int(self.share * self.last_keep_len))
        return past_key_values, last_msg


@pytest.mark.usefixtures("registry")
def test_a_registered_strategy_is_used_by_name(vlm: VisionLanguageModel) -> None:
    register_strategy("alternate", Alternate)
    register_strategy("alternate", Alternate)
    with pytest.raises(PolicyError, match="has no option 'shar'"):
        make("alternate", shar=1)
    options = {"share": 0.25, "max_seq_len": 64, "reserved_seq_len": 6, "last_keep_len": 12}
    made = VLMStreamRunner(vlm, context_strategy_type="alternate", context_strategy_config=options, max_new_tokens=4)
    with rule(vlm):
        out = made.run_inference_on_video(video(30))
    calls = made.strategy.calls  # type: ignore[attr-defined]
    assert made.context.compressions == len(calls) == len(out["prediction"].events) > 1
    assert {one["tokens_after"] for one in out["prediction"].events} == {6 + 3}
    silence = [vlm.format.silence]
    assert all(
        one["last_msg"] == silence and one["initial"] == 6 and one["incoming"] == 5 and callable(one["say"])
        and one["system_prompt"] == "Watch and help" and one["task_knowledge"] == ""
        for one in calls
    )  # fmt: skip


@pytest.mark.usefixtures("registry")
def test_a_strategy_handed_over(vlm: VisionLanguageModel) -> None:
    mine = Alternate(64, 6, 12)
    made = VLMStreamRunner(vlm, context_strategy_type=mine, max_new_tokens=4)
    assert made.strategy is mine
    with pytest.raises(PolicyError, match="leave out max_seq_len"):
        VLMStreamRunner(vlm, context_strategy_type=mine, max_seq_len=64, max_new_tokens=4)


@pytest.mark.usefixtures("registry")
def test_what_cannot_be_registered() -> None:
    for name in ("drop_all", "h2o", "full"):
        with pytest.raises(PolicyError):
            register_strategy(name, Alternate)
    with pytest.raises(PolicyError, match="no class derived from"):
        register_strategy("mine", PolicyStrategy("full"))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="calls itself 'alternate'"):
        register_strategy("mine", Alternate)


@pytest.mark.usefixtures("registry")
def test_a_text_as_what_is_fed_next(vlm: VisionLanguageModel) -> None:
    class Told(BaseContextStrategy):
        name = "told"

        def handle_overflow(self, past_key_values: Any, last_msg: list[int], **context: Any) -> Any:
            return None, "one two"

    made = VLMStreamRunner(vlm, context_strategy_type=Told(64, 6, 12), max_new_tokens=4)
    with rule(vlm) as fed:
        made.run_inference_on_video(video(30))
    starts = [one for one in fed if not one.before][1:]
    assert len(starts) > 1
    assert all(one.ids == [*vlm.encode("one two"), *[vlm.image_token] * 4] for one in starts)
