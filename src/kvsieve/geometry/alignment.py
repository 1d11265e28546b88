"""What a prediction without a unit needs before it can be judged: a scale for depth, a similarity for the rest.

All arithmetic is in float64 on the CPU; inputs may be of any floating type and on any device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DataError, PolicyError

__all__ = [
    "ALIGNMENTS",
    "Sim3",
    "align_scale",
    "camera_centres",
    "check_poses",
    "double",
    "fit_scale",
    "umeyama",
    "valid_pixels",
]

ALIGNMENTS = ("scale", "median", "none")
STEPS, SMALLEST, SOFTENING = 10, 1e-3, 1e-8
"""Steps of the reweighted fit, the least scale it may give, and what keeps its weights finite."""
_RANK = 1e-9
"""A singular value below this share of the largest counts as zero."""


class Sim3(NamedTuple):
    """A similarity of space, `x -> scale * rotation @ x + translation`: a float, `[3, 3]` and `[3]` in float64."""

    scale: float
    rotation: Tensor
    translation: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Points `[..., 3]` moved; float64."""
        return self.scale * double(points) @ self.rotation.T + self.translation


def align_scale(pred: Tensor, gt: Tensor, mask: Tensor | None = None, method: str = "scale") -> float:
    """The one factor that brings the depth of a whole sequence to the true unit.

    `"scale"` minimises the sum of |s p - g|: it starts at mean(g) / mean(p) and takes ten steps of least squares with
    weights 1 / (|s p - g| + 1e-8), so that wrong pixels weigh little. `"median"` is median(g) / median(p), the lower
    median where the count is even. `"none"` is 1. A scale below 1e-3 becomes 1e-3.

    Args:
        pred, gt: depth of one shape, such as `[S, H, W]`. Truth that is not finite or not above 0 is left out.
        mask: bool, same shape; True where pixels count.
        method: one of `ALIGNMENTS`.

    Raises:
        DataError: shapes differ, no pixel is valid, or the prediction there is not finite or has no scale.
        PolicyError: an unknown method.

    Source: the video depth protocol of MonST3R, CUT3R and STream3R (`--align scale`); the steps are Weiszfeld's.
    """
    if method not in ALIGNMENTS:
        raise PolicyError(f"align={method!r} is not one of {', '.join(ALIGNMENTS)}")
    valid = valid_pixels(pred, gt, mask)
    return fit_scale(double(pred)[valid], double(gt)[valid], method)


def fit_scale(pred: Tensor, gt: Tensor, method: str) -> float:
    """`align_scale` of valid pixels `[N]`."""
    if method == "none":
        return 1.0
    middle = pred.mean() if method == "scale" else pred.median()
    if not middle > 0:
        raise DataError(
            f"the predicted depth has {'mean' if method == 'scale' else 'median'} {float(middle):.4g}, so it has no "
            'scale; depth must be above 0 (z along the view), or use align="none"'
        )
    if method == "median":
        return max(float(gt.median() / middle), SMALLEST)
    scale = gt.mean() / middle
    for _ in range(STEPS):
        weights = 1 / ((scale * pred - gt).abs() + SOFTENING)
        scale = (weights * pred * gt).sum() / (weights * pred * pred).sum()
    return max(float(scale), SMALLEST)


def valid_pixels(pred: Tensor, gt: Tensor, mask: Tensor | None) -> Tensor:
    """Bool, shape of `gt`: asked for by the mask, and the truth is finite and above 0.

    Raises:
        DataError: shapes differ, nothing is left, or a prediction that counts is not finite.
    """
    if pred.shape != gt.shape:
        raise DataError(
            f"predicted depth has shape {list(pred.shape)} and the true one {list(gt.shape)}; they must be equal: "
            "resize the prediction, or drop the last axis with depth[..., 0]"
        )
    valid = gt.detach().cpu().isfinite() & (gt.detach().cpu() > 0)
    if mask is not None:
        if mask.shape != gt.shape or mask.dtype != torch.bool:
            raise DataError(
                f"the mask is {mask.dtype} {list(mask.shape)}; it must be bool {list(gt.shape)}, as the depth"
            )
        valid &= mask.cpu()
    if not valid.any():
        raise DataError(
            f"none of {gt.numel()} pixels is valid: the true depth must be finite and above 0 somewhere inside the mask"
        )
    bad = int((~pred.detach().cpu()[valid].isfinite()).sum())
    if bad:
        raise DataError(f"the predicted depth is NaN or infinite at {bad} of {int(valid.sum())} valid pixels")
    return valid


def camera_centres(extrinsics: Tensor) -> Tensor:
    """Where the cameras stand, float64 `[S, 3]`: `-R^T t` of world-to-camera `[S, 3, 4]` = `[R | t]`.

    Raises:
        DataError: another shape, values that are not finite, or an R that is no rotation.
    """
    poses = check_poses(extrinsics)
    return -torch.einsum("sji,sj->si", poses[:, :, :3], poses[:, :, 3])


def umeyama(source: Tensor, target: Tensor, with_scale: bool = True) -> Sim3:
    """The similarity that brings `source` closest to `target` in the least-squares sense; never a reflection.

    Points on a line leave the turn around that line open: every such turn fits equally well, and the one closest to
    no turn at all is taken. (evo refuses these; a camera that drives straight ahead is common, and the errors after
    alignment do not depend on the choice.)

    Args:
        source, target: corresponding points `[N, 3]`, N at least 2.
        with_scale: False fits a rotation and a translation only.

    Raises:
        DataError: other shapes, values that are not finite, fewer than two points, or points that all coincide.

    Source: Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns".
    """
    if source.ndim != 2 or source.shape[-1:] != (3,) or source.shape != target.shape:
        raise DataError(
            f"points to align have shapes {list(source.shape)} and {list(target.shape)}; both must be [N, 3] with one N"
        )
    if len(source) < 2:
        raise DataError(f"{len(source)} points do not determine an alignment; at least 2 are needed")
    source, target = double(source), double(target)
    if not (source.isfinite().all() and target.isfinite().all()):
        raise DataError("points to align are NaN or infinite; drop them first")
    source_middle, target_middle = source.mean(dim=0), target.mean(dim=0)
    source, target = source - source_middle, target - target_middle
    variance = source.square().sum(dim=1).mean()
    for name, spread, middle in (
        ("first", variance, source_middle),
        ("second", target.square().sum(dim=1).mean(), target_middle),
    ):
        if spread.sqrt() <= 1e-12 * max(1.0, float(middle.norm())):
            raise DataError(
                f"all {len(source)} points of the {name} set coincide, so they determine no scale or rotation"
            )
    covariance = target.T @ source / len(source)
    left, values, right = torch.linalg.svd(covariance)
    if values[1] <= _RANK * values[0]:
        # A trace of the identity breaks the tie among equal fits towards the smallest turn.
        nudge = 10 * _RANK * values[0].clamp_min(1e-300) * torch.eye(3, dtype=torch.float64)
        left, _, right = torch.linalg.svd(covariance + nudge)
    signs = torch.ones(3, dtype=torch.float64)
    signs[2] = torch.sign(torch.linalg.det(left) * torch.linalg.det(right))
    rotation = left @ torch.diag(signs) @ right
    scale = float((rotation * covariance).sum() / variance) if with_scale else 1.0
    if scale <= 0:
        raise DataError("the two sets of points have nothing in common: the best scale is 0; check their order")
    return Sim3(scale, rotation, target_middle - scale * rotation @ source_middle)


def double(values: Tensor) -> Tensor:
    """Detached float64 on the CPU."""
    return values.detach().to("cpu", torch.float64)


def check_poses(extrinsics: Tensor) -> Tensor:
    """Checked float64 `[S, 3, 4]`."""
    if extrinsics.ndim != 3 or extrinsics.shape[1:] != (3, 4):
        raise DataError(f"extrinsics have shape {list(extrinsics.shape)}; world-to-camera [S, 3, 4] is needed")
    poses = double(extrinsics)
    if not poses.isfinite().all():
        raise DataError("extrinsics hold NaN or infinite values")
    turns = poses[:, :, :3]
    error = float((turns @ turns.mT - torch.eye(3, dtype=torch.float64)).abs().max()) if len(turns) else math.inf
    if error > 1e-3 or not (torch.linalg.det(turns) > 0).all():
        raise DataError(
            "extrinsics must be [R | t] with rotations R, of one frame at least; "
            f"R R^T differs from the identity by {error:.3g}, or R is a reflection"
        )
    return poses
