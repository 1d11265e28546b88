"""What must be true of every score, whatever was said."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsieve.dialogue import (
    Difference,
    Interval,
    RunnerNumbers,
    Utterance,
    VideoScore,
    Window,
    difference,
    match,
    metrics_table,
    parse_record,
    pool,
    score_video,
)
from kvsieve.errors import DataError, PolicyError

WORDS = ("red wheel", "blue wheel", "axle", "turn it over now")
DOCUMENTED = [
    "frames_processed", "dialogues_generated", "dialogues_matched", "precision", "recall", "f1", "cache_compressions",
    "avg_cache_size", "time_per_frame", "peak_memory_mb",
]  # fmt: skip

utterances = st.lists(
    st.builds(lambda frame, text: Utterance(frame / 2, text, frame), st.integers(0, 39), st.sampled_from(WORDS)),
    max_size=8,
)
windows = st.builds(Window, st.floats(-4, 0), st.floats(0, 4))
names = st.sampled_from(["exact", "token_f1"])


def plain(score: VideoScore) -> tuple[object, ...]:
    """All of a score but the indices of its pairs."""
    return tuple(getattr(score, name) for name in VideoScore.__dataclass_fields__ if name != "matching")


@given(utterances, windows, names)
@settings(max_examples=100, deadline=None)
def test_an_oracle_scores_exactly_one(references: list[Utterance], window: Window, similarity: str) -> None:
    score = score_video(references, references, frames=40, window=window, similarity=similarity, threshold=1.0)
    assert score.matched == score.timed == len(references)
    assert score.missed == score.redundant == 0
    rates = score.rates()
    whole = 1.0 if references else None
    for name in ("precision", "recall", "f1", "timing_precision", "timing_recall", "timing_f1", "similarity"):
        assert rates[name] == whole, name
    assert rates["time_difference"] == rates["lateness"] == (0.0 if references else None)
    assert rates["silence_accuracy"] == 1.0


@given(utterances.filter(len), windows)
@settings(max_examples=50, deadline=None)
def test_silence_scores_exactly_nothing(references: list[Utterance], window: Window) -> None:
    score = score_video([], references, frames=40, window=window)
    rates = score.rates()
    assert score.missed == len(references)
    assert rates["f1"] == rates["timing_f1"] == rates["precision"] == rates["recall"] == rates["speak_rate"] == 0.0
    assert rates["silence_accuracy"] == 1.0
    assert rates["time_difference"] is rates["similarity"] is None


@given(utterances, utterances, windows, names, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_order_does_not_matter(
    spoken: list[Utterance], references: list[Utterance], window: Window, similarity: str, order: random.Random
) -> None:
    before = score_video(spoken, references, frames=40, window=window, similarity=similarity)
    spoken, references = order.sample(spoken, len(spoken)), order.sample(references, len(references))
    assert plain(score_video(spoken, references, frames=40, window=window, similarity=similarity)) == plain(before)


@given(utterances, utterances.filter(len), windows, names, st.data())
@settings(max_examples=150, deadline=None)
def test_one_more_right_line_never_lowers_recall(
    spoken: list[Utterance], references: list[Utterance], window: Window, similarity: str, data: st.DataObject
) -> None:
    before = score_video(spoken, references, window=window, similarity=similarity)
    more = [*spoken, data.draw(st.sampled_from(references))]
    after = score_video(more, references, window=window, similarity=similarity)
    assert before.matched <= after.matched <= before.matched + 1
    assert before.timed <= after.timed <= before.timed + 1
    if before.missed and not before.spoken:
        assert after.matched == 1


@given(utterances, utterances, windows, names, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_bounds(
    spoken: list[Utterance], references: list[Utterance], window: Window, similarity: str, threshold: float
) -> None:
    score = score_video(spoken, references, frames=40, window=window, similarity=similarity, threshold=threshold)
    assert 0 <= score.matched <= score.timed <= min(len(spoken), len(references))
    assert score.matched + score.missed == len(references)
    assert score.matched + score.redundant == len(spoken)
    matching = score.matching
    assert sorted([pair.reference for pair in matching.pairs] + list(matching.missed)) == [*range(len(references))]
    assert sorted([pair.spoken for pair in matching.pairs] + list(matching.redundant)) == [*range(len(spoken))]
    for name, rate in score.rates().items():
        if rate is not None and name not in ("time_difference", "lateness"):
            assert 0.0 <= rate <= 1.0, name
    rates = score.rates()
    if rates["precision"] and rates["recall"]:
        harmonic = 2 / (1 / rates["precision"] + 1 / rates["recall"])
        assert rates["f1"] == pytest.approx(harmonic)
    assert score.off <= score.matched * (window.reach + 1e-5)


@given(st.integers(1, 8), st.floats(0.5, 4), st.booleans(), st.floats(0.01, 50))
@settings(max_examples=50, deadline=None)
def test_a_shift_by_more_than_the_window_finds_nothing(count: int, reach: float, late: bool, beyond: float) -> None:
    references = [Utterance(3.0 * i, f"line {i}") for i in range(count)]
    shift = (reach + beyond) * (1 if late else -1)
    spoken = [Utterance(one.time + shift, one.text) for one in references]
    window = Window(-reach, reach)
    assert score_video(spoken, references, window=window, similarity="exact").rates()["f1"] == 0.0
    inside = [Utterance(one.time + math.copysign(reach / 2, shift), one.text) for one in references]
    rates = score_video(inside, references, window=window, similarity="exact").rates()
    assert rates["f1"] == 1.0
    assert rates["time_difference"] == pytest.approx(reach / 2)
    assert rates["lateness"] == pytest.approx(math.copysign(reach / 2, shift))


@given(utterances, utterances, windows)
@settings(max_examples=60, deadline=None)
def test_as_many_pairs_as_there_can_be(spoken: list[Utterance], references: list[Utterance], window: Window) -> None:
    allowed = [
        [
            window.holds(wanted.time - said.time) and said.text == wanted.text
            for said in spoken
        ]
        for wanted in references
    ]  # fmt: skip

    def augment(row: int, seen: set[int], of: dict[int, int]) -> bool:
        for column, good in enumerate(allowed[row]):
            if good and column not in seen:
                seen.add(column)
                if column not in of or augment(of[column], seen, of):
                    of[column] = row
                    return True
        return False

    of: dict[int, int] = {}
    most = sum(augment(row, set(), of) for row in range(len(references)))
    assert len(match(spoken, references, window=window, similarity="exact").pairs) == most


def test_timing_beside_content() -> None:
    references = [Utterance(2.0, "take the red wheel", 4), Utterance(8.0, "take the axle", 16)]
    spoken = [Utterance(2.5, "take the blue wheel", 5), Utterance(8.0, "take the axle", 16), Utterance(9.0, "hm", 18)]
    rates = score_video(spoken, references, frames=20, similarity="exact").rates()
    assert (rates["precision"], rates["recall"], rates["f1"]) == (1 / 3, 1 / 2, 2 / 5)
    assert (rates["timing_precision"], rates["timing_recall"], rates["timing_f1"]) == (2 / 3, 1.0, 4 / 5)
    assert rates["silence_accuracy"] == 16 / 18, "two of the frames with nothing to say were spoken at"
    assert rates["speak_rate"] == 3 / 20


def test_silence_needs_frames() -> None:
    line = [Utterance(1.0, "x", 2)]
    assert score_video(line, line).rates()["silence_accuracy"] is None
    nowhere = [Utterance(1.0, "x")]
    assert score_video(line, nowhere, frames=4).rates()["silence_accuracy"] is None
    assert score_video(line, nowhere, frames=4).rates()["speak_rate"] == 0.25
    assert score_video(nowhere, line, frames=4).rates()["speak_rate"] is None
    assert score_video(line, line, frames=1_000).rates()["silence_accuracy"] == 1.0
    assert score_video([], line, frames=2).rates()["silence_accuracy"] == 1.0, "a reference after the end"
    with pytest.raises(DataError, match="2 frames, but something is said at frame 2"):
        score_video(line, line, frames=2)
    with pytest.raises(DataError, match="frames must be 1 or more"):
        score_video(line, line, frames=0)


def some_scores(count: int, seed: int = 1) -> list[VideoScore]:
    draw = random.Random(seed)
    out = []
    for i in range(count):
        references = [Utterance(5.0 * k, f"step {k}", 10 * k) for k in range(6)]
        spoken = [one for one in references if draw.random() < 0.7]
        out.append(score_video(spoken, references, video_id=f"v{i}", frames=60, similarity="exact"))
    return out


def test_pooled_rates_are_rates_of_sums() -> None:
    scores = some_scores(5)
    pooled = pool(scores)
    matched = sum(score.matched for score in scores)
    assert pooled.videos == 5
    assert pooled.counts["references"] == 30
    assert pooled.rates["recall"] == matched / 30
    assert pooled.rates["precision"] == 1.0
    assert pooled.rates["f1"] == 2 * matched / (matched + 30)
    one = pool(scores[:1])
    assert one.rates == scores[0].rates()
    assert set(one.intervals.values()) == {None}, "one video has no spread"


def test_intervals_are_seeded_and_hold_the_rate() -> None:
    scores = some_scores(8)
    first, again, other = (pool(scores, seed=seed, resamples=101) for seed in (3, 3, 4))
    assert first == again
    assert first.rates == other.rates
    assert first.intervals != other.intervals
    for name, interval in first.intervals.items():
        rate = first.rates[name]
        assert interval is not None
        assert rate is not None
        assert interval.low <= rate <= interval.high, name
    assert first.intervals["precision"] == Interval(1.0, 1.0)
    wide, narrow = pool(scores, confidence=0.99).intervals["f1"], pool(scores, confidence=0.5).intervals["f1"]
    assert wide is not None
    assert narrow is not None
    assert wide.high - wide.low > narrow.high - narrow.low > 0


def test_intervals_cover_about_what_they_say() -> None:
    truth, hits = 0.7, 0
    for seed in range(60):
        interval = pool(some_scores(20, seed), resamples=300, confidence=0.9).intervals["recall"]
        assert interval is not None
        hits += interval.low <= truth <= interval.high
    assert 46 <= hits <= 59


def test_rates_that_some_videos_lack() -> None:
    line = [Utterance(1.0, "x", 2)]
    scores = [score_video(line if i == 0 else [], line, video_id=str(i), frames=4) for i in range(4)]
    pooled = pool(scores)
    assert pooled.rates["time_difference"] == 0.0
    assert pooled.intervals["time_difference"] == Interval(0.0, 0.0)
    nothing = pool([score_video([], [], video_id=str(i), frames=4) for i in range(4)])
    assert nothing.rates["f1"] is nothing.intervals["f1"] is None
    assert nothing.rates["silence_accuracy"] == 1.0


def test_strategies_are_compared_video_by_video() -> None:
    """How hard a video is drops out: a strategy that is always one line worse is worse for sure."""
    better, worse = [], []
    for i in range(12):
        references = [Utterance(5.0 * k, f"step {k}", 10 * k) for k in range(10)]
        found = 2 + i % 8
        for scores, count in ((better, found), (worse, found - 1)):
            scores.append(score_video(references[:count], references, video_id=f"v{i}", frames=100))
    apart = [pool(scores).intervals["recall"] for scores in (better, worse)]
    assert apart[0] is not None
    assert apart[1] is not None
    assert apart[1].high > apart[0].low, "two intervals overlap"
    found_apart = difference(worse[::-1], better)["recall"]
    assert found_apart.value == pytest.approx(-0.1)
    assert found_apart.interval is not None
    assert found_apart.interval.low == pytest.approx(found_apart.interval.high) == pytest.approx(-0.1)
    assert difference(better, better)["f1"] == Difference(0.0, Interval(0.0, 0.0))
    assert difference(better[:2], worse[:2])["f1"].interval is None
    silent = [score_video([], [Utterance(1.0, "x")], video_id=f"v{i}", frames=100) for i in range(12)]
    assert difference(silent, better)["time_difference"] == Difference(None, None)


def test_comparing_refuses_other_videos() -> None:
    scores = some_scores(4)
    with pytest.raises(DataError, match="not the same videos: v3"):
        difference(scores[:3], scores)
    with pytest.raises(DataError, match="occurs twice"):
        difference([*scores[:3], scores[0]], scores)
    with pytest.raises(DataError, match="no video"):
        difference([], [])


def test_pooling_refuses() -> None:
    with pytest.raises(DataError, match="no video"):
        pool([])
    for arguments in ({"confidence": 1.0}, {"confidence": 0}, {"resamples": 0}):
        with pytest.raises(PolicyError):
            pool(some_scores(3), **arguments)


def test_the_metrics_file_has_the_documented_fields_first() -> None:
    runner = RunnerNumbers(3, 101.5, 0.02, None, 4096, {"summaries": 2})
    table = metrics_table(some_scores(4), runner, settings={"window": [-2.5, 2.5]})
    assert list(table)[: len(DOCUMENTED)] == DOCUMENTED
    assert (table["cache_compressions"], table["avg_cache_size"], table["time_per_frame"]) == (3, 101.5, 0.02)
    assert (table["peak_memory_mb"], table["cache_bytes"], table["summaries"]) == (None, 4096, 2)
    assert table["frames_processed"] == 240
    assert table["dialogues_matched"] + table["dialogues_missed"] == table["dialogues_reference"] == 24
    assert table["dialogues_generated"] == table["dialogues_matched"] + table["dialogues_redundant"]
    assert {"timing_f1", "time_difference", "silence_accuracy", "speak_rate", "similarity"} < set(table)
    assert len(table["intervals"]["f1"]) == 2
    assert [row["video_id"] for row in table["per_video"]] == ["v0", "v1", "v2", "v3"]
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert metrics_table(some_scores(1))["cache_compressions"] is None
    with pytest.raises(DataError, match="'f1' already"):
        metrics_table(some_scores(1), RunnerNumbers(extra={"f1": 1.0}))


def test_an_oracle_at_the_frames_of_a_record() -> None:
    """Lines said at the frame that the record names, as a stream that never looks ahead can say them."""
    lines = [(0.4, "one"), (7.9, "two"), (9.6, "three"), (30.0, "four")]
    record = parse_record(
        {
            "video_id": "v",
            "fps": 2,
            "frames": ["x"] * 80,
            "conversation": [{"from": "assistant", "timestamp": time, "value": text} for time, text in lines],
        }
    )
    spoken = [Utterance(record.time_of(one.frame or 0), one.text, one.frame) for one in record.references]
    rates = score_video(spoken, record.references, frames=80, similarity="exact").rates()
    assert rates["f1"] == rates["timing_f1"] == rates["silence_accuracy"] == 1.0
    assert rates["time_difference"] is not None
    assert 0 < rates["time_difference"] < 0.5, "less than a frame"
