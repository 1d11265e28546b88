"""The picture of a comparison: quality against memory."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

__all__ = ["has_matplotlib", "label_points", "quality_against_memory"]

_COLOURS = {"none": "#000000", "ratio": "#0072B2", "threshold": "#D55E00"}
_MARKERS = {"none": "*", "ratio": "o", "threshold": "D"}
_LARGEST = 1e30
"""Perplexities beyond this are in the table only."""
_LABELS = {"none": "full cache", "ratio": "ratio method", "threshold": "threshold method"}


def has_matplotlib() -> bool:
    """Whether plots can be drawn (the extra `plot`)."""
    return find_spec("matplotlib") is not None


def quality_against_memory(summary: dict[str, Any]) -> bytes:
    """A PNG: measured cache held (share of the full cache's bytes) against perplexity, one labelled point per method.

    Colours are those of Okabe and Ito, told apart also by shape. Perplexity is on a logarithmic axis where the worst
    is over four times the best.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [
        (100 * r["bytes_held"] / r["bytes_full"], float(r["perplexity"]), r["method"], r["kind"])
        for r in summary["results"]
        if r["status"] == "ok" and float(r["perplexity"]) < _LARGEST
    ]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [point[1] for point in points] or [1.0]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
    for kind, label in _LABELS.items():
        here = [(x, y) for x, y, _, k in points if k == kind]
        if here:
            xs, ys = zip(*here, strict=True)
            axes.scatter(xs, ys, c=_COLOURS[kind], marker=_MARKERS[kind], s=45, label=label, zorder=3)
    full = summary["baseline_perplexity"]
    if full is not None and float(full) < _LARGEST:
        axes.axhline(float(full), color=_COLOURS["none"], linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(0, max(105.0, *(1.05 * x for x, *_ in points)) if points else 105.0)
    axes.margins(y=0.12)
    figure.draw_without_rendering()
    label_points(axes, points)
    axes.set_xlabel("cache held at the end of the text, % of the full cache (measured bytes)")
    axes.set_ylabel("perplexity (lower is better)")
    run = summary["run"]
    axes.set_title(f"{run['model']}: quality against memory, {run['samples']} texts", fontsize=11)
    axes.grid(alpha=0.25)
    if points:
        axes.legend(loc="best", fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def label_points(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names beside the points. Points at one memory lie above each other, so names are pushed apart and tied to their
    points by a thin line."""
    gap = 11.0  # points of text height
    to_pixels, per_point = axes.transData, axes.figure.dpi / 72
    placed: list[tuple[float, float]] = []
    for x, y, name, kind in sorted(points, key=lambda p: p[1]):
        px, py = (value / per_point for value in to_pixels.transform((x, y)))
        text_y = py
        for other_x, other_y in placed:
            if abs(other_x - px) < 110 and text_y - other_y < gap:
                text_y = other_y + gap
        placed.append((px, text_y))
        left = x > 85
        if kind == "none":
            text_y += gap  # off the line that it stands on
        axes.annotate(
            name, (x, y), xytext=(-14 if left else 14, text_y - py), textcoords="offset points", fontsize=8,
            va="center", ha="right" if left else "left", color=_COLOURS[kind],
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
