"""Sinks, recent tokens, and evenly spaced blocks of what lies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budgets import Budget, Threshold
from ..errors import PolicyError
from ..protect import Protect
from ..scorer import StaticScorer
from ..view import LayerView

__all__ = ["SinkRecentUniform", "sampled"]


@dataclass(frozen=True)
class SinkRecentUniform(StaticScorer):
    """Of the blocks between the sinks and the window, every 2^k-th of the text stays, with the smallest k that fits;
    the next finer level fills up the rest, newest first. A token's rank is fixed by its position, so a token or byte
    budget ends in the same set however the text was fed.

    Attributes:
        sink_tokens: first tokens that are never evicted.
        recent_tokens: last tokens that are never evicted.
        block_size: tokens per block; block 0 begins with the text.
        stride: only every `stride`-th block to begin with (0: every one). Without a budget exactly these stay, and the
            cache grows with the text.
        resample: `"history"`, as above, or `"slots"`: at every decision evenly spaced blocks of what is left, whatever
            its positions. Applied over and over, that forgets the middle of the text; it is here to compare with.
    """

    name: ClassVar[str] = "sink_recent_uniform"
    source: ClassVar[str] = "position policy"

    sink_tokens: int = 256
    recent_tokens: int = 1024
    block_size: int = 128
    stride: int = 0
    resample: str = "history"

    def __post_init__(self) -> None:
        if min(self.sink_tokens, self.recent_tokens, self.stride) < 0 or self.block_size < 1:
            raise PolicyError(
                f"{self.name}: sink_tokens, recent_tokens and stride must be zero or more and block_size 1 or more"
            )
        if self.resample not in ("history", "slots"):
            raise PolicyError(f'{self.name}: resample={self.resample!r} is not "history" or "slots"')

    @property
    def fixed(self) -> bool:
        return self.resample == "history"

    def default_budget(self) -> Budget | None:
        return Threshold(0.0) if self.stride else None

    def default_protect(self) -> Protect:
        return Protect(sink=self.sink_tokens, recent=self.recent_tokens)

    def token_score(self, view: LayerView) -> Tensor:
        block = (view.new_positions - view.first[:, None]).clamp_min(0) // self.block_size
        step = max(self.stride, 1)
        node = block // step
        coarsest = torch.where(node == 0, 1 << 62, node & -node)  # the lowest set bit: 2^k of the last grid it is on
        level = torch.where(block % step == 0, coarsest, -1)
        return level[:, None].expand(*view.new_keys.shape[:3]).float()

    def score(self, view: LayerView) -> Tensor:
        if self.fixed:
            return super().score(view)
        slot = view.by_position(view.positions, lambda x: torch.arange(x.shape[-1], device=x.device).to(x).expand_as(x))
        held, closed = view.valid.sum(-1, keepdim=True), self.sink_tokens + self.recent_tokens
        start = -(-self.sink_tokens // self.block_size)
        count = (held - self.recent_tokens) // self.block_size - start
        keep = 0 if self.stride else (view.counts.to(slot.device) - closed).div(self.block_size, rounding_mode="floor")
        keep = torch.as_tensor(keep, device=slot.device).view(-1, 1, 1)
        chosen = sampled(slot // self.block_size - start, count, keep, self.stride)
        return torch.where(chosen | (held <= closed), 1.0, -1.0)


def sampled(block: Tensor, count: Tensor, keep: Tensor, stride: int) -> Tensor:
    """Bool, which of blocks `0 .. count - 1` stay: every `stride`-th, or, with `stride=0`, `keep` of them at
    `i * (count - 1) // (keep - 1)`, in whole numbers. All arguments broadcast; `block` may lie outside."""
    inside = (block >= 0) & (block < count)
    if stride:
        return inside & (block % stride == 0)
    first = -(-(block * (keep - 1)) // (count - 1).clamp_min(1))  # the smallest i that reaches this block
    even = first * (count - 1) // (keep - 1).clamp_min(1) == block
    return inside & (keep > 0) & (even | (keep >= count))
