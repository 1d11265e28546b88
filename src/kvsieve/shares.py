"""How a budget is shared over layers and heads: a part of the second answer of a `Policy`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import BudgetError, PolicyError
from .select import top_mask

if TYPE_CHECKING:
    from .view import LayerView

__all__ = ["AcrossHeads", "LayerVariance", "Pyramid", "Share", "Uniform", "water_fill"]


@dataclass(frozen=True)
class Share:
    """Base class: how an amount is shared over layers and heads."""

    @property
    def uniform(self) -> bool:
        """Whether every head of a layer receives the same count."""
        return True

    @property
    def even(self) -> bool:
        """Whether every layer receives the same amount."""
        return True

    @property
    def joint(self) -> bool:
        """Whether the layers of a cache are cut together, when all of them have seen a forward pass (`joint.py`)."""
        return False

    @property
    def strict(self) -> bool:
        """Whether a layer may never be given less than what is protected in it."""
        return True

    def choose(self, scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        """`[B, Hkv, N]` bool of the tokens that stay; arguments as in `select.top_mask`."""
        return top_mask(scores, positions, valid, protected, counts)

    def weigh(self, view: LayerView) -> list[float]:
        """For a joint share: what this layer has to say, from the forward pass in `view`, for every row."""
        raise NotImplementedError

    def allocate(
        self, amount: float, weights: Sequence[float], floors: Sequence[int], held: Sequence[int], seen: int
    ) -> list[int]:
        """For a joint share: tokens per head of every layer, for one row.

        Args:
            amount: tokens per head, on average over layers.
            weights: what `weigh` returned for every layer.
            floors, held: tokens that are protected, and tokens that are there.
            seen: real tokens fed so far.
        """
        raise NotImplementedError

    def per_layer(self, amount: float, count: int, seen: int, view: LayerView) -> int:
        """Tokens per head for this layer and one row, which has seen `seen` real tokens."""
        return count

    def per_head(self, scores: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        """`[B, Hkv]` tokens per head, from `counts` `[B]` (average over heads) and the scores `[B, Hkv, N]`."""
        return counts[:, None].expand(-1, valid.shape[1])


@dataclass(frozen=True)
class Uniform(Share):
    """The same number for every layer and head."""


@dataclass(frozen=True)
class Pyramid(Share):
    """More for early layers, less for late ones, linearly (PyramidKV, arXiv 2406.02069, section 3.2).

    Attributes:
        beta: steepness; the last layer receives `1 / beta` of what is not window.
        window: tokens of the observation window, which every layer keeps.
    """

    beta: int = 20
    window: int = 64

    @property
    def even(self) -> bool:
        return False

    def per_layer(self, amount: float, count: int, seen: int, view: LayerView) -> int:
        low = amount / self.beta
        high = 2 * amount - low
        room = seen - self.window
        if high >= room:
            high, low = room, 2 * amount - room
        if not seen >= high >= low >= self.window:
            return max(1, round(amount))
        if view.n_layers == 1:
            return count
        return round(high - view.rank * (high - low) / (view.n_layers - 1))


@dataclass(frozen=True)
class AcrossHeads(Share):
    """Heads of a layer compete for one budget; each keeps at least `alpha` of its even share (AdaKV,
    arXiv 2407.11550, algorithm 1)."""

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise BudgetError(f"the safeguard alpha must lie in [0, 1], not {self.alpha}")

    @property
    def uniform(self) -> bool:
        return False

    def per_head(self, scores: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        b, h, n = scores.shape
        lowest = torch.finfo(scores.dtype).min
        ranked = torch.where(valid, scores.clamp_min(lowest), -math.inf)
        ranked = torch.where(protected & valid, math.inf, ranked)
        floor = (counts.double() * self.alpha).long().to(scores.device)
        rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        ranked = torch.where((rank < floor[:, None, None]) & valid, math.inf, ranked)
        flat = ranked.flatten(1)
        order = flat.argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(h * n, device=order.device).expand(b, -1))
        chosen = (place < (counts.to(scores.device) * h)[:, None]) & valid.flatten(1)
        return chosen.unflatten(1, (h, n)).sum(-1)


@dataclass(frozen=True)
class LayerVariance(Share):
    """More for layers whose attention is spread evenly, less for layers that look at few tokens (Evict3R,
    arXiv 2509.17650): shares are `softmax(-variance / temp)` over layers, the variance being that of the attention
    which held tokens received in the last forward pass.

    By default no layer falls below what is protected or is given more than it holds, and the counts add up to the
    budget exactly as long as there is that much to hold.

    Attributes:
        temp: temperature, in units of that variance.
        as_published: the published arithmetic instead, `ceil(total * share)` with no floor and no redistribution:
            a layer with one strong sink loses everything, protected tokens included.
    """

    temp: float = 0.5
    as_published: bool = False

    def __post_init__(self) -> None:
        if not (self.temp > 0 and math.isfinite(self.temp)):
            raise PolicyError(f"temp must be a positive number, not {self.temp}")

    @property
    def even(self) -> bool:
        return False

    @property
    def joint(self) -> bool:
        return True

    @property
    def strict(self) -> bool:
        return not self.as_published

    def choose(self, scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
        if not self.as_published:
            return top_mask(scores, positions, valid, protected, counts)
        # as published, protection is an infinite score, and infinities beyond the budget leave in any order: that of
        # `topk` over the tokens in order of arrival
        keep = valid.clone()
        for b, h in itertools.product(*map(range, valid.shape[:2])):
            held = valid[b, h].nonzero()[:, 0]
            order = held[positions[b, h, held].argsort()]
            worth = scores[b, h].masked_fill(protected[b, h], math.inf)[order]
            out = worth.topk(max(order.numel() - int(counts[b, h]), 0), largest=False).indices
            keep[b, h, order[out]] = False
        return keep

    def weigh(self, view: LayerView) -> list[float]:
        mass, positions, valid = view.attention_mass(), view.positions, view.valid
        if bool((positions == positions[:, :1]).all()):
            received, valid = mass.sum(1), valid[:, 0]
        else:  # heads hold different tokens, or the same ones in different slots
            places, slots = positions.unique(return_inverse=True)
            received = mass.new_zeros(mass.shape[0], len(places))
            received.scatter_add_(1, slots.flatten(1), (mass * valid).flatten(1))
            held = torch.zeros_like(received).scatter_add_(1, slots.flatten(1), valid.flatten(1).to(mass.dtype))
            valid = held > 0
        received = received / view.queries.shape[1]
        rows = [row[keep] for row, keep in zip(received, valid, strict=True)]
        return [float(row.var(correction=0)) if row.numel() else 0.0 for row in rows]

    def allocate(
        self, amount: float, weights: Sequence[float], floors: Sequence[int], held: Sequence[int], seen: int
    ) -> list[int]:
        shares = torch.softmax(-torch.tensor(weights, dtype=torch.float32) / self.temp, 0)
        if self.as_published:
            total = amount * len(weights)
            # in the order and precision of the published code, where rounding decides about single tokens
            removed = [int(torch.clamp(seen - total * share, min=0)) for share in shares]
            return [min(n, seen - out) for n, out in zip(held, removed, strict=True)]
        floors = [min(max(low, 1), n) for low, n in zip(floors, held, strict=True)]
        return water_fill(int(amount * len(weights)), shares.double().tolist(), floors, held)


def water_fill(total: int, weights: Sequence[float], floors: Sequence[int], ceilings: Sequence[int]) -> list[int]:
    """Share out `total` in proportion to `weights`, within bounds: the integers nearest to
    `clip(level * weight, floor, ceiling)` for the one `level` at which they add up.

    Returns:
        Integers between `floors` and `ceilings` whose sum is `total`, or the nearest sum that the bounds allow.
        Fractions are rounded down and what is left goes to the largest remainders, ties to the larger
        weight, then to the earlier entry.
    """
    total = min(max(total, sum(floors)), sum(ceilings))
    # a weight of zero must still be able to take what the others cannot hold
    safe = [max(w, 1e-12) for w in weights]
    bounds = list(zip(safe, floors, ceilings, strict=True))

    def filled(level: float) -> list[float]:
        return [min(max(level * w, low), high) for w, low, high in bounds]

    low, high = 0.0, max((c / w for w, _, c in bounds), default=0.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(filled(middle)) < total else (low, middle)
    real = filled(high)
    counts = [math.floor(x + 1e-9) for x in real]
    order = sorted(range(len(counts)), key=lambda i: (round(counts[i] - real[i], 9), -weights[i], i))
    for step in (1, -1):
        while sum(counts) * step < total * step:
            for i in order:
                if floors[i] <= counts[i] + step <= ceilings[i] and sum(counts) * step < total * step:
                    counts[i] += step
    return counts
