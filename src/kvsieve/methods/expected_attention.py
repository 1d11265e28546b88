"""Attention that future queries are expected to pay, from the statistics of past ones (arXiv 2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PolicyError, UnsupportedModelError
from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["ExpectedAttention"]

_BLOCK = 2048
"""Queries or keys that are widened and multiplied at a time."""


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Queries before rotation are taken as Gaussian; their mean and covariance, rotated to the average of the next
    `n_future_positions`, give every key's expected weight in closed form.

    Attributes:
        n_future_positions: how far ahead to look.
        n_sink: first tokens that are never evicted and not counted in the statistics.
        use_covariance: include the second-order term.
        use_vnorm: multiply by the norm of the value.
        epsilon: added to the weight before that multiplication.
    """

    name: ClassVar[str] = "expected_attention"
    source: ClassVar[str] = "arXiv 2510.00636, section 3"
    wants_rope: ClassVar[bool] = True
    history: ClassVar[bool] = True

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.n_future_positions < 1 or self.n_sink < 0:
            raise PolicyError("expected_attention: n_future_positions must be 1 or more and n_sink zero or more")

    def default_protect(self) -> Protect:
        return Protect(sink=self.n_sink)

    def observe(self, view: LayerView) -> None:
        """Merge the new queries into running moments (pairwise update, stable in float32)."""
        if not view.rope.text_only:
            raise UnsupportedModelError("expected_attention needs one rotary axis; this model rotates by several")
        place = view.new_positions - view.first[:, None]
        for start in range(0, view.new, _BLOCK):
            block = slice(start, start + _BLOCK)
            self._merge(view, view.queries[:, :, block], place[:, block])

    def _merge(self, view: LayerView, queries: Tensor, place: Tensor) -> None:
        """Take `queries` `[B, H, t, D]` at `place` `[B, t]` into the moments."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        queries = view.rope.unrotate(queries.to(wide), place.clamp_min(0))
        counted = (place >= self.n_sink).to(wide)
        count = counted.sum(1).view(-1, 1, 1)
        weight = counted[:, None, :, None]
        mean = (queries * weight).sum(2) / count.clamp_min(1)
        centred = (queries - mean[:, :, None]) * weight
        scatter = centred.transpose(-1, -2) @ centred
        if "mean" not in view.state:
            view.state.update(count=count, mean=mean, scatter=scatter)
            return
        old_count, old_mean = view.state["count"], view.state["mean"]
        total = old_count + count
        delta = mean - old_mean
        part = count / total.clamp_min(1)
        view.state["scatter"] += scatter + (delta[..., None] * delta[..., None, :]) * (old_count * part)[..., None]
        view.state["mean"] = old_mean + delta * part
        view.state["count"] = total

    def score(self, view: LayerView) -> Tensor:
        count, mean, scatter = view.state["count"], view.state["mean"], view.state["scatter"]
        rotate = view.rope.mean_rotation(view.seen - view.first, self.n_future_positions)
        keys = view.keys.to(mean.dtype)
        hkv, dim = keys.shape[1], keys.shape[-1]
        mean = rotate(mean[:, :, None]).unflatten(1, (hkv, -1)).squeeze(3)
        logits = torch.einsum("bhgd,bhnd->bhgn", mean, keys) / dim**0.5
        if self.use_covariance:
            covariance = scatter / count.clamp_min(1)[..., None]
            covariance = rotate(rotate(covariance).transpose(-1, -2)).transpose(-1, -2).unflatten(1, (hkv, -1))
            covariance = covariance / (2 * dim)
            for start in range(0, keys.shape[2], _BLOCK):
                block = keys[:, :, None, start : start + _BLOCK]
                logits[..., start : start + _BLOCK] += ((block @ covariance) * block).sum(-1)
        place = view.positions - view.first[:, None, None]
        ranked = view.valid & (place >= self.n_sink)
        weights = logits.masked_fill(~ranked[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
        if self.use_vnorm:
            weights = (weights + self.epsilon) * view.values.to(mean.dtype).norm(dim=-1)
        return weights
