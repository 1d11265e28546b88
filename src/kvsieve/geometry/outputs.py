"""What a run of `kvsieve geometry` leaves behind: pictures, clouds, numbers, and tables of the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..report.tables import markdown_table
from .export import depth_limits, point_cloud, write_depth_png, write_glb, write_ply
from .recording import Recording
from .scenes import Sequence3D
from .scoring import depth_error

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "HOW_TO_READ",
    "limits_of",
    "markdown",
    "terminal_table",
    "write_cloud",
    "write_depths",
    "write_json",
    "write_pictures",
]

HOW_TO_READ = (
    "How to read it: `held` is what the caches really held after the last frame (measured bytes of keys and values, "
    "trunk and camera head), `of full` the same as a share of all keys and values of the stream "
    "(above 100 % where a store has free room for more). Depth errors are "
    "after one scale per sequence, camera and point errors after one similarity, all in units of the scene; AbsRel, "
    "ATE, RPE, accuracy and completeness: lower is better. `to full` columns compare with the run that evicts nothing."
)
_MOST_DRAWN = 7
"""Runs in one picture."""


# ---- pictures and clouds


def limits_of(out: Recording) -> tuple[float, float]:
    """Depths of the first and last colour, for all runs of a sequence."""
    step = max(1, out.stride)
    return depth_limits(torch.from_numpy(out.depth[:, ::step, ::step].copy()))


def write_depths(folder: Path, out: Recording, limits: tuple[float, float]) -> None:
    """`depth_0000.png` and so on; those of an earlier run go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("depth_*.png"):
        old.unlink()
    for index in range(len(out.depth)):
        write_depth_png(folder / f"depth_{index:04d}.png", out.depth_of(index), limits)


def write_cloud(folder: Path, out: Recording, seed: int) -> None:
    """`points.ply`, and `points.glb` for web pages: the 70 % of the points that the model is surest of."""
    held = {"world_points": out.points, "world_points_conf": out.confidence, "images": out.colours}
    points, colours = point_cloud(held, seed=seed)
    write_ply(folder / "points.ply", points, colours)
    write_glb(folder / "points.glb", points, colours)


def write_pictures(
    folder: Path,
    recordings: Mapping[str, Recording],
    result: dict[str, Any],
    truth: Sequence3D | None,
) -> list[Path]:
    """`tokens.png`, `growth.png`, `trajectory.png`, `depths.png` and `quality.png`, all of the first sequence but the
    last. Where runs differ in budget only, that with the smallest one is drawn."""
    from . import plots

    rows = [row for row in result["runs"] if row["status"] == "ok"]
    drawn = [row["name"] for row in _smallest(rows)]
    first = recordings[rows[0]["name"]]
    depths = {name: _scaled(recordings[name], truth) for name in drawn}
    paths = {name: recordings[name].extrinsics for name in drawn}
    pictures = {
        "tokens.png": plots.tokens_over_frames(_alike({row["name"]: recordings[row["name"]].tokens for row in rows})),
        "growth.png": plots.growth(
            {name: {"bytes": recordings[name].held, "seconds": recordings[name].seconds} for name in drawn}
        ),
        "trajectory.png": plots.trajectory(paths, None if truth is None else truth.extrinsics),
        "depths.png": plots.depth_strip(first.colours, depths if truth is None else {"truth": truth.depth, **depths}),
    }
    measured = "abs_rel" if truth is not None else "depth_rel_to_full"
    points = [
        {"method": row["method"], "held": row["share_of_full"], "value": row["metrics"][measured], "label": row["name"]}
        for row in rows
        if row["metrics"].get(measured) is not None
    ]
    if len(points) > 1:
        label = "AbsRel" if truth is not None else "depth, relative distance to the full cache"
        pictures["quality.png"] = plots.quality_against_budget(points, f"{label} (lower is better)")
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in pictures]


def _smallest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs without a share of the stream as budget, and of the others those with the smallest share."""
    least = min((row["budget_ratio"] for row in rows if row["budget_ratio"] is not None), default=None)
    return [row for row in rows if row["budget_ratio"] in (None, least)][:_MOST_DRAWN]


def _alike(tables: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Runs that hold equally much at every frame under one name, since their lines would hide each other."""
    groups: list[tuple[list[str], list[list[int]]]] = []
    for name, table in tables.items():
        group = next((names for names, other in groups if other == table), None)
        if group is None:
            groups.append(([name], table))
        else:
            group.append(name)
    return {names[0] + (f" (and {len(names) - 1} more)" if names[1:] else ""): table for names, table in groups}


def _scaled(out: Recording, truth: Sequence3D | None) -> Tensor:
    """Depth in the unit of the truth."""
    depth = torch.from_numpy(out.depth)
    return depth if truth is None else depth * (depth_error(depth, truth.depth)["depth_scale"] or 1.0)


# ---- numbers


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Numbers that are not finite become null."""
    path.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    """The table, how to read it, and what produced it."""
    run = result["run"]
    head, rows = _table(result)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    failed = [f"- {row['name']} failed: {row['error']}" for row in result["runs"] if row["status"] != "ok"]
    about = [
        f"- Model: {run['model']}. Frames: {run['scenes']} x {run['frames']} of {run['height']}x{run['width']} pixels, "
        f"{run['tokens_per_frame']} tokens each. Seed {run['seed']}.",
        f"- {versions}; {run['hardware']}.",
        f"- `{run['command']}`",
    ]
    notes = [f"- {note}" for note in result["notes"]]
    parts = ["# Streaming reconstruction under a memory budget", markdown_table(head, rows), HOW_TO_READ]
    parts += ["\n".join(lines) for lines in (notes, failed, about) if lines]
    return "\n\n".join(parts) + "\n"


_LEAST_NEEDED = (
    "points to full", "RPE rot", "completeness", "tokens/layer", "camera to full", "accuracy", "RPE", "s/frame",
    "d<1.25", "depth to full", "held", "95 % interval",
)  # fmt: skip


def terminal_table(result: dict[str, Any], width: int) -> Table:
    """The same for `rich`; where `width` characters are too few, the least needed columns are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    head, rows = _table(result)
    widths = [max(len(line[i]) for line in (head, *rows)) + 2 for i in range(len(head))]
    shown = list(range(len(head)))
    for name in _LEAST_NEEDED:
        if sum(widths[i] + 1 for i in shown) + 1 > width and name in head:
            shown.remove(head.index(name))
    table = Table(title="What each run holds and what it costs", title_justify="left", box=SIMPLE_HEAD)
    for i in shown:
        table.add_column(head[i], justify="left" if i == 0 else "right", no_wrap=True)
    references = len(result["references"])
    for index, row in enumerate(rows):
        style = "bold" if row[0] == "full" else "dim" if index >= len(rows) - references else ""
        table.add_row(*(Text(row[i]) for i in shown), style="red" if "failed" in row[1:2] else style)
    return table


def _table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns that no row fills are left out."""
    lines = [_cells(row) for row in result["runs"]]
    lines += [
        {"run": f"({name})", **_metric_cells({"metrics": metrics})} for name, metrics in result["references"].items()
    ]
    head = [name for name in lines[0] if any(line.get(name) for line in lines)]
    head += [name for line in lines for name in line if name not in head and line[name]]
    head = sorted(dict.fromkeys(head), key=_ORDER.index)
    return head, [[line.get(name, "") for name in head] for line in lines]


_ORDER = (
    "run", "tokens/layer", "held", "of full", "s/frame", "AbsRel", "change", "95 % interval", "d<1.25", "ATE", "RPE",
    "RPE rot", "accuracy", "completeness", "depth to full", "camera to full", "points to full",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> dict[str, str]:
    if row["status"] != "ok":
        return {"run": row["name"], "tokens/layer": "failed"}
    layers = row["tokens_per_layer"]
    tokens = f"{layers[0]}" if min(layers) == max(layers) else f"{min(layers)} to {max(layers)}"
    return {
        "run": row["name"],
        "tokens/layer": tokens,
        "held": f"{row['bytes_held'] / 2**20:.2f} MiB",
        "of full": f"{row['share_of_full']:.1%}",
        "s/frame": f"{row['seconds_per_frame']:.3f}",
        **_metric_cells(row),
    }


def _metric_cells(row: dict[str, Any]) -> dict[str, str]:
    metrics, gap = row["metrics"], row.get("difference_to_full", {}).get("abs_rel")
    interval = gap is not None and gap["low"] is not None
    angle = metrics.get("rpe_rotation_deg")
    return {
        "AbsRel": _number(metrics.get("abs_rel")),
        "change": _number(gap["mean"], "+.4f") if gap else "",
        "95 % interval": f"{gap['low']:+.4f} to {gap['high']:+.4f}" if gap and interval else "",
        "d<1.25": _number(metrics.get("delta_1.25"), ".3f"),
        "ATE": _number(metrics.get("ate")),
        "RPE": _number(metrics.get("rpe_translation")),
        "RPE rot": "" if angle is None else f"{angle:.2f} deg",
        "accuracy": _number(metrics.get("accuracy_mean")),
        "completeness": _number(metrics.get("completeness_mean")),
        "depth to full": _number(metrics.get("depth_rel_to_full")),
        "camera to full": _number(metrics.get("translation_to_full")),
        "points to full": _number(metrics.get("points_rmse_to_full")),
    }


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form) if abs(value) < 1e4 else f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
