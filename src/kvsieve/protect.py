"""Which tokens may never leave: the third answer of a `Policy`. Protection is a mask, never a high score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import PolicyError
from .ledger import KIND, SEGMENT

if TYPE_CHECKING:
    from .view import LayerView

__all__ = ["Protect"]


@dataclass(frozen=True)
class Protect:
    """Tokens that are kept whatever they score.

    Attributes:
        sink: the first `sink` real (not padding) tokens of every row.
        recent: the last `recent` tokens seen.
        kinds: token kinds of the ledger (see `kvsieve.ledger.Kind`) that stay.
        kinds_recent: in how many of the latest segments they do; in all by default.
        segments: ledger segments (frames, turns, chunks) that stay.
    """

    sink: int = 0
    recent: int = 0
    kinds: tuple[int, ...] = ()
    kinds_recent: int | None = None
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 0:
            raise PolicyError(f"sink and recent must be zero or more, not {self.sink} and {self.recent}")
        if self.kinds_recent is not None and self.kinds_recent < 0:
            raise PolicyError(f"kinds_recent must be zero or more, not {self.kinds_recent}")

    @property
    def smallest(self) -> int:
        """Tokens per head that this protection alone needs, as far as it is known without data."""
        return self.sink + self.recent

    def mask(self, view: LayerView) -> Tensor:
        """`[B, Hkv, N]` bool: protected tokens among those held, padding aside."""
        positions = view.positions
        mask = self.by_position(positions, view.seen, None if view.plain else view.first)
        if self.kinds and view.has(KIND):
            chosen = torch.isin(view.column(KIND), torch.tensor(self.kinds, device=positions.device))
            if self.kinds_recent is not None and view.has(SEGMENT):
                chosen &= view.column(SEGMENT) > view.segment - self.kinds_recent
            mask = mask | chosen
        if self.segments and view.has(SEGMENT):
            mask = mask | torch.isin(view.column(SEGMENT), torch.tensor(self.segments, device=positions.device))
        return mask if view.plain else mask & view.real

    def by_position(self, positions: Tensor, seen: int, first: Tensor | None = None) -> Tensor:
        """`[B, Hkv, N]` bool: the first tokens and the last ones.

        Args:
            positions: `[B, Hkv, N]`.
            seen: tokens seen, padding counted.
            first: `[B]` column of the first real token of every row; 0 by default.
        """
        if positions.device.type == "cpu" and isinstance(seen, int) and first is None:
            table = positions.numpy()  # compares whole numbers in a tenth of the time
            return torch.from_numpy((table >= seen - self.recent) | (table < self.sink))
        ahead = self.sink if first is None else (first + self.sink)[:, None, None]
        return (positions >= seen - self.recent) | (positions < ahead)
