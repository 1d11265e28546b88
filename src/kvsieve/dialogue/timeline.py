"""The picture of one video under one or several strategies: what was said, what it was worth, the size of the cache.

It needs matplotlib (the extra `plot`). Colours are those of Okabe and Ito, told apart also by shape.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import DataError, KvsieveError
from ._timeline import (
    LOOKS,
    Band,
    Mark,
    Picture,
    Timeline,
    captions,
    make_timeline,
    one_line,
    place_labels,
    thumbnails,
)
from .matching import Window
from .predictions import VideoPrediction
from .results import save
from .similarity import Similarity

__all__ = [
    "LOOKS",
    "Band",
    "Mark",
    "Timeline",
    "captions",
    "draw_timeline",
    "make_timeline",
    "place_labels",
    "thumbnails",
]


def draw_timeline(
    videos: Mapping[str, VideoPrediction],
    file: str | Path,
    *,
    frames: Sequence[Picture] | None = None,
    max_seq_len: int | None = None,
    window: str | float | Sequence[float] | Window = "auto",
    similarity: str | Similarity = "token_f1",
    threshold: float = 0.5,
) -> Path:
    """Draw one video under one or several strategies, and return where the picture is.

    From above: frames, reference lines, and per strategy what was said, by verdict, and the tokens in the cache. Shaded
    is where a line counts. Texts without room are left out; references that are not written in full stand below.

    Args:
        videos: by strategy, the same video's prediction.
        file: `.png` or `.svg`; missing folders are made.
        frames: of the stream, `[H, W, 3]` each, for the strip.
        max_seq_len: tokens that the cache may hold, drawn as a line.
        window: see `VideoPrediction.score`.
        similarity: likewise.
        threshold: likewise.

    Raises:
        DataError: see `make_timeline` and `thumbnails`, or another kind of file.
        KvsieveError: matplotlib is not installed.
        PolicyError, ScoreError: see `match`.
    """
    kind = Path(file).suffix.lower()
    if kind not in (".png", ".svg"):
        raise DataError(f"{file}: a timeline is drawn as .png or .svg")
    timeline = make_timeline(videos, window=window, similarity=similarity, threshold=threshold)
    try:
        import matplotlib
    except ImportError as error:
        raise KvsieveError("plots need matplotlib, which is not installed: pip install 'kvsieve[plot]'") from error
    out = io.BytesIO()
    # Text stays text in an SVG, and the same timeline gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvsieve"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _Drawing(timeline, max_seq_len).draw(frames)
        figure.savefig(out, format=kind[1:], metadata={"Date": None} if kind == ".svg" else None)
    return save(file, out.getvalue())


_WIDTH, _MARGIN, _LANE = 14.0, 0.3, 0.165
"""Inches: the picture, what stays empty around it, and a line of text."""
_INK, _FAINT, _REFERENCE, _CACHE, _DROP = "#222222", "#767676", "#0072B2", "#56B4E9", "#E69F00"
_SMALL, _BOLD = {"fontsize": 7, "color": _INK, "parse_math": False}, {"fontsize": 9.5, "fontweight": "bold"}
_LISTED = 30
"""References that are listed below the picture at most."""


class _Drawing:
    """Draws a timeline from the top down. Lengths are inches, but times are seconds."""

    def __init__(self, timeline: Timeline, max_seq_len: int | None) -> None:
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import text_to_path

        self.timeline, self.limit = timeline, max_seq_len
        fonts = {7: FontProperties(size=7), 10: FontProperties(size=9.5, weight="bold")}

        @cache
        def measure(text: str, size: int = 7) -> float:
            # Glyphs on a screen are a little wider than their outlines, as they are fitted to whole pixels.
            return float(text_to_path.get_text_width_height_descent(text, fonts[size], False)[0]) / 72 * 1.04

        self.measure = measure
        self.names = [one_line(band.strategy, 30) for band in timeline.bands]
        self.left = _MARGIN + 0.5 + max(1.5, *(self.measure(name, 10) for name in self.names))
        self.wide = _WIDTH - self.left - _MARGIN
        pad = 0.008 * (timeline.end - timeline.begin)
        self.limits = timeline.begin - pad, timeline.end + pad
        self.second = self.wide / (self.limits[1] - self.limits[0])
        self.wanted = [one.time for one in timeline.references]
        self.rows: list[tuple[float, float, Callable[[Any], None]]] = []

    def draw(self, frames: Sequence[Picture] | None) -> Any:
        """The figure."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        if frames is not None:
            self.row(0.8, self.strip(thumbnails(self.timeline, frames, self.second, 0.8)), gap=0.1)
        guided = len(self.rows)
        listed = self.references()
        lanes = 2 if len(self.timeline.bands) <= 4 else 1
        tops = self.timeline.tops(self.limit)
        for band, name, top in zip(self.timeline.bands, self.names, tops, strict=True):
            self.band(band, name, top, lanes)
        below = 0.55 + _LANE * math.ceil(len(listed) / 3) + 0.25 * bool(listed)
        above = 1.0
        height = above + sum(size + gap for size, gap, _ in self.rows) + below
        figure = Figure(figsize=(_WIDTH, height), dpi=120)
        FigureCanvasAgg(figure)
        edge = height - above
        spans: list[tuple[float, float]] = []
        for size, gap, _ in self.rows:
            spans.append((edge - size, size))
            edge -= size + gap
        box = (self.left / _WIDTH, spans[-1][0] / height, self.wide / _WIDTH, 0.0)
        guide_top = sum(spans[guided])
        guides = figure.add_axes((*box[:3], (guide_top - spans[-1][0]) / height), facecolor="none", zorder=-1)
        self.frame(guides)
        guides.vlines(
            self.wanted, *guides.get_ylim(), color=_REFERENCE, alpha=0.25, linewidth=0.7, linestyle=(0, (2, 2))
        )
        guides.tick_params(bottom=True, labelbottom=True, labelsize=8, colors=_INK)
        guides.set_xlabel("seconds of the video", fontsize=8.5, color=_INK)
        for (bottom, size), (_, _, paint) in zip(spans, self.rows, strict=True):
            axes = figure.add_axes((box[0], bottom / height, box[2], size / height), facecolor="none")
            self.frame(axes)
            paint(axes)
        self.head(figure, height)
        self.foot(figure, listed, spans[-1][0] - 0.6, height)
        return figure

    def row(self, size: float, paint: Callable[[Any], None], gap: float = 0.0) -> None:
        """One more row, and the gap below it."""
        self.rows.append((size, gap, paint))

    def frame(self, axes: Any) -> None:
        """Axes over the common time, without a frame."""
        axes.set_xlim(*self.limits)
        axes.set_ylim(0, axes.get_position().height * axes.figure.get_figheight())
        axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)

    def strip(self, pictures: list[tuple[float, float, Picture]]) -> Callable[[Any], None]:
        """Frames side by side."""

        def paint(axes: Any) -> None:
            for left, right, picture in pictures:
                axes.imshow(picture, extent=(left, right, 0, 0.8), aspect="auto")
            self.frame(axes)

        return paint

    def references(self) -> list[str]:
        """The row of references; returns those that are not written in full."""
        wanted = self.timeline.references
        items = [(self.inch(one.time), captions(one.text, i)) for i, one in enumerate(wanted, 1)]
        labels = place_labels(items, range(len(items))[::-1], 4, self.wide, self.measure, 0.08)

        def paint(axes: Any) -> None:
            size = 26 * self.dense(len(wanted))
            axes.scatter(self.wanted, [0.09] * len(wanted), marker="s", color=_REFERENCE, s=size, linewidth=0)
            self.texts(axes, items, labels, 0.19)
            self.side(axes, "references", f"{len(wanted)} lines to say" if len(wanted) != 1 else "1 line to say")

        self.row(0.2 + _LANE * max([2, *(lane + 1 for *_, lane in labels.values())]), paint, gap=0.14)
        full = [f"{i}: {one_line(one.text)}" for i, one in enumerate(wanted, 1)]
        rest = [one_line(text, 78) for i, text in enumerate(full) if i not in labels or labels[i][0] != text]
        return rest if len(rest) <= _LISTED else [*rest[: _LISTED - 1], f"and {len(rest) - _LISTED + 1} more"]

    def band(self, band: Band, name: str, top: int, lanes: int) -> None:
        """The two rows of a strategy."""
        if band.score is None:
            why = one_line(band.error, 150)
            self.row(0.5, lambda axes: self.failed(axes, name, why), gap=0.2)
            return
        texts, order = band.captions()
        items = [(self.inch(time), ways) for time, ways in texts]
        labels = place_labels(items, order, lanes, self.wide, self.measure, 0.08)
        rate = band.score.rates()["f1"]
        counts = band.counts.split(", ")
        about = [*([] if rate is None else [f"F1 {rate:.2f}"]), ", ".join(counts[:2]), ", ".join(counts[2:])]

        def paint(axes: Any) -> None:
            windows = [(first, last - first) for first, last in self.timeline.windows()]
            axes.broken_barh(windows, (0, 0.38), color="#f0f0f0", linewidth=0)
            for verdict, (colour, marker, _) in LOOKS.items():
                times = [one.time for one in band.marks if one.verdict == verdict]
                hollow = verdict == "missed"
                axes.scatter(
                    times, [0.09 if hollow else 0.27] * len(times), marker=marker, zorder=3,
                    s=(26 if hollow else 46) * self.dense(len(band.marks)),
                    facecolor="none" if hollow else colour, edgecolor=colour if hollow else "white",
                    linewidth=(1.1 if hollow else 0.5) * self.dense(len(band.marks)),
                )  # fmt: skip
            self.texts(axes, items, labels, 0.38)
            self.side(axes, name, *about)

        height = 0.4 + _LANE * max([1, *(lane + 1 for *_, lane in labels.values())])
        self.row(height, paint, gap=0.05)
        self.row(0.55, lambda axes: self.cache(axes, band, top), gap=0.2)

    def cache(self, axes: Any, band: Band, top: int) -> None:
        """Tokens in the cache."""
        axes.set_ylim(0, 1.12 * top)
        axes.spines["left"].set_visible(True)
        axes.spines["bottom"].set_visible(True)
        for spine in axes.spines.values():
            spine.set_color("#bbbbbb")
        ticks = sorted({0, self.limit if self.limit and top < 1.6 * self.limit else top})
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.tick_params(left=True, labelleft=True, labelsize=7, colors=_FAINT, length=2)
        if self.limit is not None:
            axes.axhline(self.limit, color="#000000", linewidth=0.9, linestyle="--")
        if band.cache:
            times, tokens = map(list, zip(*band.cache, strict=True))
            times, tokens = [*times, times[-1] + 1 / self.timeline.video.fps], [*tokens, tokens[-1]]
            axes.fill_between(times, tokens, step="post", color=_CACHE, alpha=0.25, linewidth=0)
            axes.step(times, tokens, where="post", color=_REFERENCE, linewidth=1)
        if band.drops:
            at, before, after = zip(*band.drops, strict=True)
            size = self.dense(2 * len(at))
            axes.vlines(at, after, before, color=_DROP, linewidth=1.6 * size, zorder=3)
            axes.scatter(at, after, marker="v", s=20 * size, color=_DROP, linewidth=0, zorder=4)
        if not band.cache and not band.drops:
            axes.text(0.5, 0.5, "the size of the cache was not recorded", transform=axes.transAxes, ha="center",
                      va="center", **_SMALL)  # fmt: skip

    def failed(self, axes: Any, name: str, why: str) -> None:
        """A band without a result."""
        axes.axhspan(0.05, 0.45, facecolor="#f1f1f1", edgecolor="#c8c8c8", hatch="///", linewidth=0)
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", **(_SMALL | {"fontsize": 8}),
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2.5})  # fmt: skip
        self.side(axes, name, "failed")

    def side(self, axes: Any, name: str, *lines: str) -> None:
        """What a row is, left of it."""
        top, left = axes.get_ylim()[1], -(self.left - _MARGIN) / self.wide
        place = {"transform": axes.get_yaxis_transform(), "va": "top"}
        axes.text(left, top, name, color=_INK, parse_math=False, **_BOLD, **place)
        axes.text(left, top - 0.19, "\n".join(lines), linespacing=1.35, **(_SMALL | {"color": _FAINT}), **place)

    def texts(
        self, axes: Any, items: Sequence[tuple[float, Any]], labels: Mapping[int, tuple[str, float, int]], low: float
    ) -> None:
        """Labels, and the stems of those that do not stand on the lowest line."""
        for item, (text, left, lane) in labels.items():
            high = low + lane * _LANE
            axes.text(self.limits[0] + left / self.second, high, text, va="bottom", **_SMALL)
            if lane:
                time = self.limits[0] + items[item][0] / self.second
                axes.plot([time, time], [low, high + 0.02], color="#b0b0b0", linewidth=0.6)

    def dense(self, marks: int) -> float:
        """What marks shrink to where they are many."""
        return min(1.0, max(0.3, 70 / max(marks, 1)))

    def inch(self, time: float) -> float:
        """Where a time stands in its row."""
        return (time - self.limits[0]) * self.second

    def head(self, figure: Any, height: float) -> None:
        """Title and legend."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        video = self.timeline.video
        title = video.video_id if video.key == video.video_id else f"{video.video_id} ({video.key})"
        across = _MARGIN / _WIDTH
        figure.text(across, 1 - 0.2 / height, one_line(title, 100), va="top", fontsize=13, fontweight="bold",
                    color=_INK, parse_math=False)  # fmt: skip
        figure.text(across, 1 - 0.47 / height, self.timeline.about, va="top", fontsize=8.5, color=_FAINT)
        style: dict[str, Any] = {"linestyle": "", "markersize": 6.5, "markeredgewidth": 0.5}
        marks: list[Any] = [Line2D([], [], color=_REFERENCE, marker="s", label="reference", **style)]
        for verdict, (colour, marker, meaning) in LOOKS.items():
            hollow = {"markerfacecolor": "none", "markeredgewidth": 1.1} if verdict == "missed" else {}
            marks.append(Line2D([], [], color=colour, marker=marker, label=f"{verdict}: {meaning}", **(style | hollow)))
        marks += [
            Patch(facecolor=_CACHE + "40", edgecolor=_REFERENCE, label="tokens in the cache"),
            Line2D([], [], color=_DROP, marker="v", markersize=5, label="compression"),
        ]
        if self.limit is not None:
            marks.append(
                Line2D([], [], color="#000000", linestyle="--", linewidth=0.9, label=f"max_seq_len {self.limit:,}")
            )
        figure.legend(
            handles=marks, loc="upper left", bbox_to_anchor=(across, 1 - 0.66 / height), ncols=len(marks), fontsize=7.5,
            frameon=False, borderpad=0, borderaxespad=0, handletextpad=0.4, columnspacing=1.2, handlelength=1.3,
        )  # fmt: skip

    def foot(self, figure: Any, listed: list[str], top: float, height: float) -> None:
        """References that had no room, in three columns."""
        lines = math.ceil(len(listed) / 3)
        for i, text in enumerate(listed):
            column, line = divmod(i, lines)
            left = _MARGIN + column * (_WIDTH - _MARGIN) / 3
            figure.text(left / _WIDTH, (top - line * _LANE) / height, text, va="top", **_SMALL)
