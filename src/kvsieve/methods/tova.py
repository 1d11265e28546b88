"""Token omission via attention: the last query decides (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import PolicyError
from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["TOVA"]


@dataclass(frozen=True)
class TOVA(Scorer):
    """Score: attention of the newest query, averaged over all heads of the layer; the newest token stays."""

    name: ClassVar[str] = "tova"
    source: ClassVar[str] = "arXiv 2401.06104, section 3"

    @property
    def collects(self) -> str:
        return "sum"

    def default_protect(self) -> Protect:
        return Protect(recent=1)

    def score(self, view: LayerView) -> Tensor:
        if not view.alike:
            raise PolicyError("tova chooses the same tokens for all heads of a layer; use it with share='uniform'")
        last = None if view.new == 1 else view.queries[:, :, -1:]  # a single query was counted as it attended
        mass = view.attention_mass(last) / view.queries.shape[1]
        return mass.sum(1, keepdim=True).expand_as(mass)
