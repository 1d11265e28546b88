"""How well a stream was accompanied: what was said against what was to be said, per video and over all videos.

Counts are lines, times seconds. A line is *matched* if it answers a reference inside the window with a text that is
similar enough; `timing` numbers count any line inside the window, whatever it says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, PolicyError
from .matching import UNIFORM, Matching, Window, match
from .records import Utterance
from .similarity import Similarity

__all__ = ["Difference", "Interval", "PooledScore", "VideoScore", "difference", "pool", "score_video"]

LEAST_VIDEOS = 3
"""Videos that an interval needs."""
RESAMPLES = 2000

Counts = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class VideoScore:
    """Counts of one video; rates follow from them.

    Attributes:
        video_id: its name.
        frames: frames of the stream, 0 where not known.
        spoken: lines said.
        references: lines to be said.
        matched: pairs that agree in time and content.
        timed: pairs that agree in time; found on their own, so never fewer than `matched`.
        off: sum over matched pairs of the seconds between said and to be said.
        late: the same sum with a sign, above 0 if lines came late.
        similarity: sum over matched pairs of how alike the texts are.
        silent: frames at which nothing was to be said, or None where frames are not known.
        kept_silent: those of them at which nothing was said.
        spoken_frames: frames at which something was said.
        matching: who answers whom.
    """

    video_id: str
    frames: int
    spoken: int
    references: int
    matched: int
    timed: int
    off: float
    late: float
    similarity: float
    silent: int | None
    kept_silent: int | None
    spoken_frames: int | None
    matching: Matching

    @property
    def missed(self) -> int:
        """References that nothing answered."""
        return self.references - self.matched

    @property
    def redundant(self) -> int:
        """Lines said that answer nothing: at the wrong time, with the wrong content, or once too often."""
        return self.spoken - self.matched

    def rates(self) -> dict[str, float | None]:
        """The numbers of `PooledScore.rates` for this video alone."""
        return _rates(_counts(self))


@dataclass(frozen=True)
class Interval:
    """The ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One pooled rate minus another, and its interval; `None` where they cannot be measured."""

    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class PooledScore:
    """All videos together: rates of summed counts, so long videos weigh more.

    Attributes:
        videos: how many.
        counts: `frames`, `spoken`, `references`, `matched`, `missed`, `redundant`, `timed`.
        rates: see `pool`.
        intervals: by the same names; `None` where videos are too few or the rate cannot be measured.
        confidence: share that the intervals cover.
    """

    videos: int
    counts: dict[str, int]
    rates: dict[str, float | None]
    intervals: dict[str, Interval | None]
    confidence: float


def score_video(
    spoken: Sequence[Utterance],
    references: Sequence[Utterance],
    *,
    video_id: str = "",
    frames: int | None = None,
    window: Window = UNIFORM,
    similarity: str | Similarity = "token_f1",
    threshold: float = 0.5,
) -> VideoScore:
    """Score one video.

    Args:
        spoken: what was said, with the frame of each line where silence is to be scored.
        references: what was to be said, likewise; see `VideoRecord.references`. Those after the end of the stream
            can only be missed.
        video_id: its name.
        frames: how many frames the stream had; by default not known, then silence is not scored.
        window: where the reference for a spoken line may lie, see `get_window`.
        similarity: a name or a function, see `match`.
        threshold: least similarity of lines that agree.

    Raises:
        DataError: something is said at a frame outside the stream, or the stream has no frames.
        PolicyError, ScoreError: see `match`.
    """
    content = match(spoken, references, window=window, similarity=similarity, threshold=threshold)
    timing = match(spoken, references, window=window, similarity=_alike)
    silent = kept = speaking = None
    if frames is not None:
        if frames < 1:
            raise DataError(f"video {video_id!r}: frames must be 1 or more, not {frames}")
        said, wanted = _frames_of(spoken), _frames_of(references)
        if said is not None:
            outside = [frame for frame in said if not 0 <= frame < frames]
            if outside:
                raise DataError(f"video {video_id!r} has {frames} frames, but something is said at frame {outside[0]}")
            speaking = len(said)
            if wanted is not None:
                wanted = {frame for frame in wanted if frame < frames}
                silent = frames - len(wanted)
                kept = silent - len(said - wanted)
    return VideoScore(
        video_id=video_id,
        frames=frames or 0,
        spoken=len(spoken),
        references=len(references),
        matched=len(content.pairs),
        timed=len(timing.pairs),
        off=math.fsum(abs(pair.delta) for pair in content.pairs),
        late=math.fsum(pair.delta for pair in content.pairs),
        similarity=math.fsum(pair.similarity for pair in content.pairs),
        silent=silent,
        kept_silent=kept,
        spoken_frames=speaking,
        matching=content,
    )


def pool(
    scores: Sequence[VideoScore], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> PooledScore:
    """Rates over all videos, with intervals from a bootstrap over videos.

    Videos are drawn with replacement and the pooled rates taken anew, `resamples` times; an interval runs between the
    quantiles that leave out `1 - confidence` in equal parts. It needs three videos. A resample in which a rate cannot
    be measured is left out of its interval.

    The rates: `precision` matched / spoken, `recall` matched / references, `f1` 2 matched / (spoken + references),
    `timing_precision`, `timing_recall` and `timing_f1` the same with `timed`, `time_difference` mean seconds between
    the two lines of a matched pair, `lateness` the same with its sign, `similarity` mean over matched pairs,
    `silence_accuracy` share of the frames with nothing to say at which nothing was said, `speak_rate` share of frames
    at which something was said. Where nothing was to be said and nothing was said, precision, recall and F1 cannot be
    measured and are `None`; where only one side is empty, they are 0.

    Args:
        scores: one per video, at least one; each video once.
        confidence: share that the intervals cover.
        resamples: draws.
        seed: the same seed gives the same intervals.

    Raises:
        DataError: no videos.
        PolicyError: confidence not between 0 and 1, or no resamples.
    """
    per_video = _table(scores)
    rates = _rates(per_video.sum(0))
    intervals: dict[str, Interval | None] = dict.fromkeys(rates)
    resampled = [_rates(counts) for counts in _draws(len(scores), confidence, resamples, seed) @ per_video]
    for name, rate in rates.items():
        if rate is not None:
            intervals[name] = _interval([one[name] for one in resampled], confidence)
    return PooledScore(
        videos=len(scores),
        counts={
            name: sum(getattr(score, name) for score in scores)
            for name in ("frames", "spoken", "references", "matched", "missed", "redundant", "timed")
        },
        rates=rates,
        intervals=intervals,
        confidence=confidence,
    )


def difference(
    scores: Sequence[VideoScore],
    baseline: Sequence[VideoScore],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """How much higher the pooled rates of one strategy are than those of another over the same videos.

    Videos are drawn as in `pool`, the same ones for both, so how hard a video is drops out: two strategies can differ
    for sure although their own intervals overlap.

    Args:
        scores: one per video, in any order.
        baseline: the same videos, by `video_id`.
        confidence: share that the intervals cover.
        resamples: draws.
        seed: the same seed gives the same intervals.

    Returns:
        By the names of `pool`.

    Raises:
        DataError: no videos, other videos, or a video twice.
        PolicyError: as in `pool`.
    """
    ours, theirs = _by_video(scores), _by_video(baseline)
    if ours.keys() != theirs.keys():
        raise DataError(f"not the same videos: {', '.join(sorted(ours.keys() ^ theirs.keys()))} on one side only")
    both = [_table([side[name] for name in sorted(ours)]) for side in (ours, theirs)]
    draws = _draws(len(ours), confidence, resamples, seed)
    first, second = (_rates(table.sum(0)) for table in both)
    drawn = [(_rates(draw @ both[0]), _rates(draw @ both[1])) for draw in draws]
    out: dict[str, Difference] = {}
    for name in first:
        value = _minus(first[name], second[name])
        gaps = [_minus(one[name], other[name]) for one, other in drawn]
        out[name] = Difference(value, None if value is None else _interval(gaps, confidence))
    return out


def _by_video(scores: Sequence[VideoScore]) -> dict[str, VideoScore]:
    out: dict[str, VideoScore] = {}
    for score in scores:
        if score.video_id in out:
            raise DataError(f"video {score.video_id!r} occurs twice")
        out[score.video_id] = score
    return out


def _table(scores: Sequence[VideoScore]) -> Counts:
    """One row of counts per video."""
    if not scores:
        raise DataError("there is no video to score")
    return np.array([_counts(score) for score in scores], dtype=float)


def _draws(videos: int, confidence: float, resamples: int, seed: int) -> Counts:
    """How often each resample, a row, holds each video; no rows if videos are too few."""
    if not 0 < confidence < 1:
        raise PolicyError(f"confidence must be between 0 and 1, not {confidence}")
    if resamples < 1:
        raise PolicyError(f"resamples must be 1 or more, not {resamples}")
    if videos < LEAST_VIDEOS:
        return np.empty((0, videos))
    return np.random.default_rng(seed).multinomial(videos, [1 / videos] * videos, size=resamples).astype(float)


def _interval(values: Sequence[float | None], confidence: float) -> Interval | None:
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.array(measured), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _counts(score: VideoScore) -> list[float]:
    """What rates are made of, in the order `_rates` takes it; frames that are not known count nowhere."""
    speaking = score.spoken_frames
    return [
        score.spoken,
        score.references,
        score.matched,
        score.timed,
        score.off,
        score.late,
        score.similarity,
        score.silent or 0,
        score.kept_silent or 0,
        0 if speaking is None else score.frames,
        speaking or 0,
    ]


def _rates(counts: Sequence[float] | Counts) -> dict[str, float | None]:
    spoken, references, matched, timed, off, late, similarity, silent, kept, frames, speaking = map(float, counts)
    return {
        **_f1(matched, spoken, references),
        **{f"timing_{name}": rate for name, rate in _f1(timed, spoken, references).items()},
        "time_difference": off / matched if matched else None,
        "lateness": late / matched if matched else None,
        "similarity": similarity / matched if matched else None,
        "silence_accuracy": kept / silent if silent else None,
        "speak_rate": speaking / frames if frames else None,
    }


def _f1(agreed: float, spoken: float, references: float) -> dict[str, float | None]:
    """Precision, recall and F1 of counts."""
    if not spoken and not references:
        return {"precision": None, "recall": None, "f1": None}
    return {
        "precision": agreed / spoken if spoken else 0.0,
        "recall": agreed / references if references else 0.0,
        "f1": 2 * agreed / (spoken + references),
    }


def _frames_of(utterances: Sequence[Utterance]) -> set[int] | None:
    """The frames at which something is said; `None` if that is not known of all."""
    frames = {one.frame for one in utterances}
    return None if None in frames else {frame for frame in frames if frame is not None}


def _alike(said: str, wanted: str) -> float:
    return 1.0
