"""Layers that are cut together: for shares that need to hear from every layer before any of them gives tokens up."""

from __future__ import annotations

import copy
import math
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .budgets import Ratio
from .errors import BudgetError, ScoreError, UnsupportedOperationError

if TYPE_CHECKING:
    from .layer import KVLayer
    from .view import LayerView

__all__ = ["LayerGroup", "Members"]


class Members:
    """The layers of one cache, in the order in which they attend, and what they have handed over. Layers know their
    group; it must not keep them alive in turn, or a cache that is deleted would hold its memory."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[KVLayer]] = []
        self.waiting: dict[int, LayerView] = {}

    @property
    def members(self) -> list[KVLayer]:
        """The layers, by rank."""
        return [member for ref in self._members if (member := ref()) is not None]

    def is_last(self, member: KVLayer) -> bool:
        """Whether no other layer attends after this one."""
        return self._members[-1]() is member

    def join(self, member: KVLayer) -> None:
        """Take a layer in."""
        members = sorted([*self.members, member], key=lambda layer: layer.rank)
        self._members = [weakref.ref(layer) for layer in members]

    def leave(self, member: KVLayer) -> None:
        """Go on without this layer."""
        self.forget(member)
        self._members = [weakref.ref(layer) for layer in self.members if layer is not member]

    def forget(self, member: KVLayer) -> None:
        """What `member` has handed over no longer holds."""
        self.waiting.pop(member.rank, None)

    def __deepcopy__(self, memo: dict[int, object]) -> Members:
        """A group that the copies of the layers join as they are made."""
        twin = type(self)()
        memo[id(self)] = twin
        twin.waiting = copy.deepcopy(self.waiting, memo)
        return twin


class LayerGroup(Members):
    """The layers of one cache under one policy with a joint share.

    Each member reports a finished forward pass (`wait`); the last one to do so makes the decision for all. Between
    that pass's first layer and its last, every layer holds the new tokens beside its budget.
    """

    def commit(self) -> None:
        """Carry out what the members have postponed, before any of them takes new tokens."""
        for member in self.members:
            member.commit()

    def wait(self, member: KVLayer, view: LayerView) -> None:
        """`member` has seen the forward pass in `view` and is ready to be cut.

        Raises:
            UnsupportedOperationError: an interrupted pass has left this layer behind the others.
        """
        ahead = max((other.seen for other in self.waiting.values()), default=0)
        if ahead > view.seen:
            raise UnsupportedOperationError(
                f"layer {member.layer_idx} has seen {view.seen} tokens where others have seen {ahead}: an earlier "
                "forward pass was interrupted; reset() the cache"
            )
        if ahead < view.seen:
            self.waiting.clear()  # an interrupted pass left these behind
        self.waiting[member.rank] = view
        members = self.members
        if len(self.waiting) < len(members):
            return
        views = [self.waiting[member.rank] for member in members]
        self.waiting = {}
        trigger = member.policy.trigger
        if not any(trigger.fires(view) for view in views):  # one layer over a length is enough
            for member, view in zip(members, views, strict=True):
                member.cut(view)
            return
        for member, view, counts in zip(members, views, self._counts(views), strict=True):
            member.cut(view, counts)

    def _counts(self, views: list[LayerView]) -> Tensor:
        """`[layers, B]` tokens per head. Every row decides for itself, unless storage is to stay one block."""
        first, b, n = self.members[0], views[0].positions.shape[0], len(views)
        share, budget = first.policy.share, first.policy.budget
        closed = [view.valid & view.protected for view in views]
        held = torch.stack([view.valid.sum(-1).amax(-1) for view in views], 1).cpu()
        needed = torch.stack([mask.sum(-1).amax(-1) for mask in closed], 1).cpu()
        amounts = [math.fsum(row) / n for row in zip(*map(budget.amounts, views), strict=True)]
        weights = torch.tensor([share.weigh(view) for view in views], dtype=torch.float64).T
        seen = views[0].real_seen
        _check_finite(weights, views)
        if first.fitted:
            held, needed, seen = held.amax(0, True), needed.amax(0, True), [max(seen)]
            amounts, weights = [math.fsum(amounts) / b], weights.mean(0, True)
        counts = []
        for i, amount in enumerate(amounts):
            floors = needed[i].tolist() if share.strict else [0] * n
            if sum(floors) > amount * n and not isinstance(budget, Ratio):
                least = -(-sum(floors) // n)
                raise BudgetError(
                    f"{first.policy.name}: {amount:g} tokens per layer, on average, are below the {least} that are "
                    f"protected; the smallest legal budget here is {least} tokens"
                )
            counts.append(share.allocate(amount, weights[i].tolist(), floors, held[i].tolist(), seen[i]))
        return torch.tensor(counts).T.expand(n, b)


def _check_finite(weights: Tensor, views: list[LayerView]) -> None:
    wrong = (~weights.isfinite()).any(0).nonzero()[:, 0].tolist()
    if wrong:
        raise ScoreError(
            f"the attention of layers {[views[i].layer_idx for i in wrong]} is not finite; "
            "the model's keys, values or hidden states are probably not finite either"
        )
