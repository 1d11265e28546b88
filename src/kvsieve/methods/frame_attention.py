"""Attention received from the newest frame alone: what it does not look at may leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import PolicyError
from ..ledger import Kind
from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["FrameAttention"]


@dataclass(frozen=True)
class FrameAttention(Scorer):
    """Score: attention received from the queries of the last forward pass, per head. Nothing is remembered.

    Attributes:
        aggregation: `"sum"`, `"mean"` or `"max"` over those queries (and over the query heads of a group).
    """

    name: ClassVar[str] = "frame_attention"
    source: ClassVar[str] = "token eviction for STream3R"

    aggregation: str = "sum"

    def __post_init__(self) -> None:
        if self.aggregation not in ("sum", "mean", "max"):
            raise PolicyError(f'aggregation={self.aggregation!r} is not "sum", "mean" or "max"')

    @property
    def collects(self) -> str:
        return "max" if self.aggregation == "max" else "sum"

    def default_protect(self) -> Protect:
        """The first frame and the special tokens of all frames, where a host tells frames and kinds apart."""
        return Protect(kinds=(int(Kind.SPECIAL),), segments=(0,))

    def score(self, view: LayerView) -> Tensor:
        mass = view.attention_mass(reduce=self.collects)
        return mass / view.exposure().clamp_min(1) if self.aggregation == "mean" else mass
