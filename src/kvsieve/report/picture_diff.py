"""The picture of two runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .pictures import INK, SOFT, empty_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["diff_figure"]

_A, _B = "#0072B2", "#E69F00"
_HATCH = "///"
_MOST = 12


def diff_figure(diff: dict[str, Any]) -> Figure:
    """Four panels: score with its bootstrap interval, share kept, cache held, seconds; A beside B for every pair.

    What a run does not say is left out, not drawn as zero. The first twelve pairs are drawn.

    Raises:
        KvsieveError: matplotlib is not installed.
    """
    pairs = diff["pairs"][:_MOST]
    figure = empty_figure(max(8.0, 2.0 + 1.1 * len(pairs)), 7.0)
    panels = (
        ("score, 0 to 100", "score", 1.0, True),
        ("tokens kept, %", "kept", 100.0, False),
        ("cache held, MiB", "bytes", 1 / 2**20, False),
        ("seconds, whole method", "seconds", 1.0, False),
    )
    for axes, (label, name, scale, with_interval) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        plain(axes)
        _bars(axes, pairs, name, scale, with_interval)
        axes.set_title(label, fontsize=9, loc="left", color=INK)
        axes.set_xticks(range(len(pairs)), [_name(one) for one in pairs], fontsize=7, rotation=30, ha="right")
        axes.grid(axis="y", alpha=0.2, color=SOFT)
        axes.set_axisbelow(True)
    from matplotlib.patches import Patch

    legend = [Patch(facecolor=_A, label="A"), Patch(facecolor=_B, hatch=_HATCH, edgecolor="white", label="B")]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure


def _bars(axes: Any, pairs: list[dict[str, Any]], name: str, scale: float, with_interval: bool) -> None:
    width = 0.36
    for side, shift, colour, hatch in (("a", -width / 2, _A, ""), ("b", width / 2, _B, _HATCH)):
        known = [(i, one) for i, one in enumerate(pairs) if one[f"{name}_{side}"] is not None]
        places, heights = [i + shift for i, _ in known], [one[f"{name}_{side}"] * scale for _, one in known]
        axes.bar(places, heights, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        for place, (_, one) in zip(places, known, strict=True):
            interval = one[f"interval_{side}"] if with_interval else None
            if interval is not None:
                axes.vlines(place, *interval, color=INK, linewidth=1.2)
    axes.set_xlim(-0.6, len(pairs) - 0.4)


def _name(one: dict[str, Any]) -> str:
    method = one["a"] if one["a"] == one["b"] else f"{one['a']} | {one['b']}"
    length = "" if one["length"] is None else f" {one['length']:,}"
    return f"{method}\n{one['task']}{length}"
