"""How many tokens may stay: the second answer of a `Policy`. How that number is shared stands in `shares.py`.

Ratios, bytes and strings become integers here, once. `budget` always says what is **kept**.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BudgetError
from .store import MIN_SPARE, SPARE_SHARE

if TYPE_CHECKING:
    from .view import LayerView

__all__ = [
    "Budget",
    "Bytes",
    "EvictRatio",
    "OfStream",
    "Ratio",
    "Threshold",
    "Tokens",
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
        return [n * self.kept for n in view.real_seen]


@dataclass(frozen=True)
class OfStream(Budget):
    """A share of a stream whose length is known: `kept * tokens` tokens per head, on average over layers, throughout.

    Attributes:
        kept: the share.
        tokens: tokens of the whole stream.
    """

    kept: float
    tokens: int

    def __post_init__(self) -> None:
        if not 0.0 < self.kept <= 1.0:
            raise BudgetError(f"a share of a stream must lie in (0, 1], not {self.kept}")
        if self.tokens < 1:
            raise BudgetError(f"a stream must have at least one token, not {self.tokens}")

    def amounts(self, view: LayerView) -> list[float]:
        return [self.tokens * self.kept] * len(view.real_seen)


@dataclass(frozen=True)
class EvictRatio(Budget):
    """A share of what may be evicted leaves at every decision: `int(n * removed)` of the `n` tokens held that are not
    protected.

    Applied over and over, as in a stream, this forgets geometrically: when every pass brings `m` tokens that may be
    evicted, their number settles near `m * (1 - removed) / removed`, however long the stream.
    """

    removed: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.removed < 1.0:
            raise BudgetError(f"an eviction ratio is the share removed and must lie in [0, 1), not {self.removed}")

    def amounts(self, view: LayerView) -> list[float]:
        held, closed = view.valid.sum(-1), (view.valid & view.protected).sum(-1)
        kept = held - ((held - closed).double() * self.removed).long()
        return [sum(heads) / len(heads) for heads in kept.tolist()]


@dataclass(frozen=True)
class Bytes(Budget):
    """At most `n` bytes of keys and values over all managed layers, rows and heads, spare slots included."""

    n: int

    def tokens(self, each: int, exact: bool, room: int = 1, layers: int = 1) -> int:
        """Tokens per head, if one token in every layer, row and head takes `each` bytes. Room for the next `room`
        tokens is set aside, and, where a store cannot be fitted exactly, for its spare slots. `layers`: between how
        many layers these tokens are shared unevenly; at worst one holds nearly all, the others their least spare."""
        fit, least = self.n // each - room, 1 + room
        if not exact:
            large = ((fit - MIN_SPARE) * layers + MIN_SPARE) * SPARE_SHARE // ((SPARE_SHARE + 1) * layers)
            fit, least = min(fit - MIN_SPARE, large), least + MIN_SPARE
        if fit < 1:
            raise BudgetError(
                f"a budget of {self.n} bytes holds no token: one token takes {each} bytes over all layers, rows and "
                f"heads; the smallest legal budget is {least * each} bytes"
            )
        return fit

    def amounts(self, view: LayerView) -> list[float]:
        rows, heads = view.positions.shape[:2]
        each = view.n_layers * rows * heads * view.bytes_per_token
        layers = 1 if view.even else view.n_layers
        return [float(self.tokens(each, view.exact_fit, view.room, layers))] * rows


@dataclass(frozen=True)
class Threshold(Budget):
    """A token stays while its score is at least `value`; there is no count."""

    value: float

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise BudgetError("a threshold must be a number, not NaN")

    def amounts(self, view: LayerView) -> list[float]:
        raise BudgetError("a threshold has no count and cannot be shared over layers or heads")


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
