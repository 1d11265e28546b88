"""Choose which tokens stay, given scores and counts. Deterministic: ties go to the more recent token.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens (padded where heads differ in length).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import ScoreError

__all__ = ["check_scores", "check_shape", "lowest_slot", "top_mask", "top_mask_naive"]


def check_scores(scores: Tensor, positions: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return `scores` in float32 (float64 stays), or raise `ScoreError` if a token's score is NaN.

    Args:
        scores: what the scorer returned.
        positions: `[B, Hkv, N]`, the shape that scores must have.
        valid: `[B, Hkv, N]` bool, where a token is; everywhere by default.
    """
    check_shape(scores, positions)
    if scores.dtype != torch.float64:
        scores = scores.float()
    if not scores.numel() or not bool(scores.amin().isnan()):
        return scores
    bad = torch.isnan(scores)
    if valid is not None:
        bad = bad & valid
    if bool(bad.any()):
        total = positions.numel() if valid is None else int(valid.sum())
        raise ScoreError(
            f"{int(bad.sum())} of {total} scores are NaN; "
            "the model's keys, values or hidden states are probably not finite"
        )
    return scores


def check_shape(scores: Tensor, positions: Tensor) -> Tensor:
    """Return `scores` as they are, or raise `ScoreError` if they are not one per entry of `positions`."""
    if scores.shape != positions.shape:
        raise ScoreError(
            f"a scorer must return one score per stored token, shape {tuple(positions.shape)}; "
            f"it returned {tuple(scores.shape)}"
        )
    return scores


def top_mask(scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts` best tokens of every head.

    Args:
        scores: `[B, Hkv, N]` float32, larger is better.
        positions: `[B, Hkv, N]` original positions; among equal scores the larger position wins.
        valid: `[B, Hkv, N]` bool; tokens that are not valid are never kept.
        protected: `[B, Hkv, N]` bool; ranked before all others.
        counts: `[B, Hkv]` how many tokens each head may keep.

    Returns:
        `[B, Hkv, N]` bool.
    """
    n_valid = valid.sum(-1)
    counts = torch.minimum(counts.to(n_valid.device), n_valid)
    drops = n_valid - counts
    if int(drops.max()) == 0:
        return valid.clone()
    if int(drops.max()) == 1 and not bool((protected & valid).sum(-1).gt(counts).any()):
        return _drop_one(scores, positions, valid, protected, drops)
    if bool(((protected & valid).sum(-1) > counts).any()):
        return _rank(scores, positions, valid, protected) < counts[..., None]
    return _above_threshold(scores, positions, valid, protected, counts)


def _above_threshold(scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
    """`top_mask` where no head protects more than it may keep: what lies above the score that the last place costs, and
    of those that lie on it the most recent. Finding that score takes no sort."""
    limits = torch.finfo(scores.dtype)
    worth = torch.where(valid, scores.clamp(limits.min, limits.max), -torch.inf).masked_fill_(
        protected & valid, torch.inf
    )
    lowest = _largest(worth, counts)
    keep = worth > lowest
    level = (worth == lowest) & valid & (counts > 0)[..., None]
    missing = counts - keep.sum(-1)
    if bool((level.sum(-1) > missing).any()):
        places = torch.where(level, positions.long(), -1)
        level &= (positions >= _largest(places, missing)) & (missing > 0)[..., None]
    return keep | level


def _largest(values: Tensor, ranks: Tensor) -> Tensor:
    """`[B, Hkv, 1]`: of the values `[B, Hkv, N]` of each head, the one of this rank from above (rank 0 counts as 1).

    By `topk`, as `kthvalue` takes quadratic time on values that rise with a few high ones at the ends: positions, sinks
    and a window.
    """
    counts = ranks.clamp_min(1)
    first = int(counts.flatten()[0])
    if bool((counts == first).all()):
        return values.topk(first, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    out = values.new_empty(*ranks.shape, 1)
    for b, h in np.ndindex(*ranks.shape):
        out[b, h] = values[b, h].topk(int(counts[b, h]), sorted=False).values.amin()
    return out


def lowest_slot(scores: Tensor, positions: Tensor, closed: Tensor) -> Tensor:
    """`[B, Hkv]` slot of the lowest score of every head among slots that are not `closed`; the oldest among equals.
    Scores are as `check_scores` returns them."""
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():  # in a third of the time
        worth = scores.detach().numpy().copy()
        np.copyto(worth, np.inf, where=closed.numpy())
        lowest, slots = worth.min(-1, keepdims=True), worth.argmin(-1)
        if np.count_nonzero(worth == lowest) == slots.size and lowest.max() < np.inf:
            return torch.from_numpy(slots)
    return _lowest_slot(scores, positions, closed)


def _lowest_slot(scores: Tensor, positions: Tensor, closed: Tensor) -> Tensor:
    """`lowest_slot` where scores may be equal, and on other devices."""
    worth = scores.masked_fill(closed, float("inf"))
    tied = (worth == worth.amin(-1, keepdim=True)).logical_and_(~closed)
    return torch.where(tied, positions, torch.iinfo(positions.dtype).max).argmin(-1)


def _drop_one(scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor, drops: Tensor) -> Tensor:
    """At most one victim per head. No sort."""
    victim = lowest_slot(scores, positions, protected | ~valid)[..., None]
    keep = valid.clone()
    return keep.scatter_(-1, victim, keep.gather(-1, victim) & (drops[..., None] == 0))


def _rank(scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor) -> Tensor:
    """Rank 0 is the best token of each head: protected first, then by score, then by recency; invalid last."""
    tier = torch.where(valid, torch.where(protected, 0, 1), 2)
    order = positions.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order.gather(-1, tier.gather(-1, order).argsort(dim=-1, stable=True))
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def top_mask_naive(scores: Tensor, positions: Tensor, valid: Tensor, protected: Tensor, counts: Tensor) -> Tensor:
    """Twin of `top_mask` in plain Python, for tests."""
    keep = torch.zeros_like(valid)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            slots = [i for i in range(scores.shape[2]) if valid[b, h, i]]
            slots.sort(
                key=lambda i: (bool(protected[b, h, i]), float(scores[b, h, i]), int(positions[b, h, i])),
                reverse=True,
            )
            for i in slots[: int(counts[b, h])]:
                keep[b, h, i] = True
    return keep
