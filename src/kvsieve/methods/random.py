"""Uniformly random scores: the control that an informed method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..protect import Protect
from ..scorer import StaticScorer
from ..view import LayerView

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(StaticScorer):
    """A fixed pseudo-random number per (seed, layer, head, token), so chunking and batching do not change it.

    Attributes:
        seed: other seeds, other numbers.
        n_sink: first tokens that are never evicted.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"

    seed: int = 42
    n_sink: int = 0

    def default_protect(self) -> Protect:
        return Protect(sink=self.n_sink)

    def token_score(self, view: LayerView) -> Tensor:
        b, heads = view.new_keys.shape[:2]
        place = (view.new_positions - view.first[:, None]).view(b, 1, -1)
        head = torch.arange(heads, device=place.device).view(1, -1, 1)
        return _uniform(_mix(_mix(_mix(self.seed, view.layer_idx), head), place))


def _mix(state: int | Tensor, value: int | Tensor) -> Tensor:
    """One round of a 64-bit integer hash (multiply, xor, shift; wraps around)."""
    x = torch.as_tensor(state, dtype=torch.int64) * 6364136223846793005
    x = x.to(value.device) if isinstance(value, Tensor) else x
    x = x + value * 1442695040888963407 + 1013904223
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    x = x * -4658895280553007687
    return x ^ ((x >> 29) & 0x7FFFFFFFF)


def _uniform(x: Tensor) -> Tensor:
    """The middle bits of a hash as float32 in [0, 1)."""
    return ((x >> 20) & 0xFFFFFF).float() / float(1 << 24)
