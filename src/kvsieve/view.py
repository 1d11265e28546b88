"""What a scorer sees: one layer of one cache, right after the attention of a forward pass.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` stored tokens (of the longest head), `T` new tokens,
`D` head dim. Slots are in no particular order; `positions` says which token lies where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import PolicyError
from .ledger import KEY, KIND, POSITION, SEGMENT, VALUE, Kind

if TYPE_CHECKING:
    from .layer import KVLayer
    from .rope import Rotary

__all__ = ["LayerView", "Visibility"]

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_ROWS = 64
"""Queries whose mask is formed at once."""


@dataclass
class Visibility:
    """Which keys the new queries may see: a description, evaluated by every layer on its own positions.

    Attributes:
        start: column index of the first new query.
        count: number of new queries `T`.
        padding: `[B, columns]` bool, true for real tokens; `None` when there is no padding.
        function: `f(batch, head, query column, key column) -> bool` on broadcast index tensors; `None` is causal.
        everything: every query sees every key, the new ones included; then `function` plays no part.
    """

    start: int
    count: int
    padding: Tensor | None = None
    function: MaskFunction | None = None
    everything: bool = False

    def mask(self, positions: Tensor, live: Tensor, start: int, end: int) -> Tensor:
        """`[B, Hkv, end - start, N]` bool for query rows `start:end` over keys at `positions` `[B, Hkv, N]`."""
        device = positions.device
        q = torch.arange(self.start + start, self.start + end, device=device)[None, None, :, None]
        kv = positions.long().clamp_min(0)[:, :, None, :]
        if self.everything:
            seen = torch.ones_like(kv, dtype=torch.bool).expand(-1, -1, end - start, -1)
        elif self.function is None:
            seen = kv <= q
        else:
            b = torch.arange(positions.shape[0], device=device)[:, None, None, None]
            h = torch.arange(positions.shape[1], device=device)[None, :, None, None]
            seen = self.function(b, h, q, kv)
        return seen & live[:, :, None, :]

    def real_queries(self) -> Tensor | None:
        """`[B, T]` bool: queries that are not padding; `None` when all are real."""
        if self.padding is None:
            return None
        return self.padding[:, self.start : self.start + self.count]


class LayerView:
    """One layer after one forward pass. Scorers read it; `write_new`, `add` and `state` are theirs to change.

    Attributes:
        layer_idx: index of the layer among the model's layers.
        rank: index of the layer among the `n_layers` managed ones, from 0.
        n_layers: how many layers the policy manages.
        seen: columns fed to the layer so far, padding and the new tokens included.
        new: how many of them are new, `T`.
        first: `[B]` column of the first real token of every row (0 without padding).
        segment: the latest segment (frame, turn, chunk) that came in; 0 where the host names none.
        state: tensors (batch first) that a scorer keeps between forward passes of this sequence.
    """

    def __init__(
        self,
        layer: KVLayer,
        queries: Tensor | None,
        visibility: Visibility,
        hidden: Tensor | None = None,
        collected: tuple[str, Tensor] | None = None,
    ) -> None:
        self._layer, self._store = layer, layer.store
        self._queries, self._visibility, self._hidden = queries, visibility, hidden
        self._collected = collected
        self._counts: Tensor | list[int] | None = None
        self.layer_idx, self.rank, self.n_layers = layer.layer_idx, layer.rank, layer.n_layers
        self.seen, self.new = layer.seen, visibility.count
        self.first = layer.first
        self.segment = layer.segment
        self.state = layer.state

    # ---- what is held

    @property
    def held(self) -> int:
        """Tokens of the longest head."""
        return self._store.longest

    @property
    def plain(self) -> bool:
        """Whether every slot of every head holds a real token and no row began with padding."""
        return self._layer.plain

    @property
    def alike(self) -> bool:
        """Whether all heads of a row hold the same tokens in the same slots."""
        return bool((self.positions == self.positions[:, :1]).all())

    @property
    def unpadded(self) -> bool:
        """Whether no row began with padding and segments do not age; `plain` where heads are equally long besides."""
        return self._layer.unpadded

    @property
    def decided(self) -> int:
        """What `seen` was when the policy last decided on everything that is held."""
        return self._layer.decided_at

    @property
    def real_seen(self) -> list[int]:
        """Real tokens seen by every row, padding not counted."""
        return self._layer.real_seen

    @cached_property
    def positions(self) -> Tensor:
        """`[B, Hkv, N]` int32 column of every held token, -1 where a ragged head is shorter."""
        return self._store.read(POSITION)

    @cached_property
    def real(self) -> Tensor:
        """`[B, Hkv, N]` bool: the slot holds a token that is not padding."""
        live = self._store.live
        return live & (self._store.read(KIND) != Kind.PAD) if self.has(KIND) else live

    @property
    def counts(self) -> Tensor:
        """`[B]` int64 on the CPU: tokens per head that may stay, on average over heads. For `score`, while a decision
        is made; a threshold has no such number."""
        if self._counts is None:
            raise PolicyError(f"{self._layer.policy.name} needs to know how many may stay: name a budget, no threshold")
        if isinstance(self._counts, list):
            self._counts = torch.tensor(self._counts)
        return self._counts

    @counts.setter
    def counts(self, counts: Tensor | list[int]) -> None:
        self._counts = counts

    @cached_property
    def protected(self) -> Tensor:
        """`[B, Hkv, N]` bool: real tokens that the policy never lets go."""
        return self._layer.policy.protect.mask(self)

    @property
    def expires(self) -> bool:
        """Whether the host lets segments go by age, whatever the policy says."""
        return self._layer.window is not None and self.has(SEGMENT)

    @cached_property
    def valid(self) -> Tensor:
        """`[B, Hkv, N]` bool: tokens that may stay: real, and not older than the host's window of segments. The first
        segment and what is protected do not age."""
        window = self._layer.window
        if window is None or not self.expires:
            return self.real
        segment = self.column(SEGMENT)
        young = (segment == 0) | (segment > self.segment - window)
        return self.real & (young | self.protected)

    @cached_property
    def keys(self) -> Tensor:
        """`[B, Hkv, N, D]` keys as they are stored: with the rotation of their original position, or of the place that
        they were given since (`"contiguous"` positions, `SieveCache.rewind`)."""
        return self._store.read(KEY)

    @cached_property
    def values(self) -> Tensor:
        """`[B, Hkv, N, Dv]` values."""
        return self._store.read(VALUE)

    @property
    def exact_fit(self) -> bool:
        """Whether storage needs no spare room under this policy."""
        return self._layer.policy.exact_fit or self._layer.fitted

    @property
    def even(self) -> bool:
        """Whether every layer may hold equally much under this policy."""
        return self._layer.policy.share.even

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one head."""
        return self._store.bytes_per_token

    @property
    def room(self) -> int:
        """Tokens that a byte budget sets aside for the next forward pass."""
        return self._layer.room

    @property
    def new_keys(self) -> Tensor:
        """`[B, Hkv, T, D]` keys of the new tokens."""
        return self._layer.new_keys

    @property
    def new_positions(self) -> Tensor:
        """`[T]` int64 columns of the new tokens."""
        return torch.arange(self.seen - self.new, self.seen, device=self.keys_device)

    @property
    def keys_device(self) -> torch.device:
        """Where the layer lives."""
        return self._store.device

    # ---- what came in

    @property
    def queries(self) -> Tensor:
        """`[B, H, T, D]` rotated queries of the new tokens."""
        if self._queries is None:
            raise RuntimeError("this host does not hand queries to scorers")
        return self._queries

    @property
    def hidden(self) -> Tensor:
        """`[B, T, hidden]` input of the attention block for the new tokens. Set `wants_hidden` to get it."""
        if self._hidden is None:
            raise RuntimeError("the scorer reads hidden states but does not say so (`wants_hidden = True`)")
        return self._hidden

    @property
    def real_queries(self) -> Tensor | None:
        """`[B, T]` bool: new tokens that are not padding; `None` when all are real."""
        return self._visibility.real_queries()

    @property
    def rope(self) -> Rotary:
        """The model's rotary embedding. Set `wants_rope` to get it."""
        if self._layer.rope is None:
            raise RuntimeError("the scorer needs rotary positions but does not say so (`wants_rope = True`)")
        return self._layer.rope

    # ---- statistics

    def has(self, name: str) -> bool:
        """Whether the ledger has a column of this name."""
        return self._store.has(name)

    def column(self, name: str) -> Tensor:
        """`[B, Hkv, N]` a column of the ledger; zeros if nobody has written it."""
        self._store.ensure(name)
        return self._store.read(name)

    def write_new(self, name: str, values: Tensor) -> None:
        """Write `[B, Hkv, T]` into column `name` for the new tokens."""
        self._store.write_new(name, values)

    def add(self, name: str, values: Tensor) -> None:
        """Add `[B, Hkv, N]` to column `name`."""
        self._store.add(name, values)

    def attention_mass(
        self, queries: Tensor | None = None, weights: Tensor | None = None, reduce: str = "sum"
    ) -> Tensor:
        """Attention that every held key receives, `[B, Hkv, N]` float32.

        Args:
            queries: `[B, H, t, D]` the last `t` queries of the sequence; the new ones by default.
            weights: `[B|1, H|1, t]` per-query weights. Padding queries always weigh zero.
            reduce: `"sum"`, `"max"` or `"square"` over queries and over the heads of a group.
        """
        if queries is not None or weights is not None:
            return self._layer.attention_mass(self, self.queries if queries is None else queries, weights, reduce)
        if self._collected is None or self._collected[0] != reduce:
            self._collected = reduce, self._layer.attention_mass(self, self.queries, None, reduce)
        return self._collected[1]  # where a layer attends itself, it may have counted this as it was computed

    def exposure(self) -> Tensor:
        """`[B, Hkv, N]` float32: how many of the new, real queries could see every held token."""
        real, visibility = self.real_queries, self._visibility
        b, device = self.positions.shape[0], self.positions.device
        ones = torch.ones(b, self.new, device=device) if real is None else real.to(device, torch.float32)
        if visibility.everything:
            return ones.sum(1)[:, None, None].expand(self.positions.shape)
        if visibility.function is not None:
            total = torch.zeros(self.positions.shape, device=device)
            for s in range(0, self.new, _ROWS):
                seen = visibility.mask(self.positions, self._store.live, s, min(s + _ROWS, self.new))
                total += (seen * ones[:, None, s : s + _ROWS, None]).sum(2)
            return total
        behind = ones.flip(1).cumsum(1).flip(1)  # queries at or after every new column
        age = (self.positions.long() - (self.seen - self.new)).clamp_min(0)
        return behind[:, None].expand(-1, age.shape[1], -1).gather(2, age)

    def remember_queries(self, count: int) -> Tensor:
        """Keep the last `count` queries in `state` and return them, `[B, H, <= count, D]`."""
        queries, older = self.queries, self.state.get("queries")
        missing = count - queries.shape[2]
        if missing > 0 and older is not None:
            latest = torch.cat([older[:, :, max(0, older.shape[2] - missing) :], queries], dim=2)
        else:
            latest = queries[:, :, -count:].clone()
        self.state["queries"] = latest
        return latest

    def by_position(self, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `function` to `values` `[B, Hkv, N]` laid out in order of position (empty slots last)."""
        order = self.positions.masked_fill(~self.valid, torch.iinfo(torch.int32).max).argsort(-1)
        return torch.empty_like(values).scatter_(-1, order, function(values.gather(-1, order)))
