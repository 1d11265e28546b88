"""Keys unlike the average key stay (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..scorer import Scorer
from ..view import LayerView

__all__ = ["KeyDiff"]


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Score: minus the cosine between a key and the mean of the normalised keys held."""

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "arXiv 2504.15364, algorithm 1"
    compares_keys: ClassVar[bool] = True

    def score(self, view: LayerView) -> Tensor:
        keys = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32))
        keys = normalize(keys, dim=-1) * view.valid[..., None]
        anchor = normalize(keys.sum(2, keepdim=True), dim=-1)
        return -(keys * anchor).sum(-1)
