"""Heavy hitters: tokens that have received most attention (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["H2O"]


@dataclass(frozen=True)
class H2O(Scorer):
    """Score: attention summed over all queries so far and over the query heads of the group.

    Attributes:
        window_size: last tokens that are never evicted (the paper's recent half, as a count).
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "arXiv 2306.14048, section 4"
    history: ClassVar[bool] = True

    window_size: int = 32

    def default_protect(self) -> Protect:
        return Protect(recent=self.window_size)

    @property
    def collects(self) -> str:
        return "sum"

    def observe(self, view: LayerView) -> None:
        view.add("mass", view.attention_mass())

    def score(self, view: LayerView) -> Tensor:
        return view.column("mass")
