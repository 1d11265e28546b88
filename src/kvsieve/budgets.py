"""How many tokens may stay, and how that number is shared: the second answer of a `Policy`.

Ratios, bytes and strings become integers here, once. `budget` always says what is **kept**.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import BudgetError
from .store import MIN_SPARE, SPARE_SHARE

if TYPE_CHECKING:
    from .view import LayerView

__all__ = [
    "AcrossHeads",
    "Budget",
    "Bytes",
    "Pyramid",
    "Ratio",
    "Share",
    "Threshold",
    "Tokens",
    "Uniform",
    "Unlimited",
    "parse_budget",
    "parse_bytes",
]


@dataclass(frozen=True)
class Budget:
    """Base class: an amount of cache."""

    def amounts(self, view: LayerView) -> list[float]:
        """Tokens per key-value head for each batch row, on average over layers and heads, before rounding."""
        raise NotImplementedError

    def counts(self, amount: float) -> int:
        """The integer that an amount stands for."""
        return max(1, int(amount))


@dataclass(frozen=True)
class Unlimited(Budget):
    """Nothing is ever evicted."""

    def amounts(self, view: LayerView) -> list[float]:
        return [math.inf] * len(view.real_seen)


@dataclass(frozen=True)
class Tokens(Budget):
    """At most `n` tokens per head."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise BudgetError(f"a token budget must be 1 or more, not {self.n}")

    def amounts(self, view: LayerView) -> list[float]:
        return [float(self.n)] * len(view.real_seen)


@dataclass(frozen=True)
class Ratio(Budget):
    """A share of the real tokens seen: `max(1, int(n * kept))`.

    `Ratio(1 - r)` truncates exactly as `max(1, int(n * (1 - r)))` does, so counts equal those of tools that speak
    of a fraction removed (9 of 100 at `r = 0.9`, because `1 - 0.9` is a little less than 0.1 in binary).
    """

    kept: float

    def __post_init__(self) -> None:
        if not 0.0 < self.kept <= 1.0:
            raise BudgetError(f"a ratio budget must lie in (0, 1], not {self.kept}")

    def amounts(self, view: LayerView) -> list[float]:
        return [int(n) * self.kept for n in view.real_seen]


@dataclass(frozen=True)
class Bytes(Budget):
    """At most `n` bytes of keys and values over all managed layers, rows and heads, spare slots included."""

    n: int

    def tokens(self, each: int, exact: bool) -> int:
        """Tokens per head, if one token in every layer, row and head takes `each` bytes. Room for the next token is
        set aside, and, where a store cannot be fitted exactly, for its spare slots."""
        fit = self.n // each - 1
        if not exact:
            fit = min(fit - MIN_SPARE, fit * SPARE_SHARE // (SPARE_SHARE + 1))
        if fit < 1:
            least = (2 if exact else 2 + MIN_SPARE) * each
            raise BudgetError(
                f"a budget of {self.n} bytes holds no token: one token takes {each} bytes over all layers, rows and "
                f"heads; the smallest legal budget is {least} bytes"
            )
        return fit

    def amounts(self, view: LayerView) -> list[float]:
        rows, heads = view.positions.shape[:2]
        each = view.n_layers * rows * heads * view.bytes_per_token
        return [float(self.tokens(each, view.exact_fit))] * rows


@dataclass(frozen=True)
class Threshold(Budget):
    """A token stays while its score is at least `value`; there is no count."""

    value: float

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise BudgetError("a threshold must be a number, not NaN")

    def amounts(self, view: LayerView) -> list[float]:
        raise BudgetError("a threshold has no count and cannot be shared over layers or heads")


@dataclass(frozen=True)
class Share:
    """Base class: how an amount is shared over layers and heads."""

    @property
    def uniform(self) -> bool:
        """Whether every head of a layer receives the same count."""
        return True

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


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """`"512MiB"`, `"2GiB"`, `"1.5GB"`, `"4096B"` -> bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise BudgetError(f'{text!r} is not an amount of memory; write for example "512MiB" or "2GB"')
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_budget(budget: Budget | float | int | str | None) -> Budget:
    """Float: share kept; int: tokens per head; string: bytes in all; `None`: unlimited."""
    if isinstance(budget, Budget):
        return budget
    if budget is None:
        return Unlimited()
    if isinstance(budget, bool):
        raise BudgetError("a budget is a float (share kept), an int (tokens) or a string (bytes), not a bool")
    if isinstance(budget, str):
        return Bytes(parse_bytes(budget))
    if isinstance(budget, int):
        return Tokens(budget)
    return Ratio(float(budget))
