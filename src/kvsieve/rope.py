"""Rotary positions of keys that are already rotated: shift them exactly, or take a rotation back.

The core knows two functions only: `cos_sin` (positions to cosines and sines, without any attention scaling) and
`apply` (the model's own rotation of one tensor). `kvsieve.hf_rotary.rotary_of` finds both in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UnsupportedModelError

__all__ = ["Rotary"]


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Attributes:
        cos_sin: `f(positions [R, N] int64) -> (cos, sin)`, each `[R, N, rotated dims]` float32, for the position
            itself: no attention scaling, no side effect.
        apply: `f(x [R, H, N, D], cos, sin) -> [R, H, N, D]`, linear in `x`.
        text_only: positions are those of plain text (false for multi-axis rotary, where images occupy a grid).
    """

    cos_sin: Callable[[Tensor], tuple[Tensor, Tensor]]
    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    text_only: bool = True

    def shift(self, x: Tensor, delta: Tensor) -> Tensor:
        """Rotate `x` `[B, H, N, D]` on by `delta` `[B, H, N]` positions (negative: back). Computed in float32 at
        least, returned in the dtype of `x`."""
        rows = x.flatten(0, 1)[:, None]
        cos, sin = self.cos_sin(delta.flatten(0, 1))
        wide = torch.promote_types(x.dtype, torch.float32)
        out = self.apply(rows.to(wide), cos.to(wide), sin.to(wide))
        return out[:, 0].unflatten(0, x.shape[:2]).to(x.dtype)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Take the rotation of `positions` `[B, N]` back from `x` `[B, H, N, D]`."""
        cos, sin = self.cos_sin(-positions)
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.apply(x.to(wide), cos.to(wide), sin.to(wide)).to(x.dtype)

    def mean_rotation(self, start: Tensor, count: int) -> Callable[[Tensor], Tensor]:
        """The average rotation over `count` positions from `start` `[B]` on, as a linear map on `[B, H, N, D]`."""
        positions = start[:, None] + torch.arange(count, device=start.device)
        cos, sin = (part.mean(1, keepdim=True) for part in self.cos_sin(positions))
        return lambda x: self.apply(x, cos.to(x.dtype), sin.to(x.dtype))

    def self_test(self, head_dim: int, true_rotation: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Check on random keys that shifting equals rotating afresh with the model's own functions.

        Args:
            head_dim: `D`.
            true_rotation: `f(x [1, 1, N, D], positions [1, N])`, what the model does.

        Raises:
            UnsupportedModelError: the relative error is above 1e-3 (rotations that depend on length, or that are not
                rotations of the stored key at all).
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 64, head_dim, generator=generator)
        old = torch.randperm(2048, generator=generator)[:64].sort().values[None]
        new = old + 1984 - torch.arange(64) * 31
        want = true_rotation(x, new)
        got = self.shift(true_rotation(x, old), (new - old)[:, None])
        error = float((got - want).norm() / want.norm())
        if not error < 1e-3:
            raise UnsupportedModelError(
                f"this model's rotary embedding cannot be shifted exactly (relative error {error:.1e}); "
                'use positions="original" and a method that does not need rotary positions'
            )
