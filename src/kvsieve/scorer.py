"""What each cached token is worth: the first answer of a `Policy`.

A method is a frozen dataclass of hyper-parameters with a `name` and a `score`. Defining it registers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .budgets import Budget
from .protect import Protect
from .shares import Share, Uniform

if TYPE_CHECKING:
    from .view import LayerView

__all__ = ["SCORE", "SCORERS", "Scorer", "StaticScorer"]

SCORE = "score"
"""Ledger column of a verdict that never changes."""

SCORERS: dict[str, type[Scorer]] = {}
"""Every method by name, filled as methods are defined."""


@dataclass(frozen=True)
class Scorer:
    """Base class of all methods. Larger scores stay.

    Class attributes:
        name: registers the class under this name; leave it out for a base class.
        source: where the method comes from, shown in the method table.
        wants_hidden: the host must hand over the attention block's input (`view.hidden`).
        wants_rope: the host must hand over the rotary embedding (`view.rope`).
        history: the scorer sums over queries, so cropping a cache cannot be undone exactly.
        compares_keys: scores hold keys against each other as they are rotated, so that they depend on where gaps are
            closed.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    wants_hidden: ClassVar[bool] = False
    wants_rope: ClassVar[bool] = False
    history: ClassVar[bool] = False
    compares_keys: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            SCORERS[cls.name] = cls

    @property
    def serializable(self) -> bool:
        """Whether the hyper-parameters are plain values that JSON can hold."""
        return True

    @property
    def collects(self) -> str:
        """`"sum"` or `"max"` if the attention of the new queries, so reduced, is needed after every forward pass: a
        host that computes attention itself then counts it on the way. Empty otherwise."""
        return ""

    @property
    def tensors_only(self) -> bool:
        """Whether `observe` and `score` take the same steps whatever the tensors hold, and touch nothing else, so that
        a graph can follow them."""
        return True

    @property
    def remembers(self) -> int:
        """How many queries `observe` asks `view.remember_queries` to keep; 0 for a scorer that does not."""
        return 0

    @property
    def fixed(self) -> bool:
        """Whether a token's score is settled when it arrives, whatever comes later and whatever is evicted."""
        return False

    def least(self, view: LayerView) -> int:
        """Tokens per head below which the method has no rule for what stays. A ratio does not go below it; a token or
        byte budget must not."""
        return 0

    def default_budget(self) -> Budget | None:
        """Budget when the caller names none; `None` means that one must be named."""
        return None

    def default_protect(self) -> Protect:
        """What the method's paper never evicts."""
        return Protect()

    def default_share(self) -> Share:
        """How the method's paper shares a budget over layers and heads."""
        return Uniform()

    def check_model(self, config: Any) -> None:
        """Raise if the method cannot serve a model with this configuration (a surrogate of another model, say)."""

    def observe(self, view: LayerView) -> None:
        """Called after every forward pass, before any eviction: collect statistics into the ledger or `state`."""

    def score(self, view: LayerView) -> Tensor:
        """`[B, Hkv, N]` worth of every held token."""
        raise NotImplementedError


@dataclass(frozen=True)
class StaticScorer(Scorer):
    """A scorer whose verdict on a token is fixed when the token arrives."""

    @property
    def fixed(self) -> bool:
        return type(self).observe is StaticScorer.observe and type(self).score is StaticScorer.score

    def token_score(self, view: LayerView) -> Tensor:
        """`[B, Hkv, T]` worth of the new tokens."""
        raise NotImplementedError

    def observe(self, view: LayerView) -> None:
        view.write_new(SCORE, self.token_score(view).to(_stat_dtype(view.new_keys)))

    def score(self, view: LayerView) -> Tensor:
        return view.column(SCORE)


def _stat_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
