"""Pictures of recorded traces and of the results of a run. They need matplotlib (the extra `plot`).

Held is blue and let go is grey, which differ in lightness as well; other colours are those of Okabe and Ito, and each
is doubled by a dash, a mark or a word.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._rowlog import write_text
from ..errors import DataError, KvsieveError
from ..trace import Trace
from .picture_data import answers_held, binned, held_over_time, layer_shares, lifetimes, moment, question, ranges, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "ANSWER",
    "INK",
    "PAPER",
    "SOFT",
    "empty_figure",
    "layers_by_positions",
    "lifetime",
    "make_figure",
    "plain",
    "save",
    "shades",
    "to_png",
    "to_svg",
]

KEPT, GONE, SINK, RECENT, ANSWER = "#3274A1", "#D9D9D9", "#E74C3C", "#2ECC71", "#D55E00"
INK, SOFT, PAPER = "#1C2126", "#59626B", "#FDFDFD"
_BINS = 900


def layers_by_positions(
    trace: Trace,
    seen: int | None = None,
    *,
    sink_tokens: int | None = None,
    recent_tokens: int | None = None,
    bins: int = _BINS,
) -> Figure:
    """Original positions from left to right, layers from the bottom up: the share of a layer's heads that hold each.

    Args:
        trace: what was recorded.
        seen: tokens read at the moment to show; by default when the answer was asked for.
        sink_tokens: mark where the tokens end that the policy keeps at the beginning.
        recent_tokens: mark where the tokens begin that the policy keeps at the end.
        bins: with more positions than this, neighbours share a column that shows their mean.

    Raises:
        DataError: `seen`, `sink_tokens`, `recent_tokens` or `bins` out of range.
        KvsieveError: matplotlib is not installed.
    """
    at = moment(trace, seen)
    for name, value in (("sink_tokens", sink_tokens), ("recent_tokens", recent_tokens)):
        if value is not None and value < 0:
            raise DataError(f"{name} must be 0 or more, not {value}")
    shares = binned(layer_shares(trace, at), bins)
    layers = len(trace.layers)
    figure, axes = make_figure(9, min(9.0, max(2.4, 1.6 + 0.2 * layers)))
    picture = axes.imshow(
        shares, origin="lower", aspect="auto", interpolation="none", cmap=shades(), vmin=0, vmax=1,
        extent=(0, at, -0.5, layers - 0.5),
    )  # fmt: skip
    _heads_bar(figure, axes, picture)
    lines: list[tuple[int, str, Any, str]] = []
    if sink_tokens and sink_tokens < at:
        lines.append((sink_tokens, SINK, (0, (5, 2)), f"sink: first {sink_tokens:,}"))
    if recent_tokens and recent_tokens < at:
        lines.append((at - recent_tokens, RECENT, (0, (6, 2, 1, 2)), f"recent: last {recent_tokens:,}"))
    for x, colour, dash, label in lines:
        axes.axvline(x, color=colour, linestyle=dash, linewidth=1.8)
        axes.annotate(
            f" {label}", (x, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3), textcoords="offset points",
            fontsize=8, color=INK, ha="left", va="bottom",
        )  # fmt: skip
    _mark_positions(axes, trace, at)
    ticks = range(layers) if layers <= 12 else range(0, layers, -(-layers // 12))
    axes.set_yticks(list(ticks), [str(trace.layers[i]) for i in ticks])
    axes.set_xlabel("original position", labelpad=12)
    axes.set_ylabel("layer")
    head = f"{title(trace)}: held after {at:,} of {trace.tokens:,} tokens"
    axes.set_title(head, fontsize=10, loc="left", pad=18 if lines else 8, color=INK)
    _thousands(axes.xaxis)
    return figure


def lifetime(trace: Trace, *, bins: int = _BINS) -> Figure:
    """How long each position was held: tokens read from left to right, original positions from the bottom up.

    Every column is the state after a recorded forward pass. Above: the share of heads that hold the answer, next to
    that of all tokens read.

    Args:
        trace: what was recorded.
        bins: with more positions than this, neighbours share a row that shows their mean.

    Raises:
        DataError: `bins` out of range, or `about` holds positions that do not exist.
        KvsieveError: matplotlib is not installed.
    """
    shares, tokens = lifetimes(trace, bins), trace.tokens
    columns = min(tokens, 1200)
    middles = (np.arange(columns) + 0.5) * tokens / columns
    image = shares[:, np.searchsorted(trace.seen, middles)]
    figure, (above, axes) = _two_panels(9, 5.6)
    picture = axes.imshow(
        np.ma.masked_invalid(image), origin="lower", aspect="auto", interpolation="none", cmap=shades(), vmin=0, vmax=1,
        extent=(0, tokens, 0, tokens),
    )  # fmt: skip
    _heads_bar(figure, axes, picture)
    ends = np.concatenate([[0], trace.seen])
    above.stairs(
        held_over_time(trace), ends, baseline=None, color=SOFT, linestyle="--", linewidth=1.4, label="all tokens read"
    )
    answers = ranges(trace, "answers")
    if answers:
        which = np.unique(np.concatenate([np.arange(a, b) for a, b in answers]))
        above.stairs(held_over_time(trace, which), ends, baseline=None, color=ANSWER, linewidth=2, label="the answer")
    for first, end in answers:
        arrived = ends[np.searchsorted(trace.seen, first, side="right")]
        room = arrived > 0.12 * tokens
        for text, x, where, side, high in (
            ("answer \u25b8" if room else "", arrived, axes.transData, "right", "bottom"),
            ("\u25c2", 1, axes.get_yaxis_transform(), "left", "center"),
        ):
            axes.annotate(
                text, (x, (first + end) / 2), xycoords=where, xytext=(-3 if side == "right" else 1, 0), fontsize=9,
                textcoords="offset points", color=ANSWER, ha=side, va=high, annotation_clip=False,
            )  # fmt: skip
    told = ((question(trace), ":", "the question begins"), (trace.about.get("asked"), "-", "the answer is asked for"))
    for x, dash, label in told:
        if x is not None:
            axes.axvline(x, color=INK, linewidth=0.9, linestyle=dash)
            above.axvline(x, color=INK, linewidth=0.9, linestyle=dash, label=label)
    above.set_ylim(-0.04, 1.06)
    above.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    above.set_ylabel("held")
    above.legend(
        loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, frameon=False, ncols=4, borderpad=0, labelcolor=INK,
        handlelength=2.6, borderaxespad=0.4,
    )  # fmt: skip
    above.set_title(f"{title(trace)}: how long each position was held", fontsize=10, loc="left", pad=20, color=INK)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("original position")
    for axis in (axes.xaxis, axes.yaxis):
        _thousands(axis)
    return figure


def to_svg(figure: Figure, *, transparent: bool = False) -> str:
    """The picture as SVG with real text; the same figure gives the same text every time."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvsieve", "svg.fonttype": "none", "image.composite_image": False}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    return out.getvalue().decode()


def to_png(figure: Figure) -> bytes:
    """The picture as PNG, 150 dots per inch."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture in one step, folder included.

    Raises:
        DataError: the name ends neither in `.svg` nor in `.png`.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise DataError(f"pictures are drawn as .svg or .png, not as {path.name}")
    content = to_svg(figure).encode() if kind == ".svg" else to_png(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
    return path


def make_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, outside of pyplot.

    Raises:
        KvsieveError: matplotlib is not installed.
    """
    figure = empty_figure(width, height)
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def shades() -> Colormap:
    """From let go, grey, to held by all, blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("held", [GONE, KEPT])


def plain(axes: Axes) -> None:
    """Few lines, small type."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)
    axes.tick_params(labelsize=8, colors=INK, color=SOFT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)
        label.set_color(INK)
    axes.title.set_color(INK)


def empty_figure(width: float, height: float) -> Figure:
    """A figure of so many inches without axes.

    Raises:
        KvsieveError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KvsieveError("pictures need matplotlib, which is not installed: pip install 'kvsieve[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _two_panels(width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = empty_figure(width, height)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[1, 4])
    for axes in panels:
        plain(axes)
    return figure, list(panels)


def _heads_bar(figure: Figure, axes: Axes, picture: Any) -> None:
    bar = figure.colorbar(picture, ax=axes, pad=0.02, fraction=0.03, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["let go", "half", "all"], fontsize=8, color=INK)
    bar.set_label("heads that hold it", fontsize=8, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _mark_positions(axes: Axes, trace: Trace, at: int) -> None:
    """Answer and question below the axis, so that they hide nothing."""
    for (first, end), held, heads in answers_held(trace, at):
        if first < at:
            axes.annotate(
                f"\u25b2 answer ({held}/{heads} heads)", ((first + end) / 2, 0), xycoords=("data", "axes fraction"),
                xytext=(-4, -17), textcoords="offset points", fontsize=8, color=ANSWER, ha="left", va="top",
                annotation_clip=False,
            )  # fmt: skip
    asks = question(trace)
    if asks is not None and asks < at:
        axes.annotate(
            "question \u25b2", (asks, 0), xycoords=("data", "axes fraction"), xytext=(4, -17), fontsize=8,
            textcoords="offset points", color=INK, ha="right", va="top", annotation_clip=False,
        )  # fmt: skip


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
