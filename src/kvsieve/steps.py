"""Decode steps under a full budget: one token comes, at most one leaves every head.

Such a step is a few small operations per layer, and each of them costs far more than its arithmetic when the weights of
a whole model have passed through the processor's caches since it last ran. So the layers of a cache are decided on
together, after the last of them has attended. What leaves is what `Policy.keep` would let go of, layer by layer.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .budgets import EvictRatio, Ratio, Threshold
from .joint import Members
from .ragged import look_up
from .scorer import SCORE, StaticScorer
from .select import check_scores, check_shape, lowest_slot
from .store import Store

if TYPE_CHECKING:
    from .layer import KVLayer
    from .policy import Policy
    from .view import LayerView

__all__ = ["StepGroup", "Verdict", "one_out"]

Verdict = tuple[bool, Tensor | None]
"""`(handled, victims)`: when handled, `victims` `[B, Hkv]` are the slots that leave (-1 in heads that lose none), or
`None` if none does; when not handled, `Policy.keep` has to decide."""

_KEEP_DECIDES: Verdict = (False, None)
_NOBODY: Verdict = (True, None)


class StepGroup(Members):
    """The layers of one cache whose decode steps are decided on together.

    Each member hands over a finished step (`wait`); the last one has all of them decided. Until then every layer holds
    one token beside its budget, for which its storage has room in any case.
    """

    def wait(self, member: KVLayer, view: LayerView) -> None:
        """`member` has attended in the decode step of `view` and is ready to let a token go."""
        self.waiting[member.rank] = view
        if self.is_last(member):
            self.flush()

    def waits(self, member: KVLayer) -> bool:
        """Whether `member` has handed over something that is not decided yet."""
        return member.rank in self.waiting

    def flush(self) -> None:
        """Decide on what is there: all layers after a forward pass, some of them after one that was interrupted."""
        waiting, self.waiting = self.waiting, {}
        members = [member for member in self.members if member.rank in waiting]
        views = [waiting[member.rank] for member in members]
        verdicts = one_out(members[0].policy, views, [member.store for member in members])
        for member, view, verdict in zip(members, views, verdicts, strict=True):
            member.carry_out(verdict, view)


def one_out(policy: Policy, views: Sequence[LayerView], stores: Sequence[Store]) -> list[Verdict]:
    """Fast path of `Policy.keep` where at most one token leaves every head and nothing is padded.

    Args:
        policy: what to keep.
        views: layers of one cache after the same forward pass.
        stores: what holds their tokens.
    """
    guard = policy.protect
    if not policy.evicts or guard.kinds or guard.segments or policy.joint:
        return [_KEEP_DECIDES] * len(views)
    verdicts = [_by_counts(policy, view) for view in views]
    undecided = [index for index, verdict in enumerate(verdicts) if verdict is None]
    for alike in _of_one_shape(undecided, views, stores):
        some, theirs = [views[i] for i in alike], [stores[i] for i in alike]
        if isinstance(policy.budget, Threshold):
            decided = _judged(policy, some, theirs, policy.budget.value)
        else:
            decided = [(True, slots) for slots in _lowest(policy, some)]
        for index, verdict in zip(alike, decided, strict=True):
            verdicts[index] = verdict
    return [_KEEP_DECIDES if verdict is None else verdict for verdict in verdicts]


def _by_counts(policy: Policy, view: LayerView) -> Verdict | None:
    """What can be said before any score is looked at; `None` where the scores of tokens decide."""
    if not view.unpadded:
        return _KEEP_DECIDES
    if not policy.trigger.fires(view):
        return _NOBODY
    guard, scorer = policy.protect, policy.scorer
    if isinstance(policy.budget, Threshold):  # only the token that has just lost its protection can go, if scores last
        lasting = isinstance(scorer, StaticScorer) and scorer.fixed and guard.recent
        if not (lasting and view.new == 1 and view.decided == view.seen - 1):
            return _KEEP_DECIDES
        return _NOBODY if view.seen - 1 - guard.recent < guard.sink else None
    if not (view.plain and policy.uniform):
        return _KEEP_DECIDES
    floor = min(view.seen, max(guard.smallest, scorer.least(view)))
    counts = policy.count_list(view)
    if min(counts) < floor and not isinstance(policy.budget, (Ratio, EvictRatio)):
        return _KEEP_DECIDES  # which refuses where it has to
    view.counts = counts = [max(count, floor) for count in counts]
    if view.held <= min(counts):
        return _NOBODY
    return None if view.held == min(counts) + 1 == max(counts) + 1 else _KEEP_DECIDES


def _of_one_shape(indices: Sequence[int], views: Sequence[LayerView], stores: Sequence[Store]) -> Iterable[list[int]]:
    """The indices of layers with as many rows and heads as each other, in dense ones as many tokens, and in one
    place."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in indices:
        view, store = views[index], stores[index]
        shape = store.batch, store.heads, store.longest if view.plain else -1
        groups.setdefault((view.seen, store.device, *shape), []).append(index)
    return groups.values()


def _lowest(policy: Policy, views: Sequence[LayerView]) -> Sequence[Tensor]:
    """Where a number of tokens may stay: `[B, Hkv]` slots of the one with the lowest score, for every view."""
    positions = torch.cat([view.positions for view in views])
    scores = torch.cat([check_shape(policy.scorer.score(view), view.positions) for view in views])
    protected = policy.protect.by_position(positions, views[0].seen)
    return lowest_slot(check_scores(scores, positions), positions, protected).split(views[0].positions.shape[0])


def _judged(policy: Policy, views: Sequence[LayerView], stores: Sequence[Store], threshold: float) -> list[Verdict]:
    """Where a threshold says what may stay: what becomes of the token that has just lost its protection."""
    found = look_up(stores, views[0].seen - 1 - policy.protect.recent, SCORE)
    if found is None and len(views) > 1:
        return [_judged(policy, [v], [s], threshold)[0] for v, s in zip(views, stores, strict=True)]
    if found is None:
        return [_KEEP_DECIDES]
    slots, scores = found
    stays = scores >= threshold  # as `Policy.keep` compares them, in the precision of the scores
    victims = torch.from_numpy(np.where(stays, -1, slots))
    broken, staying = np.isnan(scores).any((1, 2)).tolist(), stays.mean((1, 2)).tolist()
    verdicts: list[Verdict] = []
    for view, nan, share, leaving in zip(views, broken, staying, victims, strict=True):
        if nan or (0 < share < 1 and view.plain):
            verdicts.append(_KEEP_DECIDES)  # `keep` refuses NaN, and heads of a dense store cannot part here
        else:
            verdicts.append(_NOBODY if share == 1 else (True, leaving))
    return verdicts
