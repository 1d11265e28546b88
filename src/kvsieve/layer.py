"""One attention layer of one sequence batch under one policy: storage, attention, statistics, eviction.

This is what a host drives: `append` the new keys and values, `attend`, then `observe` (which evicts).

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` stored tokens, `T` new tokens, `D` head dim.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import placement
from .attended import AttendedLayer, per_head
from .errors import UnsupportedOperationError
from .joint import LayerGroup, Members
from .ledger import KEY, KIND, PLACE, POSITION, SEGMENT, VALUE
from .policy import Policy
from .rope import Rotary
from .steps import StepGroup, Verdict, one_out
from .store import DenseStore
from .triggers import OnRequest
from .view import LayerView, Visibility

__all__ = ["KVLayer"]

_NOTHING = torch.empty(0)


@dataclass
class _Forward:
    """What a forward pass leaves behind until its eviction is decided."""

    queries: Tensor | None
    visibility: Visibility
    hidden: Tensor | None
    collected: tuple[str, Tensor] | None


class KVLayer(AttendedLayer):
    """Keys, values and ledger of one layer, kept within a policy's budget.

    Args:
        policy: what to keep; shared freely between layers and caches, it has no state.
        layer_idx: index among the model's layers.
        rank, n_layers: index among the managed layers, and how many those are.
        positions: `"original"`, `"slot"` (gaps closed towards the newest token) or `"contiguous"` (gaps closed towards
            the oldest, by `place`); the last two need `rope`.
        rope: the model's rotary embedding, for `"slot"` positions and scorers that ask for it.
        group: the layers that are cut together, where the policy asks for that; a layer on its own needs none.
        steps: the layers whose decode steps are decided on together, which takes less time; not needed either.
        window: segments older than the last `window` leave, whatever the policy says; the first one, and what the
            policy protects, stay.
        room: tokens of a forward pass, where they are always as many: after an eviction, storage fits what is kept
            and this many more, to the byte.
    """

    def __init__(
        self,
        policy: Policy,
        layer_idx: int = 0,
        rank: int = 0,
        n_layers: int = 1,
        positions: str = "original",
        rope: Rotary | None = None,
        group: LayerGroup | None = None,
        steps: StepGroup | None = None,
        window: int | None = None,
        room: int | None = None,
    ) -> None:
        self.layer_idx, self.rank, self.n_layers, self._room = layer_idx, rank, n_layers, room
        self.group = None if not policy.joint else LayerGroup() if group is None else group
        self.steps = steps if self.group is None else None
        if self._together is not None:
            self._together.join(self)
        super().__init__(policy, positions, rope, window)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.state: dict[str, Tensor] = {}
        self.segment = 0
        self.evicted_at = self.decided_at = 0
        self.new_keys = _NOTHING
        self._pending: _Forward | None = None
        self._latest: _Forward | None = None
        if self._together is not None:
            self._together.forget(self)

    @property
    def _together(self) -> Members | None:
        """The layers that this one waits for: at every decision, at decode steps, or never."""
        return self.steps if self.group is None else self.group

    @property
    def fitted(self) -> bool:
        """Whether storage is fitted to what is kept and the room for one forward pass."""
        return self._room is not None

    @property
    def room(self) -> int:
        """Tokens that a byte budget sets aside for the next forward pass."""
        return self._room or 1

    def __deepcopy__(self, memo: dict[int, object]) -> KVLayer:
        """A copy of the sequence; policy and model parts are shared."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        own = ("store", "state", "pads", "first", "new_keys", "_pending", "_latest", "_collected", "group", "steps")
        for name in own:
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        if twin._together is not None:
            twin._together.join(twin)
        return twin

    # ---- the three calls of a host

    def new_store(self, b: int, h: int) -> DenseStore:
        """Empty storage for `b` rows of `h` heads."""
        # a stream of equal passes may grow in larger steps: what an eviction leaves is fitted to the byte
        return DenseStore(b, h) if self._room is None else DenseStore(b, h, spare_share=4)

    def append(
        self, keys: Tensor, values: Tensor, kind: Tensor | None = None, segment: int | Tensor | None = None
    ) -> None:
        """Store `T` new tokens.

        Args:
            keys: `[B, Hkv, T, D]` rotated keys.
            values: `[B, Hkv, T, Dv]`.
            kind: `[T]` or `[B, T]` what the tokens are (`Kind`); text by default.
            segment: frame, turn or chunk they belong to.
        """
        b, h, t = keys.shape[:3]
        if not self.seen:
            self.store = self.new_store(b, h)
            self.pads = torch.zeros(b, dtype=torch.long)
            self.first = torch.zeros(b, dtype=torch.long, device=keys.device)
        self.settle()
        if b != self.store.batch:
            raise UnsupportedOperationError(
                f"the cache holds {self.store.batch} sequences, the new tokens have {b}; reset() or use a new cache"
            )
        new: dict[str, Tensor | float] = {KEY: keys, VALUE: values, POSITION: _count_up(self.seen, t, keys)}
        if self.positions == "contiguous" or self.store.has(PLACE):
            new[PLACE] = _count_up(self.next_place, t, keys)
        self.next_place += t
        self.new_kind = kind
        if kind is not None:
            new[KIND] = per_head(kind.to(torch.uint8), b, h, t)
        if segment is not None:
            value = torch.as_tensor(segment, dtype=torch.int32, device=keys.device)
            new[SEGMENT] = per_head(value.expand(t) if value.dim() == 0 else value, b, h, t)
            self.segment = segment if isinstance(segment, int) else int(value.max())
        limit = None
        if not self.store.has_room(t):
            token = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
            limit = self.policy.limit(self.n_layers * b * h * token, self.room)
        self.store.append(new, t, None if limit is None else limit + self.room)
        self.seen += t
        self.new_keys = keys

    def observe(
        self, queries: Tensor | None, visibility: Visibility, hidden: Tensor | None = None, hold: bool = False
    ) -> None:
        """Tell the scorer about the forward pass, then evict; `hold` postpones both until `commit`."""
        self._pending = _Forward(queries, visibility, hidden, self._collected)
        self._collected = None
        if not hold:
            self.commit(together=True)

    def commit(self, rejected: int = 0, together: bool = False) -> None:
        """Carry out what `observe` has postponed, leaving out the last `rejected` tokens of that forward pass.
        `together`: all layers are doing so, one after the other."""
        if self._pending is None:
            return
        forward, self._pending = self._pending, None
        if rejected:
            count = forward.visibility.count - rejected
            if count <= 0:
                return
            queries = None if forward.queries is None else forward.queries[:, :, :count]
            hidden = None if forward.hidden is None else forward.hidden[:, :count]
            self.new_keys = self.new_keys[:, :, :count]
            forward = _Forward(queries, replace(forward.visibility, count=count), hidden, None)
        view = self._view(forward)
        self.policy.scorer.observe(view)
        if isinstance(self.policy.trigger, OnRequest):
            self._latest = forward
            return
        self._decide(view, together)

    def _view(self, forward: _Forward) -> LayerView:
        return LayerView(self, forward.queries, forward.visibility, forward.hidden, forward.collected)

    def _decide(self, view: LayerView, together: bool = False) -> None:
        if self.group is not None:
            self.group.wait(self, view)
        elif self.steps is not None and together and view.new == 1:
            self.steps.wait(self, view)
        else:
            self.cut(view)

    def decide_alone(self) -> None:
        """Wait for no other layer at decode steps: for a host that goes through several in one layer."""
        if self.steps is not None:
            self.steps.leave(self)
            self.steps = None

    def settle(self) -> None:
        """`commit`, together with all layers that wait for this one. Once a forward pass has gone on to the next
        layers, this one has nothing to settle, while those before it hold the very same pass back."""
        if self._pending is not None:
            self.commit() if self.group is None else self.group.commit()
        self._settle_step()

    def _settle_step(self) -> None:
        """Have a decode step decided now that an interrupted pass has left undecided."""
        if self.steps is not None and self.steps.waits(self):
            self.steps.flush()

    def evict(self) -> None:
        """Evict now, as if the forward pass that came last had just ended; for policies whose trigger is `OnRequest`,
        with another trigger put in its place."""
        self.settle()
        self.decided_at = 0
        if self.seen:
            latest = self._latest or _Forward(None, Visibility(self.seen, 0), None, None)
            self._decide(self._view(replace(latest, collected=None)))

    def place(self, length: int) -> None:
        """Rotate what is held to the positions up to `length`, without gaps, and go on from there. For `"contiguous"`
        positions, now and then for `"slot"`; layers and heads that hold less than `length` begin later."""
        assert self.rope is not None
        moved, self.next_place = length - self.next_place, length
        if not self.seen:
            return
        if not placement.towards_oldest(self.store, self.rope, length) and not moved:
            return
        if "queries" in self.state:  # the latest ones, which lie where the latest keys do
            queries = self.state["queries"]
            shift = torch.full(queries.shape[:3], moved, device=queries.device)
            self.state["queries"] = self.rope.shift(queries, shift)
        self._latest = None

    def cut(self, view: LayerView, counts: Tensor | None = None) -> None:
        """Let go of what the policy does not keep; `counts` as in `Policy.keep`."""
        self.carry_out(one_out(self.policy, [view], [self.store])[0], view, counts)

    def carry_out(self, verdict: Verdict, view: LayerView, counts: Tensor | None = None) -> None:
        """`cut`, once `steps.one_out` has given its verdict."""
        before = self.store.tokens
        handled, victims = verdict
        keep = None
        if victims is not None:
            self.store.drop(victims, self._room)
        elif not handled:
            keep = self.policy.keep(view) if counts is None else self.policy.keep(view, counts)
        if keep is not None:
            self.store = self.store.keep(keep, uniform=self.policy.uniform, room=self._room)
            self.has_pads = False
        if self.policy.trigger.fires(view):
            self.decided_at = self.seen
        self.new_keys = _NOTHING
        if self.store.tokens < before:
            self.evictions += 1
            self.evicted_at = self.seen

    # ---- changes to the batch and to the past

    def map_rows(self, rows: Tensor) -> None:
        """Make batch row `i` a copy of the present row `rows[i]`, for beams, repeats and selections."""
        if not self.seen:
            return
        self.settle()
        self.store = self.store.map_rows(rows)
        self.state = {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self.state.items()}
        self.pads = self.pads[rows.cpu()]
        if self._pad_columns is not None:
            self._pad_columns = self._pad_columns[rows.to(self._pad_columns.device)]
        self.first = self.first[rows.to(self.first.device)]

    def crop(self, count: int, regardless: bool = False) -> None:
        """Take back the last `count` tokens, as if they had never been fed; `regardless` of what can no longer be taken
        back with them: evictions that came after them, and attention that was counted.

        Raises:
            UnsupportedOperationError: an eviction, or statistics that cannot be subtracted, came after them.
        """
        if count <= 0 or not self.seen:
            self.commit()
            return
        self._settle_step()
        forward = self._pending
        held_back = forward.visibility.count if forward is not None else 0
        if count > self.seen:
            raise UnsupportedOperationError(f"cannot take back {count} tokens: only {self.seen} were fed")
        if not regardless and count > held_back and self.evicted_at > self.seen - count:
            raise UnsupportedOperationError(
                f"layer {self.layer_idx} has evicted tokens since the {count} last ones arrived; "
                "what they pushed out is gone. Crop before evicting, or start a new cache"
            )
        if not regardless and count > held_back and self.policy.scorer.history:
            raise UnsupportedOperationError(
                f"{self.policy.name} has already counted the attention of the last {count} tokens, "
                "which cannot be taken back; start a new cache, or copy this one before the tokens are fed"
            )
        if self.group is not None:
            self.group.forget(self)
        keep = self.store.live & (self.store.read(POSITION) < self.seen - count)
        if self._pad_columns is not None:
            self._pad_columns = self._pad_columns[:, : self.seen - count]
            self.pads = self._pad_columns.sum(-1).cpu()
        fresh = self.store.new
        self.store = self.store.keep(keep)
        self.seen -= count
        self.decided_at = 0
        self.next_place -= count
        self._latest = None
        self.store.new = max(fresh - count, 0)
        self.commit(rejected=min(count, held_back))

    @property
    def pending(self) -> bool:
        """Whether a forward pass waits for `commit`."""
        return self._pending is not None


def _count_up(start: int, count: int, like: Tensor) -> Tensor | int:
    """`[B, Hkv, count]` int32 from `start` on, for `like` `[B, Hkv, count, D]`; just `start` where that is all."""
    if count == 1:
        return start
    return torch.arange(start, start + count, dtype=torch.int32, device=like.device).expand(like.shape[:3])
