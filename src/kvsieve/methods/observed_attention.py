"""Average attention received from the queries that could see the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..scorer import Scorer
from ..view import LayerView

__all__ = ["ObservedAttention"]


@dataclass(frozen=True)
class ObservedAttention(Scorer):
    """Score: attention summed over all queries so far, divided by how many of them came at or after the token,
    averaged over the query heads of the group."""

    name: ClassVar[str] = "observed_attention"
    source: ClassVar[str] = "H2O without a window, normalised by exposure (kvpress ObservedAttentionPress)"
    history: ClassVar[bool] = True

    @property
    def collects(self) -> str:
        return "sum"

    def observe(self, view: LayerView) -> None:
        view.add("mass", view.attention_mass() / (view.queries.shape[1] // view.positions.shape[1]))

    def score(self, view: LayerView) -> Tensor:
        return view.column("mass") / (view.seen - view.positions).clamp_min(1)
