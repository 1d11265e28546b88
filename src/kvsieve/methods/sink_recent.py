"""Sinks and recent tokens by count: a position policy whose budget is the sum of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budgets import Budget, Tokens
from ..errors import PolicyError
from ..protect import Protect
from ..scorer import StaticScorer
from ..view import LayerView

__all__ = ["SinkRecent"]


@dataclass(frozen=True)
class SinkRecent(StaticScorer):
    """The first `sink_tokens` and the last `recent_tokens` stay. With a larger budget the newest others stay too.

    Attributes:
        sink_tokens: first tokens that are never evicted.
        recent_tokens: last tokens that are never evicted; with no budget given they set it.
    """

    name: ClassVar[str] = "sink_recent"
    source: ClassVar[str] = "position policy"

    sink_tokens: int = 4
    recent_tokens: int = 0

    def __post_init__(self) -> None:
        if self.sink_tokens < 0 or self.recent_tokens < 0:
            raise PolicyError("sink_recent: sink_tokens and recent_tokens must be zero or more")

    def default_budget(self) -> Budget | None:
        return Tokens(self.sink_tokens + self.recent_tokens) if self.recent_tokens else None

    def default_protect(self) -> Protect:
        return Protect(sink=self.sink_tokens, recent=self.recent_tokens)

    def token_score(self, view: LayerView) -> Tensor:
        return view.new_positions.float().expand(*view.new_keys.shape[:3])
