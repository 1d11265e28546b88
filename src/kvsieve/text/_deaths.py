"""When every key dies: a policy that never takes a key back is one integer per key.

`death[h, j] = i` means that query `i` is the first that no longer sees key `j` of head `h`, because it was evicted
after step `i - 1`; a value above `n` means that key `j` outlives the text. Here: the number of keys that leave after
every step, and the deaths that follow from scores which are fixed when a key arrives.

Shapes: `n` tokens fed, `Hkv` key-value heads.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layer import KVLayer
from ..protect import Protect
from ..view import LayerView

__all__ = ["drops_per_step", "threshold_deaths", "top_deaths"]

Integers = NDArray[np.int64]


def drops_per_step(view: LayerView, layer: KVLayer, n: int) -> Integers:
    """`[n]` keys that every head gives up after step `i`, one token per step, by the policy's own counts.

    Args:
        view: of `layer`, for what counts depend on: the layer's rank, its heads, bytes per token.
        layer: its count of tokens seen is changed step by step.
        n: tokens fed.

    Raises:
        BudgetError: the budget is below what is protected, as it would be token by token.
    """
    policy = layer.policy
    guarded = policy.protect.sink + policy.protect.recent
    drops = np.zeros(n, dtype=np.int64)
    held = 0
    for i in range(n):
        seen, held = i + 1, held + 1
        layer.seen = seen
        amount = policy.budget.amounts(view)[0]
        count = policy.share.per_layer(amount, policy.budget.counts(amount), seen, view)
        if held > count and min(seen, guarded) > count:
            protected = torch.ones(1, 1, min(seen, guarded), dtype=torch.bool)
            count = int(policy._above_protection(torch.tensor([count]), protected, view))
        drops[i] = max(held - count, 0)
        held -= int(drops[i])
    return drops


def threshold_deaths(scores: Tensor, threshold: float, protect: Protect) -> Tensor:
    """`[Hkv, n]` deaths of keys with fixed scores `[Hkv, n]` that leave as soon as they are below `threshold` and no
    longer protected."""
    n = scores.shape[-1]
    position = torch.arange(n, device=scores.device)
    stays = (scores >= threshold) | (position < protect.sink)
    return torch.where(stays, n + 1, position + protect.recent + 1)


def top_deaths(scores: Tensor, drops: Integers, protect: Protect) -> Tensor:
    """`[Hkv, n]` deaths of keys with fixed scores `[Hkv, n]` when `drops[i]` of them leave after step `i`: the lowest
    scores among those not protected, the oldest among equals."""
    heads, n = scores.shape
    death = np.full((heads, n), n + 1, dtype=np.int64)
    if drops.any():
        for h, row in enumerate(scores.cpu().numpy()):
            if h and np.array_equal(row, scores[0].cpu().numpy()):
                death[h] = death[0]
            else:
                _one_head(row, drops.tolist(), protect, death[h])
    return torch.from_numpy(death).to(scores.device)


def _one_head(scores: NDArray[Any], drops: list[int], protect: Protect, death: Integers) -> None:
    """Write the deaths of one head. Keys are handled as ranks, which order them by score, then by age."""
    order = np.argsort(scores, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    key_of, rank_of = order.tolist(), rank.tolist()
    loose: list[int] = []
    for i, count in enumerate(drops):
        j = i - protect.recent
        if j >= protect.sink:
            heapq.heappush(loose, rank_of[j])
        for _ in range(count):
            death[key_of[heapq.heappop(loose)]] = i + 1
