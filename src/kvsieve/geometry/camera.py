"""The camera head: one token per frame to a pose, refined in a few rounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu

from .blocks import Attend, Block, Mlp

__all__ = ["ITERATIONS", "CameraHead"]

ITERATIONS = 4
POSE = 9
"""Translation (3), quaternion x y z w (4), vertical and horizontal field of view in radians (2)."""


class CameraHead(nn.Module):
    """Camera tokens `[B, S, C]` to pose encodings `[B, S, 9]`."""

    def __init__(self, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self.trunk = nn.ModuleList(Block(dim, num_heads, False, 0.01, 1e-5) for _ in range(depth))
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE))
        self.embed_pose = nn.Linear(POSE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, dim // 2, POSE)

    def forward(self, tokens: Tensor, attend: Callable[[int, int], Attend]) -> list[Tensor]:
        """One pose encoding per round, the last one being the result.

        Args:
            tokens: `[B, S, C]` the camera token of every frame.
            attend: attention over frames, for every round and block; each pair has a memory of its own.
        """
        tokens = self.token_norm(tokens)
        plain = layer_norm(tokens, (self.dim,), eps=1e-6)
        pose, poses = None, []
        for round_ in range(ITERATIONS):
            known = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if pose is None else pose.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, -1)
            x = tokens + gate * (plain * (1 + scale) + shift)
            for i, block in enumerate(self.trunk):
                x = block(x, attend(round_, i))
            step = self.pose_branch(self.trunk_norm(x))
            pose = step if pose is None else pose.detach() + step
            poses.append(torch.cat([pose[..., :7], relu(pose[..., 7:])], -1))
        return poses
