"""Attention sinks and a window of recent tokens (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..protect import Protect
from ..scorer import StaticScorer
from ..view import LayerView

__all__ = ["StreamingLLM"]


@dataclass(frozen=True)
class StreamingLLM(StaticScorer):
    """The first `n_sink` tokens stay; of the rest, the newest. Use `positions="slot"` for the paper's in-cache
    positions.

    Attributes:
        n_sink: first tokens that are never evicted.
    """

    name: ClassVar[str] = "streaming_llm"
    source: ClassVar[str] = "arXiv 2309.17453, section 3.2"

    n_sink: int = 4

    def default_protect(self) -> Protect:
        return Protect(sink=self.n_sink)

    def token_score(self, view: LayerView) -> Tensor:
        return view.new_positions.float().expand(*view.new_keys.shape[:3])
