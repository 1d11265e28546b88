"""Keys with a small norm stay (L2 norm, arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..scorer import StaticScorer
from ..view import LayerView

__all__ = ["KNorm"]


@dataclass(frozen=True)
class KNorm(StaticScorer):
    """Score: minus the key's L2 norm.

    Attributes:
        reverse: keep large norms instead; which sign helps depends on the model.
    """

    name: ClassVar[str] = "knorm"
    source: ClassVar[str] = "arXiv 2406.11430, section 3"

    reverse: bool = False

    def token_score(self, view: LayerView) -> Tensor:
        keys = view.new_keys
        norm = (keys if keys.dtype.itemsize > 2 else keys.float()).norm(dim=-1)
        return norm if self.reverse else -norm
