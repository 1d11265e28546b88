"""SnapKV's scores with heads competing for the layer's budget (AdaKV, arXiv 2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shares import AcrossHeads, Share
from .snapkv import SnapKV

__all__ = ["AdaSnapKV"]


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """SnapKV where a layer's budget goes to the best tokens of all its heads; memory really differs per head.

    Attributes:
        alpha_safeguard: share of its even budget that every head is sure of.
    """

    name: ClassVar[str] = "adakv_snapkv"
    source: ClassVar[str] = "arXiv 2407.11550, algorithm 1"

    alpha_safeguard: float = 0.2

    def default_share(self) -> Share:
        return AcrossHeads(self.alpha_safeguard)
