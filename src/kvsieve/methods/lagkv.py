"""Each partition is judged by the one that follows it, without attention (LagKV, arXiv 2504.04704)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PolicyError
from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["LagKV"]


@dataclass(frozen=True)
class LagKV(Scorer):
    """Score: how much a token varies over channels once its partition is normalised by the range of the next one,
    for keys and values, as a softmax over the partition. The last whole partition and the rest stay.

    Attributes:
        n_sink: first tokens that are never evicted.
        lag_size: tokens per partition.
        cross_scoring: compare tokens of different partitions by score instead of by rank.
    """

    name: ClassVar[str] = "lagkv"
    source: ClassVar[str] = "arXiv 2504.04704, section 2"
    compares_keys: ClassVar[bool] = True

    n_sink: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        if self.n_sink < 0 or self.lag_size < 1:
            raise PolicyError("lagkv: n_sink must be zero or more and lag_size 1 or more")

    @property
    def tensors_only(self) -> bool:
        return False

    def default_protect(self) -> Protect:
        return Protect(sink=self.n_sink)

    def score(self, view: LayerView) -> Tensor:
        order = view.positions.masked_fill(~view.valid, torch.iinfo(torch.int32).max).argsort(-1)
        held = view.valid.sum(-1)
        scores = torch.empty(order.shape, dtype=torch.float32, device=order.device)
        keys, values = view.keys.float(), view.values.float()
        for b in range(order.shape[0]):
            for h in range(order.shape[1]):
                slots = order[b, h]
                n = int(held[b, h])
                ranked = self._one_head(keys[b, h, slots[:n]], values[b, h, slots[:n]])
                scores[b, h, slots[:n]] = ranked
                scores[b, h, slots[n:]] = 0.0
        return scores

    def _one_head(self, keys: Tensor, values: Tensor) -> Tensor:
        """`[n]` scores of tokens in order of position, `[n, D]` each."""
        n, lag = keys.shape[0], self.lag_size
        if n < self.n_sink + 2 * lag:
            return torch.arange(n, device=keys.device) / n  # too short to lag: the newest stay
        parts = (n - self.n_sink) // lag
        body = slice(self.n_sink, self.n_sink + parts * lag)
        score = (self._lag(keys[body]) + self._lag(values[body])) / 2
        if not self.cross_scoring:
            score = score.argsort(-1).argsort(-1) / lag
        return torch.cat(
            [score.new_ones(self.n_sink), score.flatten(), score.new_ones(n - self.n_sink - score.numel())]
        )

    def _lag(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.lag_size))
        low, high = x[1:].amin(1, keepdim=True), x[1:].amax(1, keepdim=True)
        return ((x[:-1] - low) / (high - low)).std(-1).softmax(-1)
