"""Losses: depth and points weighted by the confidence the model gives itself, and the poses of all rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from data import Batch
from matching import matching_loss, same_places, shift_loss
from settings import Recipe

ROUND_DISCOUNT = 0.6  # an earlier round of the camera head counts this much less than the next one
TURN = 3.0  # weight of the quaternion, whose numbers are small
SMOOTH = 0.1  # errors in poses below this are squared


def confident(error: Tensor, confidence: Tensor, price: float) -> Tensor:
    """Mean error, plus a term that is least where the confidence is `price / error`.

    The confidence does not weight the gradient of the error: with weights, what is hard at first (the objects in front
    of the walls) stays unlearned.
    """
    return (error + confidence * error.detach() - price * confidence.log()).mean()


def edge_error(error: Tensor) -> Tensor:
    """Mean absolute difference of signed errors [..., H, W] between neighbours, at three distances."""
    parts = []
    for distance in (1, 2, 4):
        parts.append((error[..., distance:, :] - error[..., :-distance, :]).abs().mean())
        parts.append((error[..., distance:] - error[..., :-distance]).abs().mean())
    return torch.stack(parts).mean()


def pose_error(pose: Tensor, truth: Tensor) -> Tensor:
    """Of encodings [..., 9]; a quaternion and its negative are the same rotation."""
    sign = torch.where((pose[..., 3:7] * truth[..., 3:7]).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    wanted = torch.cat([truth[..., :3], truth[..., 3:7] * sign, truth[..., 7:]], -1)
    weight = torch.tensor([1.0] * 3 + [TURN] * 4 + [1.0] * 2)
    return (huber_loss(pose, wanted, reduction="none", delta=SMOOTH) / SMOOTH * weight).sum(-1).mean()


def losses(out: dict[str, Any], batch: Batch, point_frames: Tensor, patch: int, recipe: Recipe) -> dict[str, Tensor]:
    """The weighted sum as `total`, and its parts."""
    places = same_places(batch, patch)
    signed = out["depth"].log() - batch["depth"].log()
    distance = (out["points"] - batch["points"][:, point_frames]).norm(dim=-1)
    near = batch["depth"][:, point_frames].clamp(min=0.3)
    weights = [ROUND_DISCOUNT ** (len(out["poses"]) - 1 - i) for i in range(len(out["poses"]))]
    rounds = [w * pose_error(pose, batch["pose"]) for w, pose in zip(weights, out["poses"], strict=True)]
    parts = {
        "depth": confident(signed.expm1().abs(), out["depth_conf"], recipe.confidence),
        "points": confident(distance / near, out["points_conf"], recipe.confidence),
        "edges": edge_error(signed),
        "matching": torch.stack([matching_loss(q, k, places) for q, k in out["looked"].values()]).mean(),
        "shift": shift_loss(out["shift"], places),
        "pose": torch.stack(rounds).sum() / sum(weights),
    }
    total = parts["depth"] + recipe.points * parts["points"] + recipe.edges * parts["edges"]
    total = total + recipe.matching * parts["matching"] + recipe.shift * parts["shift"]
    parts["log_depth_error"] = signed.abs().mean()
    return parts | {"total": total + recipe.pose * parts["pose"]}
