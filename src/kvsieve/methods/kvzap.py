"""A learned surrogate of KVzip+ scores every token on arrival (KVzap, arXiv 2601.07891)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import PolicyError
from ..protect import Protect
from ..scorer import StaticScorer
from ..surrogates import KVzapSurrogate, SurrogateShape, shared
from ..view import LayerView

__all__ = ["KVzap"]


@dataclass(frozen=True)
class KVzap(StaticScorer):
    """Score: log of how much attention, weighted by what it adds to the residual stream, a token would get if the text
    were repeated, predicted from the attention block's input. With `threshold=`, a token that leaves the window goes
    if its score is below it (the rule of DMS, arXiv 2506.05345); with `budget=`, the best ones stay.

    Attributes:
        scorer: folder or Hub id of a surrogate made for the model, or a `KVzapSurrogate`.
        n_sink: first tokens that are never evicted.
    """

    name: ClassVar[str] = "kvzap"
    source: ClassVar[str] = "arXiv 2601.07891, section 3"
    wants_hidden: ClassVar[bool] = True

    scorer: str | KVzapSurrogate | None = None
    n_sink: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.scorer, os.PathLike):
            object.__setattr__(self, "scorer", os.fspath(self.scorer))
        if not isinstance(self.scorer, str | KVzapSurrogate | None):
            raise PolicyError(f"kvzap: scorer must be a folder, a Hub id or a KVzapSurrogate, not {self.scorer!r}")

    @property
    def serializable(self) -> bool:
        return not isinstance(self.scorer, KVzapSurrogate)

    @property
    def tensors_only(self) -> bool:
        return not isinstance(self.scorer, str)

    def default_protect(self) -> Protect:
        return Protect(sink=self.n_sink, recent=128)

    def check_model(self, config: Any) -> None:
        if self.scorer is None:
            raise PolicyError(
                "kvzap needs a surrogate made for this model: scorer=<folder>, trained by `kvsieve train-kvzap`, or "
                "the Hub id of a published one, such as nvidia/KVzap-mlp-Qwen3-8B"
            )
        live = isinstance(self.scorer, KVzapSurrogate)
        shape = self.scorer.shape if isinstance(self.scorer, KVzapSurrogate) else SurrogateShape.read(self.scorer)
        shape.check_model(config, "this surrogate" if live else str(self.scorer))

    def token_score(self, view: LayerView) -> Tensor:
        hidden, surrogate = view.hidden, self.scorer
        if isinstance(surrogate, str):
            surrogate = shared(surrogate, hidden.device, torch.promote_types(hidden.dtype, torch.float32))
        if surrogate is None:
            raise PolicyError("kvzap needs a surrogate: scorer=<folder or Hub id>")
        return surrogate.score(view.layer_idx, hidden)
