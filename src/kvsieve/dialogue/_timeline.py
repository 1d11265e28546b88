"""What a timeline shows, for the picture of `timeline` and the page of `page`: marks, verdicts, cache sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .matching import Window, get_window, match
from .metrics import VideoScore
from .predictions import Summary, VideoPrediction
from .records import Utterance
from .similarity import Similarity

__all__ = [
    "LOOKS",
    "Band",
    "Mark",
    "Timeline",
    "captions",
    "make_timeline",
    "one_line",
    "place_labels",
    "shrunk",
    "thumbnails",
]

LOOKS = {
    "matched": ("#009E73", "o", "right time and content"),
    "mismatched": ("#D55E00", "D", "right time, other content"),
    "redundant": ("#CC79A7", "X", "nothing to match"),
    "missed": ("#000000", "s", "nothing was said"),
}
"""Verdicts: colour, marker of matplotlib, and meaning."""
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Mark:
    """Something that was said, or was to be said and was not.

    Attributes:
        time: seconds on the clock of the video.
        text: what was said; of a missed reference, what was to be said.
        verdict: a name of `LOOKS`. A line is `mismatched` if it is not matched but stands in the window of a reference
            that is not matched either, one line to one reference; the references that are left are `missed`. So
            `VideoScore.redundant` and `VideoScore.missed` both count what is mismatched here, too.
        frame: of the stream, where known.
        tokens: in the cache after that frame, where known.
        reference: index in `Timeline.references`; None if redundant.
        delta: seconds by which it comes after its reference; None if redundant or missed.
        similarity: to its reference, in [0, 1]; likewise.
    """

    time: float
    text: str
    verdict: str
    frame: int | None = None
    tokens: int | None = None
    reference: int | None = None
    delta: float | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class Band:
    """The video under one strategy.

    Attributes:
        strategy: its name.
        video: what it was made from.
        score: see `VideoPrediction.score`; None if the video failed, and then the rest is empty.
        marks: in the order of time.
        cache: seconds at which each frame is shown, and tokens in the cache after it; empty if not recorded.
        drops: seconds, tokens before and tokens after every reduction of the cache, in the order of time.
    """

    strategy: str
    video: VideoPrediction
    score: VideoScore | None = None
    marks: tuple[Mark, ...] = ()
    cache: tuple[tuple[float, int], ...] = ()
    drops: tuple[tuple[float, int, int], ...] = ()

    @property
    def counts(self) -> str:
        """How many marks of each verdict."""
        number = {verdict: sum(mark.verdict == verdict for mark in self.marks) for verdict in LOOKS}
        return ", ".join(f"{count} {verdict}" for verdict, count in number.items())

    @property
    def error(self) -> str:
        """Why the video failed; empty if it did not."""
        return "" if self.score else f"failed: {self.video.error or 'the reason was not recorded'}"

    def captions(self) -> tuple[list[tuple[float, list[str]]], list[int]]:
        """What was said, for `place_labels`: times with texts, and the order; what is wrong comes first."""
        said = [one for one in self.marks if one.verdict != "missed"]
        order = sorted(range(len(said)), key=lambda i: (said[i].verdict == "matched", said[i].verdict, -i))
        numbers = [None if one.reference is None else one.reference + 1 for one in said]
        return [(one.time, captions(one.text, n)) for one, n in zip(said, numbers, strict=True)], order


@dataclass(frozen=True)
class Timeline:
    """A video under all strategies.

    Attributes:
        video: one of the predictions, not a failed one if there is another.
        start: seconds at which the first frame is shown.
        begin: the earliest second that anything stands at.
        end: the latest.
        references: in the order of time.
        window: in which a line counts.
        bands: one per strategy.
    """

    video: VideoPrediction
    start: float
    begin: float
    end: float
    references: tuple[Utterance, ...]
    window: Window
    bands: tuple[Band, ...]

    @property
    def about(self) -> str:
        """The video in one line."""
        late, early, count = -self.window.earliest, self.window.latest, len(self.references)
        return (
            f"{self.video.frames:,} frames at {self.video.fps:g} per second, {count} reference{'s' * (count != 1)}; a "
            f"line counts up to {early:g} s before and {late:g} s after its reference"
        )

    def tops(self, max_seq_len: int | None = None) -> list[int]:
        """The highest number of tokens on the axis of each band: the same for all, except where a band needs more than
        three times what another one does."""
        peaks = [
            max([max_seq_len or 0, *(n for _, n in band.cache), *(n for _, n, _ in band.drops)]) for band in self.bands
        ]
        known = [peak for peak in peaks if peak] or [1]
        shared = max(peak for peak in known if peak <= 3 * min(known))
        return [max(peak, shared) for peak in peaks]

    def windows(self) -> list[tuple[float, float]]:
        """Where a line counts: first and last second of every stretch."""
        joined: list[tuple[float, float]] = []
        for one in self.references:
            first, last = one.time - self.window.latest, one.time - self.window.earliest
            if joined and first < joined[-1][1]:
                first = joined.pop()[0]
            joined.append((first, last))
        return joined


def make_timeline(
    videos: Mapping[str, VideoPrediction],
    *,
    window: str | float | Sequence[float] | Window = "auto",
    similarity: str | Similarity = "token_f1",
    threshold: float = 0.5,
) -> Timeline:
    """Marks, cache sizes and verdicts of one video under several strategies.

    Args:
        videos: by strategy, the same video's prediction.
        window: see `VideoPrediction.score`.
        similarity: likewise.
        threshold: likewise.

    Raises:
        DataError: no video, or not the same one: key and frames per second differ, or, where the video did not fail,
            frames or references.
        PolicyError, ScoreError: see `match`.
    """
    first = _same(videos)
    start = _start(first, list(videos.values()))
    wanted = first.references
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].time, wanted[i].text, i))
    ranks = {i: rank for rank, i in enumerate(order)}
    reach = get_window(window, first.dataset)
    bands: list[Band] = []
    for name, video in videos.items():
        if video.status != "ok":
            bands.append(Band(name, video))
            continue
        score = video.score(window=reach, similarity=similarity, threshold=threshold)
        marks = _marks(video, score, reach, similarity, ranks)
        cache = tuple((start + i / first.fps, tokens) for i, tokens in enumerate(video.cache_tokens))
        bands.append(Band(name, video, score, marks, cache, _drops(video, start)))
    times = [start, *(one.time for one in wanted)]
    for band in bands:
        times += [one.time for one in band.marks] + [row[0] for row in (*band.cache, *band.drops)]
    end = max(start + max(first.frames, 1) / first.fps, *times)
    return Timeline(first, start, min(times), end, tuple(wanted[i] for i in order), reach, tuple(bands))


def _same(videos: Mapping[str, VideoPrediction]) -> VideoPrediction:
    """The prediction that says what the video is, after checking that all are about one."""
    if not videos:
        raise DataError("no video was given; pass at least one prediction by the name of its strategy")
    name = next((name for name, video in videos.items() if video.status == "ok"), next(iter(videos)))
    first = videos[name]
    if first.fps <= 0:
        raise DataError(f"video {first.key!r}: fps must be above 0, not {first.fps:g}")
    for other, video in videos.items():
        for field in ("key", "fps", "frames", "references") if video.status == "ok" else ("key", "fps"):
            ours, theirs = getattr(first, field), getattr(video, field)
            if ours != theirs:
                differ = "references differ" if field == "references" else f"{field} is {ours!r} and {theirs!r}"
                raise DataError(f"{name} and {other} are not about the same video: {differ}")
    return first


def _start(first: VideoPrediction, videos: Sequence[VideoPrediction]) -> float:
    """Seconds at which the first frame is shown: of a clip that was cut out of a longer video, not 0."""
    said: list[Utterance | Summary] = []
    for video in videos:
        said += [*video.spoken, *video.summaries]
    # A reference lies anywhere within its frame, what was said at the time of its frame.
    known = said or list(first.references)
    before = median_low([one.time * first.fps - one.frame for one in known if one.frame is not None] or [0.0])
    return max(0, math.floor(before + 1e-6)) / first.fps


def _marks(
    video: VideoPrediction, score: VideoScore, window: Window, similarity: str | Similarity, ranks: Mapping[int, int]
) -> tuple[Mark, ...]:
    spoken, wanted, found = video.spoken, video.references, score.matching
    sizes = dict(enumerate(video.cache_tokens))
    said, left = [spoken[i] for i in found.redundant], [wanted[j] for j in found.missed]
    # Among what is left, time alone decides; with a threshold of 0 the text that is more alike is still preferred.
    near = match(said, left, window=window, similarity=similarity, threshold=0)

    def mark(one: Utterance, verdict: str, reference: int | None, *numbers: float) -> Mark:
        tokens = None if one.frame is None else sizes.get(one.frame)
        return Mark(
            one.time, one.text, verdict, one.frame, tokens, None if reference is None else ranks[reference], *numbers
        )

    marks = [mark(spoken[p.spoken], "matched", p.reference, p.delta, p.similarity) for p in found.pairs]
    for p in near.pairs:
        marks.append(mark(said[p.spoken], "mismatched", found.missed[p.reference], p.delta, p.similarity))
    marks += [mark(said[i], "redundant", None) for i in near.redundant]
    marks += [mark(left[j], "missed", found.missed[j]) for j in near.missed]
    return tuple(sorted(marks, key=lambda one: (one.time, one.verdict, one.text)))


def _drops(video: VideoPrediction, start: float) -> tuple[tuple[float, int, int], ...]:
    """Events with all the numbers that a reduction has."""
    drops: list[tuple[float, int, int]] = []
    for event in video.events:
        time, frame = event.get("timestamp_in_stream"), event.get("frame_idx_in_stream")
        time = start + frame / video.fps if time is None and isinstance(frame, int) else time
        before, after = event.get("tokens_before"), event.get("tokens_after")
        if isinstance(time, (int, float)) and isinstance(before, int) and isinstance(after, int):
            drops.append((float(time), before, after))
    return tuple(sorted(drops))


def one_line(text: str, most: int = 10**6) -> str:
    """A text without line breaks and other things that cannot be drawn, cut where it is longer than `most`."""
    words = "".join("\ufffd" if category(one) in ("Cc", "Cs") else one for one in " ".join(text.split()))
    return words if len(words) <= most else words[: most - 1].rstrip() + "\u2026"


def captions(text: str, number: int | None = None) -> list[str]:
    """Ways to write a text on one line, the longest first; the last is the number of its reference, if it has one."""
    words, head = one_line(text), "" if number is None else f"{number}: "
    texts = [head + words] if len(words) <= 72 else []
    texts += [head + one_line(words, most) for most in (72, 44, 34, 26, 18) if len(words) > most]
    return texts + ([] if number is None else [str(number)])


def place_labels(
    items: Sequence[tuple[float, Sequence[str]]],
    order: Sequence[int],
    lanes: int,
    width: float,
    measure: Callable[[str], float],
    gap: float,
) -> dict[int, tuple[str, float, int]]:
    """Where texts can stand without lying on one another, or on the stem between a text and its mark.

    Args:
        items: where each mark stands, from 0 to `width`, and the texts it may have, best first.
        order: which items come first where room is short.
        lanes: how many there are above one another.
        width: of the whole row.
        measure: width of a text in the same unit.
        gap: least distance between two texts.

    Returns:
        By item: its text, where it begins, and its lane, 0 for the lowest. Items without room are left out.
    """
    tries = [_place(items, order, lanes, width, measure, gap, high) for high in (False, True)]
    return max(tries, key=lambda placed: (len(placed), sum(len(text) for text, *_ in placed.values())))


def _place(
    items: Sequence[tuple[float, Sequence[str]]],
    order: Sequence[int],
    lanes: int,
    width: float,
    measure: Callable[[str], float],
    gap: float,
    high: bool,
) -> dict[int, tuple[str, float, int]]:
    """`high`: whether texts that the right edge pushes over other marks go as high as they can, or as low."""
    taken: list[list[tuple[float, float]]] = [[] for _ in range(lanes)]

    def free(lane: int, left: float, right: float) -> bool:
        return all(right + gap <= a or b + gap <= left for a, b in taken[lane])

    placed: dict[int, tuple[str, float, int]] = {}
    for item in order:
        at, texts = items[item]
        for text, lane in ((text, lane) for text in texts for lane in range(lanes)):
            long = measure(text)
            if high and at + long > width:
                lane = lanes - 1 - lane
            left = max(0.0, min(at, width - long))
            if long <= width and free(lane, left, left + long) and all(free(low, at, at) for low in range(lane)):
                for low in range(lane):
                    taken[low].append((at, at))
                taken[lane].append((left, left + long))
                placed[item] = text, left, lane
                break
    return placed


def thumbnails(
    timeline: Timeline, frames: Sequence[Picture], room: float, height: float
) -> list[tuple[float, float, Picture]]:
    """Frames evenly chosen, each at its time: first and last second that it covers on the strip, and the frame.

    Args:
        timeline: says when frames are shown.
        frames: `[H, W, 3]` each, of one size.
        room: how long a second is.
        height: of the strip, in the same unit.

    Raises:
        DataError: no frame, or none of this shape and type.
    """
    first = np.asarray(frames[0] if len(frames) else ())
    if first.ndim != 3 or first.shape[2] != 3 or first.dtype != np.uint8:
        raise DataError(f"frames must be uint8 [height, width, 3], not {first.dtype} {list(first.shape)}")
    wide, fps = height * first.shape[1] / first.shape[0] / room, timeline.video.fps
    seconds = len(frames) / fps
    count = max(1, min(len(frames), int(seconds / (1.05 * wide))))
    middles = [(i + 0.5) * seconds / count for i in range(count)]
    starts = [timeline.start + middle - wide / 2 for middle in middles]
    return [(at, at + wide, frames[int(middle * fps)]) for at, middle in zip(starts, middles, strict=True)]


def shrunk(picture: Picture, height: int) -> Picture:
    """A picture of at most about twice this height: the mean of every block of pixels."""
    block = max(1, min(len(picture) // height, picture.shape[1]))
    rows, columns = (size // block for size in picture.shape[:2])
    blocks = picture[: rows * block, : columns * block].reshape(rows, block, columns, block, 3)
    return np.asarray(blocks.mean((1, 3)).round(), np.uint8)
