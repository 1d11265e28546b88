"""Attention received over the whole stream, for its exposure, and more room for layers that look everywhere
(Evict3R, arXiv 2509.17650)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..ledger import Kind
from ..protect import Protect
from ..scorer import Scorer
from ..shares import LayerVariance, Share
from ..view import LayerView

__all__ = ["Evict3R"]


@dataclass(frozen=True)
class Evict3R(Scorer):
    """Score: attention received from all queries so far, averaged over heads, relative to an even spread over what was
    held at the time, divided by the number of queries that could see the token. One set of tokens serves all heads.

    Attributes:
        temp: temperature of the budgets of layers, see `kvsieve.shares.LayerVariance`.
    """

    name: ClassVar[str] = "evict3r"
    source: ClassVar[str] = "arXiv 2509.17650"
    history: ClassVar[bool] = True

    temp: float = 0.5

    @property
    def collects(self) -> str:
        return "sum"

    def default_protect(self) -> Protect:
        """The first frame and the special tokens of all frames, where a host tells frames and kinds apart."""
        return Protect(kinds=(int(Kind.SPECIAL),), segments=(0,))

    def default_share(self) -> Share:
        return LayerVariance(self.temp)

    def observe(self, view: LayerView) -> None:
        mass = view.attention_mass()
        group = view.queries.shape[1] // mass.shape[1]
        even = view.real.sum(-1, keepdim=True)
        view.add("mass", (mass / group).mean(1, keepdim=True) * even)
        view.add("exposure", view.exposure())

    def score(self, view: LayerView) -> Tensor:
        return view.column("mass") / view.column("exposure").clamp_min(1)
