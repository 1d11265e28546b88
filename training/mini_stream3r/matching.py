"""Teaches a few attention heads to find the same place in earlier frames.

From depth and poses alone the model would have to discover by itself that looking for the same place in other frames
pays; within a thousand steps it had not. The scenes are rendered, so it is known where a place is seen again.
"""

from __future__ import annotations

import torch
from kvsieve.geometry.pose import decode_pose
from torch import Tensor

from data import Batch

LAYERS = (1, 2, 3)  # global blocks
HEADS = 2  # in each of them; head 0 looks into the first frame, head 1 into all earlier ones
SHIFT_LAYER = 2  # global block after which a patch should know how far its place has moved
AGREES = 0.05  # relative difference in depth up to which a place counts as seen


def same_places(batch: Batch, patch: int) -> Tensor:
    """Patches of all frames that see the place in the middle of a patch: [B, S, P, S], -1 where it is hidden."""
    middle = patch // 2
    points = batch["points"][:, :, middle::patch, middle::patch].flatten(2, 3)  # [B, S, P, 3]
    height, width = batch["depth"].shape[-2:]
    extrinsics, intrinsics = decode_pose(batch["pose"], (height, width))
    camera = torch.einsum("btij,bspj->bspti", extrinsics[..., :3], points) + extrinsics[:, None, None, :, :, 3]
    z = camera[..., 2].clamp(min=1e-3)
    u = (camera[..., 0] / z * intrinsics[:, None, None, :, 0, 0] + width / 2).floor()
    v = (camera[..., 1] / z * intrinsics[:, None, None, :, 1, 1] + height / 2).floor()
    inside = (camera[..., 2] > 1e-3) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v = u.clamp(0, width - 1).long(), v.clamp(0, height - 1).long()
    b, t = torch.arange(z.shape[0]).view(-1, 1, 1, 1), torch.arange(z.shape[3])
    seen = (batch["depth"][b, t, v, u] / z - 1).abs() < AGREES
    return torch.where(inside & seen, v // patch * (width // patch) + u // patch, -1)


def matching_loss(query: Tensor, key: Tensor, places: Tensor) -> Tensor:
    """Mean negative log of the attention that goes to the same place in earlier frames, where there is one.

    Args:
        query: [B, H, S * (specials + P), D] as the attention gets them.
        key: the same shape.
        places: [B, S, P, S], from `same_places`.
    """
    return torch.stack([_head_loss(query[:, h], key[:, h], places, first_only=h == 0) for h in range(HEADS)]).mean()


def _head_loss(query: Tensor, key: Tensor, places: Tensor, first_only: bool) -> Tensor:
    """The loss of one head: query and key [B, S * (specials + P), D]."""
    b, frames, patches, _ = places.shape
    tokens = query.shape[1] // frames
    specials = tokens - patches
    order = torch.arange(frames)
    earlier = (order[None] < order[:, None])[:, None]  # [S, 1, S]
    if first_only:
        earlier = earlier & (order == 0)
    known = (places >= 0) & earlier
    target = torch.zeros(b, frames, patches, frames, tokens, dtype=torch.bool)
    target.scatter_(4, (places.clamp(min=0) + specials)[..., None], known[..., None])
    q = query.unflatten(1, (frames, tokens))[:, :, specials:].flatten(1, 2)
    logits = (q @ key.mT) / query.shape[-1] ** 0.5  # [B, S * P, S * tokens]
    causal = (order[None] <= order[:, None]).repeat_interleave(patches, 0).repeat_interleave(tokens, 1)
    wanted = target.flatten(3).flatten(1, 2)  # [B, S * P, S * tokens]
    some = wanted.any(2)
    if not some.any():
        return logits.sum() * 0
    logits = logits.masked_fill(~causal, -1e4)[some]  # [n, S * tokens]
    return (logits.logsumexp(1) - logits.masked_fill(~wanted[some], -1e4).logsumexp(1)).mean()


def shift_loss(predicted: Tensor, places: Tensor) -> Tensor:
    """Error in how far each patch's place is, in patches, from where the first frame sees it.

    Args:
        predicted: [B, S, P, 2], rows and columns.
        places: [B, S, P, S], from `same_places`.
    """
    side = round(places.shape[2] ** 0.5)
    own = torch.arange(places.shape[2]).view(1, 1, -1)
    first = places[..., 0]
    rows, columns = first // side - own // side, first % side - own % side
    known = (first >= 0) & (torch.arange(places.shape[1]) > 0)[None, :, None]
    error = (predicted - torch.stack([rows, columns], -1)).abs().sum(-1)
    return (error * known).sum() / known.sum().clamp(min=1)
