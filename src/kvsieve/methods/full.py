"""No eviction: the baseline that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budgets import Budget, Unlimited
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Scorer):
    """Keeps everything."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "baseline"

    def default_budget(self) -> Budget:
        return Unlimited()

    def score(self, view: LayerView) -> Tensor:
        return torch.zeros(view.positions.shape, device=view.positions.device)
