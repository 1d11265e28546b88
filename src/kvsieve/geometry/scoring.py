"""What a recording is worth: against the truth, against the full cache, and against what needs no stream at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .metrics import depth_metrics, distance_to, point_metrics, trajectory_metrics
from .recording import Recording
from .scenes import Sequence3D

__all__ = [
    "TO_FULL",
    "TO_TRUTH",
    "against_full",
    "against_truth",
    "best_constant",
    "depth_error",
    "difference",
    "means",
]

TO_TRUTH = (
    "abs_rel", "delta_1.25", "ate", "rpe_translation", "rpe_rotation_deg", "accuracy_mean", "completeness_mean",
)  # fmt: skip
"""Names of the numbers against the truth."""
TO_FULL = ("depth_rel_to_full", "translation_to_full", "rotation_deg_to_full", "points_rmse_to_full")
"""Names of the numbers against the full cache."""
POINTS = 2000
"""Points that the distances between clouds are measured at."""
RESAMPLES = 2000
LEAST_SCENES = 3
"""Scenes that an interval needs."""

Scores = dict[str, float | None]
"""A number is `None` where it cannot be measured, such as the path of a camera that stands still."""


def against_truth(out: Recording, truth: Sequence3D, seed: int) -> Scores:
    """Depth after one scale for the sequence, the camera path and the points after one similarity each."""
    path = _tried(lambda: trajectory_metrics(out.extrinsics, truth.extrinsics))
    step = slice(None, None, out.stride)
    points = _tried(lambda: point_metrics(out.points, truth.points[:, step, step], max_points=POINTS, seed=seed))
    return depth_error(out.depth_of(slice(None)), truth.depth) | {
        name: found.get(name) for found, names in ((path, TO_TRUTH[2:5]), (points, TO_TRUTH[5:])) for name in names
    }


def depth_error(depth: Tensor, truth: Tensor, align: str = "scale") -> Scores:
    """`abs_rel`, `delta_1.25`, and the scale used as `depth_scale`."""
    found = _tried(lambda: depth_metrics(depth, truth, align=align))
    return {"abs_rel": found.get("abs_rel"), "delta_1.25": found.get("delta_1.25"), "depth_scale": found.get("scale")}


def best_constant(truth: Tensor) -> Tensor:
    """The one depth for all pixels of a sequence with the least AbsRel, in the shape of the truth: the median, every
    pixel weighted by 1 / depth."""
    values = truth[truth.isfinite() & (truth > 0)].double().sort().values
    below = (1 / values).cumsum(0)
    return torch.full_like(truth, float(values[torch.searchsorted(below, below[-1:] / 2)[0]]))


def against_full(out: Recording, full: Recording) -> Scores:
    """See `metrics.distance_to`; frame by frame, as a long stream's depth need not fit into memory."""

    def depth_rel(frame: int) -> float:
        return distance_to({"depth": out.depth_of(frame)[None]}, {"depth": full.depth_of(frame)[None]})["depth_rel"]

    depth = _tried(lambda: {"rel": math.fsum(depth_rel(i) for i in range(len(out.depth))) / len(out.depth)})
    rest = _tried(
        lambda: distance_to(
            {"extrinsics": out.extrinsics, "world_points": out.points},
            {"extrinsics": full.extrinsics, "world_points": full.points},
        )
    )
    return {
        "depth_rel_to_full": depth.get("rel"),
        "translation_to_full": rest.get("translation"),
        "rotation_deg_to_full": rest.get("rotation_deg"),
        "points_rmse_to_full": rest.get("points_rmse"),
    }


def means(scenes: Sequence[Scores]) -> Scores:
    """Mean over scenes of every number; `None` if a scene lacks it."""
    out: Scores = {}
    for name in scenes[0] if scenes else ():
        values = [scene[name] for scene in scenes]
        out[name] = None if None in values else math.fsum(v for v in values if v is not None) / len(values)
    return out


def difference(scenes: Sequence[Scores], full: Sequence[Scores], seed: int) -> dict[str, dict[str, float | None]]:
    """Per number against the truth: mean over scenes of the difference to the full cache, and the ends `low` and
    `high` of its 95 % bootstrap interval. Scenes are drawn, the same ones for both, so how hard a scene is drops
    out."""
    out: dict[str, dict[str, float | None]] = {}
    drawn = np.random.default_rng(seed).integers(len(scenes), size=(RESAMPLES, len(scenes)))
    for name in TO_TRUTH:
        pairs = [(one.get(name), other.get(name)) for one, other in zip(scenes, full, strict=True)]
        gaps = np.array([a - b for a, b in pairs if a is not None and b is not None])
        if len(gaps) < len(pairs):
            continue
        low = high = None
        if len(gaps) >= LEAST_SCENES:
            low, high = (float(end) for end in np.quantile(gaps[drawn].mean(1), [0.025, 0.975]))
        out[name] = {"mean": float(gaps.mean()), "low": low, "high": high}
    return out


def _tried(measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Nothing where the predictions allow no such measurement."""
    try:
        return measure()
    except DataError:
        return {}
