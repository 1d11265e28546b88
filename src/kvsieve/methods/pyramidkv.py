"""SnapKV's scores with more tokens for early layers (PyramidKV, arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shares import Pyramid, Share
from .snapkv import SnapKV

__all__ = ["PyramidKV"]


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls linearly from the first layer to the last.

    Attributes:
        beta: steepness of the pyramid.
    """

    name: ClassVar[str] = "pyramidkv"
    source: ClassVar[str] = "arXiv 2406.02069, section 3.2"

    beta: int = 20

    def default_share(self) -> Share:
        return Pyramid(self.beta, self.window_size)
