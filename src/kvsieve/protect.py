"""Which tokens may never leave: the third answer of a `Policy`. Protection is a mask, never a high score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import PolicyError

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
        segments: ledger segments (frames, turns, chunks) that stay.
    """

    sink: int = 0
    recent: int = 0
    kinds: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 0:
            raise PolicyError(f"sink and recent must be zero or more, not {self.sink} and {self.recent}")

    @property
    def smallest(self) -> int:
        """Tokens per head that this protection alone needs, as far as it is known without data."""
        return self.sink + self.recent

    def mask(self, view: LayerView) -> Tensor:
        """`[B, Hkv, N]` bool: protected tokens among those held."""
        positions = view.positions
        mask = positions >= view.seen - self.recent
        if self.sink:
            ahead = self.sink if view.plain else (view.first + self.sink)[:, None, None]
            mask = mask | (positions < ahead)
        for column, values in (("kind", self.kinds), ("segment", self.segments)):
            if values and view.has(column):
                wanted = torch.tensor(values, device=positions.device)
                mask = mask | torch.isin(view.column(column), wanted)
        return mask if view.plain else mask & view.valid
