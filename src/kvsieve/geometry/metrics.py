"""How good predicted depth, cameras and points are, against the truth or against another run.

Numbers are computed in float64 on the CPU. Depth is z along the view, extrinsics are world-to-camera `[R | t]` with
axes right, down, forward (OpenCV), lengths are in the unit of the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, PolicyError
from .alignment import ALIGNMENTS, Sim3, camera_centres, check_poses, double, fit_scale, umeyama, valid_pixels

__all__ = [
    "POINT_ALIGNMENTS",
    "ate",
    "depth_metrics",
    "distance_to",
    "nearest_distances",
    "point_metrics",
    "rpe",
    "trajectory_metrics",
    "unproject",
]

POINT_ALIGNMENTS = ("sim3", "scale", "none")
_LEAST_DEPTH = 1e-5
_QUERIES, _CLOUD = 256, 512
"""Block of distances computed at once: 1 MiB in float64, which fits a processor's own cache."""


def depth_metrics(pred: Tensor, gt: Tensor, mask: Tensor | None = None, align: str = "scale") -> dict[str, float]:
    """The errors of a sequence's depth over its valid pixels, after one scale for the whole sequence.

    With p the aligned prediction and g the truth: `abs_rel` mean |p - g| / g, `sq_rel` mean (p - g)^2 / g, `rmse`,
    `log_rmse` of ln p - ln g, and `delta_1.25`, `delta_1.25^2`, `delta_1.25^3`, the shares of pixels with
    max(p/g, g/p) below the bound. In the last four p is at least 1e-5. `valid_pixels` and `scale` tell what was used.
    To score a data set as published, average over sequences with `valid_pixels` as weights.

    Args:
        pred, gt: depth of one shape, such as `[S, H, W]`; the prediction is resized to the truth, not the other way.
        mask: bool, same shape, True where pixels count. Truth that is not finite or not above 0 never counts.
        align: `"scale"`, `"median"` or `"none"`, see `align_scale`.

    Raises:
        DataError: no pixel is valid, shapes differ, or the prediction is not finite where it counts.
        PolicyError: an unknown alignment.

    Source: Eigen et al. 2014 (the metrics); the video depth protocol of MonST3R, CUT3R and STream3R.
    """
    if align not in ALIGNMENTS:
        raise PolicyError(f"align={align!r} is not one of {', '.join(ALIGNMENTS)}")
    valid = valid_pixels(pred, gt, mask)
    p, g = double(pred)[valid], double(gt)[valid]
    scale = fit_scale(p, g, align)
    p = scale * p
    error = p - g
    positive = p.clamp_min(_LEAST_DEPTH)
    ratio = torch.maximum(positive / g, g / positive)
    values = {
        "abs_rel": (error.abs() / g).mean(),
        "sq_rel": (error.square() / g).mean(),
        "rmse": error.square().mean().sqrt(),
        "log_rmse": (positive.log() - g.log()).square().mean().sqrt(),
        "delta_1.25": (ratio < 1.25).double().mean(),
        "delta_1.25^2": (ratio < 1.25**2).double().mean(),
        "delta_1.25^3": (ratio < 1.25**3).double().mean(),
    }
    return {name: float(value) for name, value in values.items()} | {"valid_pixels": len(p), "scale": scale}


def trajectory_metrics(pred: Tensor, gt: Tensor, delta: int = 1) -> dict[str, float]:
    """Errors of a camera path after one similarity (rotation, translation, scale) fitted to the camera centres.

    `ate`: RMSE of the distance between camera centres. `rpe_translation` and `rpe_rotation_deg`: RMSE over all frame
    pairs (i, i + delta) of the length, and of the angle in degrees, of the motion that leads from the true relative
    pose to the predicted one. `scale` is the fitted one.

    Args:
        pred, gt: world-to-camera extrinsics `[S, 3, 4]`, S above `delta`.
        delta: frames between the two of a pair.

    Raises:
        DataError: shapes differ, too few frames, no rotations, or cameras that all stand in one place.

    Source: Sturm et al. 2012; the settings are those of evo with `align`, `correct_scale`, `all_pairs`, 1 frame.
    """
    truth, poses = check_poses(gt), check_poses(pred)
    if truth.shape != poses.shape:
        raise DataError(f"{len(poses)} predicted and {len(truth)} true cameras; there must be one per frame in both")
    if delta < 1 or len(poses) <= delta:
        raise DataError(f"{len(poses)} cameras give no pair of frames {delta} apart; delta is 1 to the frames less one")
    sim3 = umeyama(camera_centres(pred), camera_centres(gt))
    missed = (sim3.apply(camera_centres(pred)) - camera_centres(gt)).norm(dim=1)
    turn, shift = _relative(poses, delta, sim3.scale)
    true_turn, true_shift = _relative(truth, delta, 1.0)
    length = (shift - true_shift).norm(dim=1)
    angle = _angles(true_turn.mT @ turn)
    return {"ate": _rms(missed), "rpe_translation": _rms(length), "rpe_rotation_deg": _rms(angle), "scale": sim3.scale}


def ate(pred: Tensor, gt: Tensor) -> float:
    """Absolute trajectory error, in the unit of the truth; see `trajectory_metrics`."""
    return trajectory_metrics(pred, gt)["ate"]


def rpe(pred: Tensor, gt: Tensor, delta: int = 1) -> tuple[float, float]:
    """Relative pose error: translation (unit of the truth) and rotation (degrees); see `trajectory_metrics`."""
    errors = trajectory_metrics(pred, gt, delta)
    return errors["rpe_translation"], errors["rpe_rotation_deg"]


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor, pixel_offset: float = 0.5) -> Tensor:
    """World points of a depth map: pixel (column u, row v) at depth z lies at `R^T (z K^-1 [u, v, 1] - t)`.

    Args:
        depth: z along the view, `[..., H, W]`.
        extrinsics: world-to-camera `[..., 3, 4]`.
        intrinsics: `[..., 3, 3]` in pixels, without skew.
        pixel_offset: where in a pixel its ray passes. 0.5 is the middle, as the principal point counts from the corner
            of the image; 0 gives the numbers of VGGT's own unprojection, half a pixel off.

    Returns:
        `[..., H, W, 3]` in the type and on the device of `depth`.

    Raises:
        DataError: leading sizes or last sizes do not fit.
    """
    lead = depth.shape[:-2]
    if depth.ndim < 2 or extrinsics.shape != (*lead, 3, 4) or intrinsics.shape != (*lead, 3, 3):
        raise DataError(
            f"depth {list(depth.shape)}, extrinsics {list(extrinsics.shape)} and intrinsics {list(intrinsics.shape)} "
            "do not fit: [..., H, W], [..., 3, 4] and [..., 3, 3] with equal leading sizes are needed"
        )
    pose, camera = extrinsics.to(depth), intrinsics.to(depth)
    rows, columns = (torch.arange(side).to(depth) + pixel_offset for side in depth.shape[-2:])
    rows = rows.unsqueeze(1)
    fx, fy, cx, cy = (camera[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    seen = torch.stack([(columns - cx) / fx * depth, (rows - cy) / fy * depth, depth], dim=-1)
    return torch.einsum("...ji,...hwj->...hwi", pose[..., :3], seen - pose[..., None, None, :, 3])


def nearest_distances(points: Tensor, cloud: Tensor) -> Tensor:
    """Distance of every point to the nearest one of a cloud; exact, in blocks that need 1 MiB.

    Args:
        points, cloud: `[N, 3]` and `[M, 3]`, finite.

    Returns:
        float64 `[N]` on the CPU.

    Raises:
        DataError: other shapes, an empty cloud, or values that are not finite.
    """
    for name, values in (("points", points), ("cloud", cloud)):
        if values.ndim != 2 or values.shape[1] != 3 or not values.isfinite().all():
            raise DataError(f"{name} of shape {list(values.shape)} must be finite [N, 3]")
    if not len(cloud):
        raise DataError("the cloud to search is empty; it needs at least one point")
    queries, candidates = double(points), double(cloud)
    nearest = []
    for block in torch.split(queries, _QUERIES):
        best = torch.full((len(block),), torch.inf, dtype=torch.float64)
        for part in torch.split(candidates, _CLOUD):
            # Exact differences: the product form of cdist loses half of the digits of points that lie close.
            distances = torch.cdist(block, part, compute_mode="donot_use_mm_for_euclid_dist")
            best = torch.minimum(best, distances.amin(dim=1))
        nearest.append(best)
    return torch.cat(nearest) if nearest else queries.new_zeros(0)


def point_metrics(
    pred: Tensor,
    gt: Tensor,
    mask: Tensor | None = None,
    align: str = "sim3",
    max_points: int | None = 20_000,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy (predicted to nearest true point) and completeness (true to nearest predicted), mean and median.

    Both clouds come per pixel, so the alignment uses the known pairs: `"sim3"` is `umeyama`, `"scale"` one factor about
    the origin (the first camera) by least squares, `"none"` nothing. All valid pairs take part in it; distances are
    then measured between the same `max_points` random pairs of both clouds, as a denser cloud is closer to everything.
    Published tables refine by ICP and cut the images first, so these numbers do not compare with theirs.

    Args:
        pred, gt: points `[..., 3]` of one shape, such as `[S, H, W, 3]`. True points that are not finite do not count.
        mask: bool `[...]`, True where points count.
        max_points: pairs measured at most; None measures all (time grows with the square).
        seed: of the choice of pairs.

    Returns:
        `accuracy_mean`, `accuracy_median`, `completeness_mean`, `completeness_median` (unit of the truth), `scale`,
        and `points`, the number of pairs measured.

    Raises:
        DataError: shapes differ, nothing is valid, predictions are not finite there, or points all coincide.
        PolicyError: an unknown alignment or a `max_points` below 1.
    """
    if align not in POINT_ALIGNMENTS:
        raise PolicyError(f"align={align!r} is not one of {', '.join(POINT_ALIGNMENTS)}")
    if max_points is not None and max_points < 1:
        raise PolicyError(f"max_points={max_points} must be 1 or more, or None for all")
    if pred.shape != gt.shape or gt.shape[-1:] != (3,):
        raise DataError(f"points have shapes {list(pred.shape)} and {list(gt.shape)}; both must be [..., 3] and equal")
    truth = double(gt)
    valid = truth.isfinite().all(dim=-1)
    if mask is not None:
        if mask.shape != valid.shape or mask.dtype != torch.bool:
            raise DataError(f"the mask is {mask.dtype} {list(mask.shape)}; it must be bool {list(valid.shape)}")
        valid &= mask.cpu()
    p, g = double(pred)[valid], truth[valid]
    if not len(g):
        raise DataError("no point is valid: true points must be finite somewhere inside the mask")
    if not p.isfinite().all():
        raise DataError("predicted points are NaN or infinite where the truth is valid")
    sim3 = _align_points(p, g, align)
    p = sim3.apply(p)
    if max_points is not None and len(g) > max_points:
        chosen = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))[:max_points]
        p, g = p[chosen], g[chosen]
    accuracy, completeness = nearest_distances(p, g), nearest_distances(g, p)
    return {
        "accuracy_mean": float(accuracy.mean()),
        "accuracy_median": float(accuracy.median()),
        "completeness_mean": float(completeness.mean()),
        "completeness_median": float(completeness.median()),
        "scale": sim3.scale,
        "points": len(g),
    }


def distance_to(pred: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far one run is from another on the same frames, such as a small cache from the full one; nothing is aligned.

    A run is a mapping with any of `depth` `[S, H, W]` (or `[S, H, W, 1]`), `extrinsics` `[S, 3, 4]` and `world_points`
    `[S, H, W, 3]`; what both have is compared, other keys are left alone.

    Returns:
        Each of these once for all frames, and as a list under its name with `_per_frame`:
        `depth_rel` mean |p - r| / |r|; `translation` distance of camera centres (mean) and `rotation_deg` angle between
        cameras (mean), both in the model's own unit and degrees; `points_rmse` RMSE of the points over the scene's
        size, which is the mean distance of the reference's points to their median, returned as `scene_size`.

    Raises:
        DataError: nothing to compare, shapes differ, or values are not finite.
    """
    known = ("depth", "extrinsics", "world_points")
    shared = [name for name in known if name in pred and name in reference]
    if not shared:
        raise DataError(
            f"the two runs share none of {', '.join(known)}; they have {sorted(pred)} and {sorted(reference)}"
        )
    result: dict[str, Any] = {}
    for name in shared:
        p, r = double(pred[name]), double(reference[name])
        if p.shape != r.shape or not p.numel():
            raise DataError(f"{name} has shapes {list(p.shape)} and {list(r.shape)}; they must be equal and not empty")
        if not (p.isfinite().all() and r.isfinite().all()):
            raise DataError(f"{name} holds NaN or infinite values")
        if name == "depth":
            _check_rank(name, r, (3, 4), "[S, H, W]")
            if not r.all():
                raise DataError("the reference depth is 0 somewhere, so a relative difference does not exist")
            result |= _mean_and_frames("depth_rel", ((p - r).abs() / r.abs()).flatten(1).mean(dim=1))
        elif name == "extrinsics":
            result |= _mean_and_frames("translation", (camera_centres(p) - camera_centres(r)).norm(dim=1))
            result |= _mean_and_frames("rotation_deg", _angles(check_poses(r)[:, :, :3].mT @ check_poses(p)[:, :, :3]))
        else:
            _check_rank(name, r, (4,), "[S, H, W, 3]")
            cloud = r.reshape(-1, 3)
            size = float((cloud - cloud.median(dim=0).values).norm(dim=1).mean())
            if not size:
                raise DataError("all points of the reference coincide, so the scene has no size")
            squares = (p - r).square().sum(dim=-1).flatten(1).mean(dim=1)
            result |= {"points_rmse": float(squares.mean().sqrt() / size), "scene_size": size}
            result["points_rmse_per_frame"] = (squares.sqrt() / size).tolist()
    return result


def _align_points(pred: Tensor, gt: Tensor, align: str) -> Sim3:
    if align == "sim3":
        return umeyama(pred, gt)
    scale = 1.0
    if align == "scale":
        scale = float((pred * gt).sum() / pred.square().sum())
        if not scale > 0:
            raise DataError(f'the best scale of the points is {scale:.3g}; it must be above 0: use align="sim3"')
    return Sim3(scale, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def _relative(poses: Tensor, delta: int, scale: float) -> tuple[Tensor, Tensor]:
    """Rotations and scaled translations of camera i + delta in the frame of camera i."""
    first, second = poses[:-delta], poses[delta:]
    turn = first[:, :, :3] @ second[:, :, :3].mT
    return turn, scale * (first[:, :, 3] - torch.einsum("sij,sj->si", turn, second[:, :, 3]))


def _angles(turns: Tensor) -> Tensor:
    """Degrees `[S]` of rotations `[S, 3, 3]`; the tangent keeps digits that the cosine alone loses near 0."""
    sine = torch.stack([turns[:, i, j] - turns[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))]).norm(dim=0)
    cosine = turns.diagonal(dim1=1, dim2=2).sum(dim=1) - 1
    return torch.rad2deg(torch.atan2(sine, cosine))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _mean_and_frames(name: str, values: Tensor) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name}_per_frame": values.tolist()}


def _check_rank(name: str, values: Tensor, ranks: tuple[int, ...], allowed: str) -> None:
    if values.ndim not in ranks:
        raise DataError(f"{name} has shape {list(values.shape)}; {allowed} is needed: take one sequence of a batch")
