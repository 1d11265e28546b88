"""Pictures of the results of a run: quality against memory, depth by length, what survived in which layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..tasks.contenders import FULL
from .pictures import INK, PAPER, SOFT, empty_figure, make_figure, plain, shades
from .plots import label_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["depth_by_length", "quality_against_bytes", "survival_by_layer"]

_GAP = 1.6
_COLOURS = {"none": "#000000", "ratio": "#0072B2"}


def quality_against_bytes(summary: dict[str, Any]) -> Figure:
    """Score against measured bytes, one labelled point per method, with the bootstrap interval of the score.

    A dashed line is the full cache's score.

    Raises:
        DataError: no method has a score.
        KvsieveError: matplotlib is not installed.
    """
    shown = [one for one in summary["overall"] if one["score"] is not None and one["bytes_full"]]
    if not shown:
        raise DataError("no method has a score, so there is nothing to draw")
    figure, axes = make_figure(8.5, 5)
    points = []
    places = _side_by_side([100 * one["bytes_held"] / one["bytes_full"] for one in shown])
    for one, x in zip(shown, places, strict=True):
        kind, y = "none" if one["method"] == FULL else "ratio", float(one["score"])
        points.append((x, y, str(one["method"]), kind))
        if one["interval"]:
            low, high = one["interval"]
            axes.vlines(x, low, high, color=_COLOURS[kind], linewidth=1.2, alpha=0.45, zorder=2)
        axes.scatter(
            [x], [y], c=_COLOURS[kind], marker="*" if kind == "none" else "o", s=90 if kind == "none" else 40, zorder=3
        )
        if kind == "none":
            axes.axhline(y, color=_COLOURS[kind], linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(0, max(105.0, *(1.05 * x for x, *_ in points)))
    ends = [float(end) for one in shown for end in one["interval"] or (one["score"],)]
    pad = max(2.0, 0.08 * (max(ends) - min(ends)))
    axes.set_ylim(min(ends) - pad, max(ends) + pad)
    axes.grid(alpha=0.2, color=SOFT)
    axes.set_xlabel("cache held, % of the full cache (measured bytes)")
    axes.set_ylabel("score, 0 to 100 (higher is better)")
    title = f"{summary['run']['model']}: score against memory, with the bootstrap interval of each score"
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    figure.draw_without_rendering()
    label_points(axes, points)
    return figure


def _side_by_side(xs: Sequence[float]) -> list[float]:
    """Points at (almost) one memory are set beside each other, so that their intervals can be told apart."""
    out, start = list(xs), 0
    order = sorted(range(len(xs)), key=xs.__getitem__)
    for i in range(1, len(order) + 1):
        if i == len(order) or xs[order[i]] - xs[order[i - 1]] > _GAP:
            for rank, one in enumerate(order[start:i]):
                out[one] += _GAP * (rank - (i - start - 1) / 2)
            start = i
    return out


def depth_by_length(
    summary: dict[str, Any], method: str | Sequence[str] | None = None, task: str | None = None
) -> Figure:
    """For each method, where in the text the needle stood (down) by length of the text (across).

    The number and the colour are the score. The bar in a cell is the share of heads that still held the answer when it
    was asked for; a hatched cell is one where no head did. So a wrong answer with a long bar was kept and ignored,
    and one in a hatched cell was lost with its tokens.

    Args:
        summary: results of a run with depths.
        method: one name, several, or None for all that have depths.
        task: one task; by default the mean over all tasks.

    Raises:
        DataError: no such method, or no results with depths.
        KvsieveError: matplotlib is not installed.
    """
    wanted = [method] if isinstance(method, str) else None if method is None else list(method)
    rows = [r for r in summary["results"] if r["by_depth"] and (task is None or r["task"] == task)]
    names = list(dict.fromkeys(r["method"] for r in rows if wanted is None or r["method"] in wanted))
    missing = [name for name in wanted or () if name not in names]
    if missing or not names:
        raise DataError(
            f"no results by depth for {', '.join(missing) or 'any method'}: run a needle task at several depths"
        )
    rows = [r for r in rows if r["method"] in names]
    lengths = sorted({int(r["length"] or 0) for r in rows})
    depths = sorted({float(cell["depth"]) for r in rows for cell in r["by_depth"]})
    across = min(len(names), max(1, 12 // len(lengths)), 3)
    down = -(-len(names) // across)
    wide = min(12.0, max(5.5, across * (0.9 + 0.62 * len(lengths))))
    high = min(24.0, 0.9 + down * (0.55 + 0.3 * len(depths)))
    figure = empty_figure(wide, high)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    roomy = high / down / len(depths) > 0.2 and wide / across / len(lengths) > 0.34
    for i, axes in enumerate(panels.flat):
        plain(axes)
        if i >= len(names):
            axes.set_axis_off()
            continue
        scores, survival = _grid(rows, names[i], lengths, depths)
        axes.imshow(np.ma.masked_invalid(scores), cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="none")
        _cells(axes, scores, survival, roomy)
        axes.set_title("full cache" if names[i] == FULL else names[i], fontsize=9, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{one:,}" for one in lengths])
        axes.set_yticks(range(len(depths)), [f"{one:.0%}" for one in depths])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color=PAPER, linewidth=1.5)
        if i + across >= len(names):
            axes.tick_params(labelbottom=True)
    figure.supxlabel("length of the text, tokens", fontsize=9, color=INK)
    figure.supylabel("depth of the answer", fontsize=9, color=INK)
    bar = figure.colorbar(panels.flat[0].images[0], ax=panels, pad=0.02, fraction=0.03, aspect=30)
    bar.set_label("score", fontsize=8, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=0)
    figure.suptitle(
        "bar in a cell: share of heads that still held the answer; hatched: none did", fontsize=9, color=INK, x=0.01,
        ha="left",
    )  # fmt: skip
    return figure


def survival_by_layer(summary: dict[str, Any]) -> Figure:
    """For each method and layer, the share of heads that still held the whole answer when it was asked for.

    The mean over all tasks and lengths, each weighed by its samples.

    Raises:
        DataError: the run did not record what survived.
        KvsieveError: matplotlib is not installed.
    """
    names, shares = layer_survival(summary)
    methods, layers = shares.shape
    figure, axes = make_figure(min(12.0, max(6.5, 2.5 + 0.36 * layers)), min(16.0, 1.3 + 0.32 * methods))
    axes.imshow(shares, cmap=shades(), vmin=0, vmax=1, aspect="auto", interpolation="none")
    if layers <= 36:
        for y, x in np.ndindex(methods, layers):
            share = shares[y, x]
            text = f"{100 * share:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="#FFFFFF" if share > 0.85 else "#1B2025")
    axes.set_yticks(range(methods), ["full cache" if name == FULL else name for name in names])
    step = -(-layers // 24)
    axes.set_xticks(range(0, layers, step), [str(i) for i in range(0, layers, step)])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(1, layers) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, methods) - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("layer")
    axes.set_title("answer still held when it was asked for, % of heads", fontsize=10, loc="left", color=INK)
    return figure


def layer_survival(summary: dict[str, Any]) -> tuple[list[str], NDArray[np.float64]]:
    """Names of methods, and `[methods, layers]`: their mean `by_layer`, weighed by samples with an answer to look for.

    Raises:
        DataError: the run did not record what survived, or not for equally many layers.
    """
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for one in summary["results"]:
        survival = one["survival"]
        if survival and survival["answerable"] and survival["by_layer"]:
            found.setdefault(one["method"], []).append((survival["answerable"], survival["by_layer"]))
    if not found:
        raise DataError("this run did not record which tokens survived, so there is nothing to draw")
    if len({len(layers) for parts in found.values() for _, layers in parts}) > 1:
        raise DataError("results of models with different numbers of layers cannot be drawn together")
    means = [
        np.average([layers for _, layers in parts], axis=0, weights=[n for n, _ in parts]) for parts in found.values()
    ]
    return list(found), np.array(means)


def _grid(
    rows: Sequence[dict[str, Any]], name: str, lengths: list[int], depths: list[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[depths, lengths]` scores and survival; NaN where nothing was measured."""
    grids = []
    for key in ("score", "survival"):
        total, weight = np.zeros((len(depths), len(lengths))), np.zeros((len(depths), len(lengths)))
        for row in rows:
            for cell in row["by_depth"] if row["method"] == name else ():
                if cell[key] is not None and cell["samples"]:
                    at = depths.index(float(cell["depth"])), lengths.index(int(row["length"] or 0))
                    total[at] += cell[key] * cell["samples"]
                    weight[at] += cell["samples"]
        grid = np.full_like(total, np.nan)
        np.divide(total, weight, out=grid, where=weight > 0)
        grids.append(grid)
    return grids[0], grids[1]


def _cells(axes: Any, scores: NDArray[np.float64], survival: NDArray[np.float64], roomy: bool) -> None:
    from matplotlib.patches import Rectangle

    for y, x in np.ndindex(*scores.shape):
        score, share = scores[y, x], survival[y, x]
        if np.isnan(score):
            continue
        # Cividis passes from dark to light in its middle.
        text = "#FFFFFF" if score < 50 else "#1B2025"
        if roomy:
            axes.text(x, y - 0.1, f"{score:.0f}", ha="center", va="center", fontsize=8, color=text)
        if share == 0:
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=text, linewidth=0, alpha=0.6)
            )
        elif share > 0:
            axes.add_patch(Rectangle((x - 0.44, y + 0.28), 0.88, 0.13, facecolor=text, alpha=0.25, linewidth=0))
            axes.add_patch(Rectangle((x - 0.44, y + 0.28), 0.88 * share, 0.13, facecolor=text, linewidth=0))
