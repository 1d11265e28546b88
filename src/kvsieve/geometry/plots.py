"""Pictures of streaming reconstruction, as PNG bytes. Colours are those of Okabe and Ito, doubled by line and marker.

All of them need matplotlib (the extra `geometry`); without it they raise `KvsieveError` with what to install.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, KvsieveError
from .alignment import Sim3, camera_centres, umeyama
from .export import colourise, depth_limits

__all__ = ["depth_strip", "growth", "quality_against_budget", "tokens_over_frames", "trajectory"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_TRUTH = {"color": "#000000", "linewidth": 2.4, "alpha": 0.45}
_MIB = 2**20
_SHOWN = 6
"""Frames of a strip unless told."""


def tokens_over_frames(counts: Mapping[str, Sequence[Sequence[int]]]) -> bytes:
    """Two panels: tokens held in all layers together, and per layer (mean, with a band from least to most).

    Args:
        counts: per run, for every frame, the tokens that each layer holds after it: `counts[run][frame][layer]`.

    Raises:
        DataError: no run, a run without frames, or frames with different numbers of layers.
    """
    tables = {name: _table(name, rows) for name, rows in _some(counts, "run").items()}
    figure = _figure((10, 4))
    total, layers = figure.subplots(1, 2)
    for index, (name, table) in enumerate(tables.items()):
        frames = np.arange(1, len(table) + 1)
        style = _style(index, len(table))
        total.plot(frames, table.sum(axis=1), label=name, **style)
        layers.plot(frames, table.mean(axis=1), label=name, **style)
        layers.fill_between(frames, table.min(axis=1), table.max(axis=1), color=style["color"], alpha=0.18, linewidth=0)
    _finish(total, "frames seen", "tokens held", "all layers together")
    _finish(layers, "frames seen", "tokens held per layer", "mean of the layers; band: least to most")
    return _png(figure)


def trajectory(runs: Mapping[str, Tensor], truth: Tensor | None = None) -> bytes:
    """Camera paths from above (x right, z forward) and from behind (x right, y down), on equal axes.

    Every path is brought onto the truth, or without one onto the first run, by a similarity; where cameras that all
    stand in one place allow none, by a shift of the first camera. The start is marked.

    Args:
        runs: world-to-camera extrinsics `[S, 3, 4]` by name.
        truth: the same; it may be None.

    Raises:
        DataError: no run, other shapes, different numbers of frames, or values that are not finite.
    """
    paths = {name: camera_centres(poses) for name, poses in _some(runs, "run").items()}
    target = next(iter(paths.values())) if truth is None else camera_centres(truth)
    for name, path in paths.items():
        if len(path) != len(target):
            raise DataError(f"run {name!r} has {len(path)} cameras, its reference {len(target)}; frames must be equal")
    aligned = {name: _onto(path, target).numpy() for name, path in paths.items()}
    figure = _figure((10, 4.6))
    above, behind = figure.subplots(1, 2)
    for axes, vertical in ((above, 2), (behind, 1)):
        if truth is not None:
            axes.plot(
                target[:, 0], target[:, vertical], label="truth", marker="." if len(target) == 1 else "", **_TRUTH
            )
        for index, (name, moved) in enumerate(aligned.items()):
            style = _style(index, len(moved))
            axes.plot(moved[:, 0], moved[:, vertical], label=name, **style)
            axes.plot(moved[0, 0], moved[0, vertical], marker="o", markersize=6, color=style["color"])
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.08)
    behind.invert_yaxis()
    _finish(above, "x (right)", "z (forward)", "from above; dots: first camera")
    _finish(behind, "x (right)", "y (down)", "from behind")
    figure.suptitle(f"aligned by a similarity to {'the first run' if truth is None else 'the truth'}", fontsize=10)
    return _png(figure)


def depth_strip(
    images: Tensor,
    depths: Mapping[str, Tensor],
    frames: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> bytes:
    """Rows of frames: the input, then each depth under its name, all in one scale of colours (dark is near).

    The limits of the colours are those of `truth` if there is a depth of that name, which then comes first, else those
    of the first one. Depth is drawn as it is: align it before. Invalid pixels are grey.

    Args:
        images: `[S, 3, H, W]` in [0, 1].
        depths: depth `[S, H, W]` by name; H and W may differ from those of the images.
        frames: which to show, counted from 0 (negative from the end); None spreads six over the sequence.
        numbers: where the S frames stand in a longer stream, counted from 0, for the titles; None is 0 to S - 1.

    Raises:
        DataError: no depth, other shapes, no valid pixel, frames that do not exist, or another number of numbers.
    """
    _some(depths, "depth")
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(f"images have shape {list(images.shape)}; [S, 3, H, W] with one frame at least is needed")
    count = len(images)
    for name, depth in depths.items():
        if depth.ndim != 3 or len(depth) != count:
            raise DataError(f"depth {name!r} has shape {list(depth.shape)}; [S, H, W] with {count} frames is needed")
    shown = sorted({round(i) for i in np.linspace(0, count - 1, _SHOWN)}) if frames is None else list(frames)
    if not shown or not all(-count <= frame < count for frame in shown):
        raise DataError(f"frames={shown} must name at least one of the {count} frames, 0 to {count - 1}")
    shown = [frame % count for frame in shown]
    if numbers is not None and len(numbers) != count:
        raise DataError(f"{len(numbers)} numbers were given for {count} frames; give one per frame, or none")
    names = sorted(depths, key=lambda name: name != "truth")
    limits = depth_limits(depths[names[0]][shown])
    pictures = [("input", (images[shown].detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1)).numpy())]
    pictures += [(name, colourise(depths[name][shown], limits)) for name in names]
    ratio = images.shape[2] / images.shape[3]
    width = min(10.0, 2.2 * len(shown) + 0.8)
    height = (width - 0.8) / len(shown) * ratio * len(pictures) + 0.9
    figure = _figure((width, min(height, 20.0)))
    grid = figure.subplots(len(pictures), len(shown), squeeze=False)
    for line, (name, row) in zip(grid, pictures, strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axes, picture in zip(line, row, strict=True):
            axes.imshow(picture, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, frame in zip(grid[0], shown, strict=True):
        axes.set_title(f"frame {(frame if numbers is None else numbers[frame]) + 1}", fontsize=9)
    figure.supxlabel(f"depth {limits[0]:.3g} (dark) to {limits[1]:.3g} (light)", fontsize=9)
    return _png(figure)


def quality_against_budget(rows: Sequence[Mapping[str, Any]], ylabel: str = "AbsRel (lower is better)") -> bytes:
    """Cache held, as a share of the full cache's bytes, against an error; one line per method, points labelled.

    Args:
        rows: each with `method` (a name), `held` (bytes held over bytes of the full cache, 0 to 1), `value` (the
            error) and, where the method's name is not what the point shall say, `label`. The row of the method
            `"full"` also gives a horizontal line. Rows whose numbers are not finite are counted below the picture.
        ylabel: what `value` is, such as AbsRel or the distance to the full cache.

    Raises:
        DataError: no row, or a row without one of the three.
    """
    if not rows:
        raise DataError("no row was given; pass one per run with method, held and value")
    for row in rows:
        missing = [key for key in ("method", "held", "value") if key not in row]
        if missing:
            raise DataError(f"the row {dict(row)} lacks {', '.join(missing)}")
    drawn = [row for row in rows if math.isfinite(row["held"]) and math.isfinite(row["value"])]
    figure = _figure((8, 5))
    axes = figure.add_subplot()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in drawn if row["method"] != "full")):
        here = sorted((100 * row["held"], row["value"]) for row in drawn if row["method"] == method)
        xs, ys = zip(*here, strict=True)
        style = _style(index, 1) | {"linestyle": _LINES[0], "linewidth": 1.2}
        axes.plot(xs, ys, label=method, **style)
    full = [(100 * row["held"], row["value"]) for row in drawn if row["method"] == "full"]
    if full:
        axes.axhline(full[0][1], color="#000000", linewidth=1, linestyle="--", zorder=1)
        axes.scatter(*zip(*full, strict=True), color="#000000", marker="*", s=110, label="full cache", zorder=3)
    axes.set_xlim(0, max([105.0, *(105 * row["held"] for row in drawn)]))
    axes.margins(y=0.12)
    figure.draw_without_rendering()
    _names(axes, [(100 * row["held"], row["value"], str(row.get("label", row["method"]))) for row in drawn])
    _finish(axes, "cache held, % of the full cache (measured bytes)", ylabel, "quality against memory")
    if len(drawn) < len(rows):
        figure.supxlabel(f"not drawn, as not finite: {len(rows) - len(drawn)}", fontsize=8)
    return _png(figure)


def growth(series: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Two panels: bytes of the cache after each frame, and seconds that each frame took.

    Args:
        series: per run a mapping with `bytes` and `seconds`, one number per frame.

    Raises:
        DataError: no run, a run without either list, or an empty list.
    """
    figure = _figure((10, 4))
    memory, time = figure.subplots(1, 2)
    for index, (name, lists) in enumerate(_some(series, "run").items()):
        for axes, key, unit in ((memory, "bytes", _MIB), (time, "seconds", 1)):
            if not len(lists.get(key, ())):
                raise DataError(f"run {name!r} has no {key!r}; a list with one number per frame is needed")
            values = np.asarray(lists[key], dtype=np.float64) / unit
            axes.plot(np.arange(1, len(values) + 1), values, label=name, **_style(index, len(values)))
    _finish(memory, "frames seen", "cache, MiB", "memory")
    _finish(time, "frame", "seconds per frame", "time")
    for axes in (memory, time):
        axes.set_ylim(bottom=0)
    return _png(figure)


def _figure(size: tuple[float, float]) -> Any:
    """An empty figure that draws without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise KvsieveError("plots need matplotlib, which is not installed: pip install 'kvsieve[geometry]'") from error
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(wspace=0.04))
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _style(index: int, frames: int) -> dict[str, Any]:
    """Colour, line and marker of the run at an index; a single frame is a point, many are a line."""
    line = _LINES[(index // len(_COLOURS) + index) % len(_LINES)]
    marker = _MARKERS[index % len(_MARKERS)] if frames <= 12 else ""
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": line, "marker": marker, "markersize": 4}


def _finish(axes: Any, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.locator_params(axis="x", nbins=7, integer=xlabel.startswith("frame"))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8)


def _names(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside the points, pushed up where they would lie on one another."""
    gap, wide, per_point = 10.0, 90.0, axes.figure.dpi / 72
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: point[1]):
        px, py = (float(value) / per_point for value in axes.transData.transform((x, y)))
        text_y = py + 6
        for other_x, other_y in placed:
            if abs(other_x - px) < wide and text_y - other_y < gap:
                text_y = other_y + gap
        placed.append((px, text_y))
        side = "right" if x > 85 else "left"
        axes.annotate(
            name, (x, y), xytext=(-7 if side == "right" else 7, text_y - py), textcoords="offset points", fontsize=7,
            ha=side, va="center", arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0},
        )  # fmt: skip


def _onto(path: Tensor, target: Tensor) -> Tensor:
    """Camera centres `[S, 3]` brought onto others."""
    try:
        sim3 = umeyama(path, target)
    except DataError:
        sim3 = Sim3(1.0, torch.eye(3, dtype=torch.float64), target[0] - path[0])
    return sim3.apply(path)


def _some(given: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    if not given:
        raise DataError(f"no {what} was given; pass at least one by name")
    return given


def _table(name: str, rows: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Tokens per frame and layer."""
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise DataError(f"run {name!r} must have one count per layer for every frame; its frames have {sorted(widths)}")
    return np.array([list(row) for row in rows], dtype=np.float64)
