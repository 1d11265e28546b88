"""The last queries vote for what they attend to, smoothed over neighbours (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..errors import PolicyError
from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["SnapKV"]


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Score: attention of the last `window_size` queries, averaged over them and over the heads of the group, then
    average-pooled along the sequence. The window itself stays. While decoding, the window moves along.

    Attributes:
        window_size: observation window in tokens.
        kernel_size: width of the pooling, odd.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "arXiv 2404.14469, section 4.1"
    history: ClassVar[bool] = True

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise PolicyError("window_size must be 1 or more and kernel_size odd and 1 or more")

    @property
    def remembers(self) -> int:
        return self.window_size

    def default_protect(self) -> Protect:
        return Protect(recent=self.window_size)

    def observe(self, view: LayerView) -> None:
        view.remember_queries(self.window_size)

    def score(self, view: LayerView) -> Tensor:
        queries = view.state["queries"]
        mass = view.attention_mass(queries) / (queries.shape[2] * (queries.shape[1] // view.positions.shape[1]))
        outside = view.valid & (view.positions < view.seen - queries.shape[2])
        mass = torch.where(outside, mass, 0.0)  # the window does not vote for itself, nor lend to its neighbours
        return view.by_position(mass, self._pool)

    def _pool(self, scores: Tensor) -> Tensor:
        return avg_pool1d(scores, self.kernel_size, stride=1, padding=self.kernel_size // 2)
