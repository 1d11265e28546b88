"""Layers that are cut together: for shares that need to hear from every layer before any of them gives tokens up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .budgets import Ratio
from .errors import BudgetError

if TYPE_CHECKING:
    from .layer import KVLayer
    from .view import LayerView

__all__ = ["LayerGroup"]


class LayerGroup:
    """The layers of one cache under one policy with a joint share.

    Each member reports a finished forward pass (`wait`); the last one to do so makes the decision for all. Between
    that pass's first layer and its last, every layer holds the new tokens beside its budget.
    """

    def __init__(self) -> None:
        self.members: list[KVLayer] = []
        self.waiting: dict[int, LayerView] = {}

    def commit(self) -> None:
        """Carry out what the members have postponed, before any of them takes new tokens."""
        for member in self.members:
            member.commit()

    def wait(self, member: KVLayer, view: LayerView) -> None:
        """`member` has seen the forward pass in `view` and is ready to be cut."""
        if any(other.seen != view.seen for other in self.waiting.values()):
            self.waiting.clear()  # an interrupted pass left these behind
        self.waiting[member.rank] = view
        if len(self.waiting) < len(self.members):
            return
        views = [self.waiting[member.rank] for member in self.members]
        self.waiting = {}
        for member, view, count in zip(self.members, views, self._counts(views), strict=True):
            member.cut(view, torch.full((view.positions.shape[0],), count))

    def _counts(self, views: list[LayerView]) -> list[int]:
        """Tokens per head of every layer. Rows of a batch share them, so that a layer stays one block."""
        policy = self.members[0].policy
        valid = [view.valid for view in views]
        held = [int(mask.sum(-1).max()) for mask in valid]
        needed = [int((mask & view.protected).sum(-1).max()) for mask, view in zip(valid, views, strict=True)]
        amount = sum(sum(policy.budget.amounts(view)) / view.positions.shape[0] for view in views) / len(views)
        if not policy.share.strict:
            needed = [0] * len(views)
        elif sum(needed) > amount * len(views) and not isinstance(policy.budget, Ratio):
            least = -(-sum(needed) // len(views))
            raise BudgetError(
                f"{policy.name}: {amount:g} tokens per layer, on average, are below the {least} that are protected; "
                f"the smallest legal budget here is {least} tokens"
            )
        weights = [policy.share.weigh(view) for view in views]
        return policy.share.allocate(amount, weights, needed, held, views[0].seen)
