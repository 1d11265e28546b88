"""One managed layer of fixed capacity: prompts go through a `KVLayer`, decode steps through slots that never move."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import hf
from .attention import attend, attend_few, attention_mass, count_one
from .budgets import Tokens
from .cache_layer import SieveLayer
from .errors import PolicyError, ScoreError, UnsupportedModelError, UnsupportedOperationError
from .layer import KVLayer
from .ledger import KEY, POSITION, VALUE
from .select import check_scores, lowest_slot
from .slots import SlotStore
from .view import LayerView

__all__ = ["SlotView", "StaticSieveLayer", "attend_slots"]

QUERIES = "queries"
"""Where `LayerView.remember_queries` keeps the last ones."""


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor,
    reduce: str = "",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one query over the slots that hold a token; empty ones weigh exactly zero.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, Hkv, C, D]`.
        v: `[B, Hkv, C, Dv]`.
        live: `[B, Hkv, C]` bool, at least one per head.
        reduce: `"sum"`, `"max"` or `"square"` as in `attention.attention_mass`; empty if nothing is to be counted.
        scale, softcap, sinks: as in `attention.attention_mass`.

    Returns:
        `[B, H, 1, Dv]` in `v`'s dtype, and `[B, Hkv, C]` float32 (float64 for float64 queries) from the same
        probabilities, or `None`.
    """
    seen = live[:, :, None]
    if softcap is not None or sinks is not None:
        rest: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "visible": lambda s, e: seen}
        return attend(q, k, v, **rest), attention_mass(q, k, None, reduce, **rest) if reduce else None
    if not reduce:
        return attend_few(q, k, v, seen, scale=scale), None
    return count_one(q, k, v, reduce, scale, live)


class SlotView(LayerView):
    """What a scorer sees of slots after a decode step: the same names as in `LayerView`, numbers that change from step
    to step as tensors without dimensions (`seen`), and empty slots, where `valid` is false."""

    def __init__(
        self,
        layer: KVLayer,
        slots: SlotStore,
        keys: Tensor,
        queries: Tensor,
        hidden: Tensor | None,
        collected: tuple[str, Tensor] | None,
        **attention: Any,
    ) -> None:
        self._layer, self._store, self._slots = layer, slots, slots
        self._queries, self._hidden, self._collected = queries, hidden, collected
        self._new_keys, self._attention = keys, attention
        self._counts = torch.full((slots.batch,), slots.capacity - 1, device=slots.length.device)
        self.layer_idx, self.rank, self.n_layers = layer.layer_idx, layer.rank, layer.n_layers
        self.seen, self.new = cast(int, slots.length), 1  # a tensor, which does in arithmetic what the number would
        self.first, self.segment = slots.first, 0
        self.state = dict(slots.state)
        self.positions, self.real = slots.read(POSITION), slots.live
        self.keys, self.values = slots.read(KEY), slots.read(VALUE)

    @property
    def protected(self) -> Tensor:
        return self._layer.policy.protect.mask(self)

    @property
    def valid(self) -> Tensor:
        return self.real

    @property
    def held(self) -> int:
        raise UnsupportedOperationError("numbers of tokens are not known while decode steps are compiled")

    @property
    def plain(self) -> bool:
        return False

    @property
    def alike(self) -> bool:
        return True  # heads of a layer that have held the same tokens in the same slots keep doing so

    @property
    def real_seen(self) -> list[int]:
        raise UnsupportedOperationError("numbers of tokens are not known while decode steps are compiled")

    @property
    def new_keys(self) -> Tensor:
        return self._new_keys

    @property
    def new_positions(self) -> Tensor:
        return self._slots.length[None] - 1

    @property
    def real_queries(self) -> Tensor | None:
        return None

    def attention_mass(
        self, queries: Tensor | None = None, weights: Tensor | None = None, reduce: str = "sum"
    ) -> Tensor:
        if queries is None and weights is None and self._collected is not None and self._collected[0] == reduce:
            return self._collected[1]
        rows = self.queries if queries is None else queries
        column = self._slots.length - rows.shape[2] + torch.arange(rows.shape[2], device=rows.device)
        positions = self.positions[:, :, None]
        seen = (positions >= 0) & (positions <= column[:, None])
        real = (column >= self.first[:, None])[:, None].to(rows.dtype)  # not padding, nor before the text
        return attention_mass(
            rows, self.keys, real if weights is None else weights * real, reduce,
            visible=lambda s, e: seen[:, :, s:e], **self._attention,
        )  # fmt: skip

    def exposure(self) -> Tensor:
        return torch.ones(self.positions.shape, device=self.positions.device)

    def remember_queries(self, count: int) -> Tensor:
        if self.state[QUERIES].shape[2] != count:
            raise PolicyError(
                f"{self._layer.policy.name} remembers {count} queries; in a cache of fixed capacity it has to say so "
                "beforehand (`remembers`)"
            )
        kept = torch.cat([self.state[QUERIES], self.queries], 2)[:, :, -count:]
        self.state[QUERIES] = kept
        return kept


class StaticSieveLayer(SieveLayer):
    """A managed layer that holds `budget + 1` slots per head while it decodes: the token that comes next goes into the
    free one, and after its attention one token leaves."""

    is_compileable = True

    def __init__(self, core: KVLayer) -> None:
        self._core = core
        core.decide_alone()  # what is left goes into slots at once, before the next layer attends
        super().__init__(core)
        self.slots: SlotStore | None = None
        self._step: Tensor | None = None
        self._before = (0, 0)

    @property
    def core(self) -> KVLayer:
        """The layer; what a decode step counts in tensors is read off first."""
        slots = self._active()
        if slots is not None:
            self._read_off(slots)
        return self._core

    @core.setter
    def core(self, core: KVLayer) -> None:
        self._core = core

    @property
    def layer_idx(self) -> int:
        return self._core.layer_idx

    @property
    def wants_hidden(self) -> bool:
        return self._core.policy.scorer.wants_hidden

    def _active(self) -> SlotStore | None:
        """The slots, if they hold the tokens."""
        slots = self.slots
        return slots if slots is not None and self._core.store is slots else None

    # ---- between a `KVLayer` and the slots

    def _enter(self) -> None:
        """Move what the layer holds into the slots."""
        core, budget = self._core, cast(Tokens, self._core.policy.budget).n
        if core.padded and not torch.equal(core.pads, core.first.cpu()):
            raise UnsupportedOperationError(
                "a cache of fixed capacity needs padding on the left only; use SieveCache for this batch"
            )
        state = dict(core.state)
        remembered = core.policy.scorer.remembers
        if remembered and QUERIES in state:  # as many as there will be, so that their number does not change
            missing = remembered - state[QUERIES].shape[2]
            state[QUERIES] = nn.functional.pad(state[QUERIES], (0, 0, max(missing, 0), 0))
        slots = self.slots
        if slots is None or not slots.fits(core.store, state):
            slots = self.slots = SlotStore(core.store, budget + 1, state)
        slots.fill(core.store, state, core.seen, core.first)
        self._before = (core.evictions, core.evicted_at)
        core.store, core.state = slots, dict(slots.state)

    def leave(self) -> None:
        """Move what the slots hold back into storage that can take any number of tokens; the next forward pass returns
        it, and must not be compiled."""
        slots = self._active()
        if slots is not None:
            self._read_off(slots)
            self._core.store = slots.packed()
            self._core.state = {name: tensor.clone() for name, tensor in slots.state.items()}

    def _read_off(self, slots: SlotStore) -> None:
        """Bring the counters of the layer up to date.

        Raises:
            ScoreError: a score was NaN in a compiled step.
        """
        core = self._core
        if bool(slots.failed):
            raise ScoreError(
                f"layer {core.layer_idx}: scores were NaN in a compiled decode step; the model's keys, values or "
                "hidden states are probably not finite. reset() the cache"
            )
        seen = int(slots.length)
        core.seen = core.next_place = seen
        evictions = max(0, slots.most + seen - slots.filled_at - (slots.capacity - 1))
        core.evictions = self._before[0] + evictions
        core.evicted_at = seen if evictions else self._before[1]

    # ---- what the model calls

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[B, Hkv, T, D]`: one token into its slot, several as `SieveLayer` does."""
        slots = self._active()
        if slots is None or key_states.shape[2] != 1 or self.record_past:
            return self._take_outside_of_graphs(key_states, value_states, *args, **kwargs)
        if self._awaiting:
            raise UnsupportedModelError(
                f"layer {self._core.layer_idx} received a new token, but the attention over the last one never came "
                "by. If that forward pass was interrupted, reset() the cache"
            )
        if key_states.shape[0] != slots.batch:
            raise UnsupportedOperationError(
                f"the cache holds {slots.batch} sequences, the new tokens have {key_states.shape[0]}; reset() or use a "
                "new cache"
            )
        slots.put(key_states, value_states)
        self._step, self._awaiting = key_states, True
        keys, values = slots.columns[KEY][:], slots.columns[VALUE][:]
        hf.tag(keys, values, self)
        return keys, values

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Exact attention over what is held, `[B, T, H, Dv]`; then statistics and eviction."""
        slots, keys = self.slots, self._step
        if slots is None or keys is None:
            return self._attend_outside_of_graphs(
                module, query, key, value, mask, dropout, scaling, softcap=softcap, s_aux=s_aux, **kwargs
            )
        if not torch.compiler.is_compiling():  # what cannot be seen in a graph, the prompt has shown
            self._check_call(module, value, dropout, kwargs)
        if mask is not None:
            raise UnsupportedOperationError(
                "a cache of fixed capacity cannot apply a mask to a single token: it sees everything that is held"
            )
        if hf.implementation_before(module) == "sdpa":  # the stock kernel leaves these out
            softcap = s_aux = None
        core, scorer = self._core, self._core.policy.scorer
        how: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
        live, reduce = slots.live, scorer.collects
        out, mass = attend_slots(query, slots.columns[KEY], slots.columns[VALUE], live, reduce, **how)
        view = SlotView(core, slots, keys, query, self.hidden, None if mass is None else (reduce, mass), **how)
        scorer.observe(view)
        scores = scorer.score(view)
        if torch.compiler.is_compiling():
            scores = scores if scores.dtype == torch.float64 else scores.float()
            slots.failed.logical_or_((scores.isnan() & live).any())
        else:
            scores = check_scores(scores, view.positions, live)
        # an empty slot comes first: its position is below all others
        victims = lowest_slot(scores.masked_fill(~live, -torch.inf), view.positions, view.protected)
        slots.keep_state(view.state)
        slots.free(victims)
        self.hidden = self._step = None
        self._awaiting = False
        return out.transpose(1, 2).contiguous()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_outside_of_graphs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`update` outside of the slots; no graph goes through here."""
        self.leave()
        return super().update(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_outside_of_graphs(self, *args: Any, **kwargs: Any) -> Tensor:
        """`attention` outside of the slots, and into them where nothing is held back."""
        out = super().attention(*args, **kwargs)
        if not self._core.pending:
            self._enter()
        return out

    # ---- what generation calls

    def get_seq_length(self) -> int:
        """Tokens fed so far; while decoding a tensor without dimensions, so that a graph does not depend on it."""
        slots = self._active()
        return self._core.seen if slots is None else cast(int, slots.length.clone())  # the count goes on in place

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for masks that kvsieve does not make. An offset that is a tensor tells kvsieve's that the
        layer needs none."""
        slots = self._active()
        if slots is None or query_length != 1 or self.record_past:
            return super().get_mask_sizes(query_length)
        return slots.capacity, cast(int, slots.length + 1 - slots.capacity)

    def reset(self) -> None:
        """Forget the sequence; the slots stay where they are, so that what was compiled for them can go on."""
        self._core.reset()
        self._step = None
        super().reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticSieveLayer:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._core, twin.hidden = copy.deepcopy(self._core, memo), None
        store = twin._core.store
        twin.slots = store if isinstance(store, SlotStore) else None
        return twin
