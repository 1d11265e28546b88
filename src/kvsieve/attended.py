"""What one layer holds, as attention sees it: masks, padding, keys where gaps are closed, attention received.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` stored tokens, `T` new tokens, `D` head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import placement, ragged_attention
from .attention import ByPosition, Visible, attend, attend_and_count, attention_mass, needs_gradient
from .errors import UnsupportedOperationError
from .ledger import KEY, KIND, POSITION, VALUE, Kind
from .policy import Policy
from .ragged import RaggedStore
from .rope import Rotary
from .store import DenseStore, Store
from .view import LayerView, Visibility

__all__ = ["AttendedLayer", "per_head"]


class AttendedLayer:
    """The storage of one layer and the attention over it; `KVLayer` adds what comes in and what leaves.

    Attributes:
        store: what is held.
        seen: tokens fed so far, padding counted.
        pads: `[B]` how many of them are padding, on the CPU.
        first: `[B]` column of the first real token of every row.
        has_pads, padded: whether padding is held, and whether there ever was any.
        evictions: how often tokens have left.
        next_place: position of the next token, where gaps are closed.
        scale, softcap, sinks: of the model's attention, as in `attention.attend`; set by the host.
    """

    def __init__(self, policy: Policy, positions: str, rope: Rotary | None, window: int | None) -> None:
        self.policy, self.positions, self.rope, self.window = policy, positions, rope, window
        self.scale: float | None = None
        self.softcap: float | None = None
        self.sinks: Tensor | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.store: Store = DenseStore(0, 0)
        self.seen = self.next_place = self.evictions = 0
        self.pads = torch.zeros(0, dtype=torch.long)
        self._pad_columns: Tensor | None = None
        self.first = torch.zeros(0, dtype=torch.long)
        self.has_pads = self.padded = False
        self.new_kind: Tensor | None = None
        self._collected: tuple[str, Tensor] | None = None

    @property
    def real_seen(self) -> list[int]:
        """Tokens that every row was fed, padding not counted."""
        return [self.seen - pads for pads in self.pads.tolist()]

    @property
    def plain(self) -> bool:
        """Whether every slot of every head holds a real token that may stay and no row began with padding."""
        return self.unpadded and isinstance(self.store, DenseStore)

    @property
    def unpadded(self) -> bool:
        """Whether no row began with padding and segments do not age."""
        return not self.padded and self.window is None

    def attend(self, queries: Tensor, visibility: Visibility) -> Tensor:
        """Attention of `queries` `[B, H, T, D]` over everything held, `[B, H, T, Dv]`."""
        self.mark_padding(visibility)
        return self.attend_visible(queries, *self.visible(visibility))

    def counting(self, visible: Visible | None, *tensors: Tensor) -> str:
        """How the scorer wants attention counted on the way (`Scorer.collects`); empty where that is not asked for, or
        not to be had. `tensors`: queries, keys and values."""
        able = visible is None and self.policy.evicts and not needs_gradient(*tensors)
        return self.policy.scorer.collects if able else ""

    def attend_visible(self, queries: Tensor, offset: int | None, visible: Visible | None) -> Tensor:
        """`attend`, from what `visible` has said."""
        keys, ragged = self.attended_keys(), not isinstance(self.store, DenseStore)
        values = self.store.columns[VALUE] if ragged else self.store.read(VALUE)
        reduce = self.counting(visible, queries, keys, values)
        if isinstance(self.store, DenseStore):
            if reduce:
                out, mass = attend_and_count(
                    queries, keys, values, reduce, causal_offset=offset,
                    scale=self.scale, softcap=self.softcap, sinks=self.sinks,
                )  # fmt: skip
                self._collected = (reduce, mass)
                return out
            return attend(
                queries, keys, values, visible=visible, causal_offset=offset,
                scale=self.scale, softcap=self.softcap, sinks=self.sinks,
            )  # fmt: skip
        assert isinstance(self.store, RaggedStore)
        out, collected = ragged_attention.attend(
            self.store, queries, keys, values, reduce, visible=visible,
            scale=self.scale, softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip
        self._collected = None if collected is None else (reduce, collected)
        return out

    def mark_padding(self, visibility: Visibility) -> None:
        """Write into the ledger which of the new tokens are padding, once per forward pass."""
        padding = visibility.padding
        if padding is None or visibility.start + visibility.count != self.seen:
            return
        real = visibility.real_queries()
        if real is None or bool(real.all()):
            return
        self.has_pads = self.padded = True
        b, h = self.store.batch, self.store.heads
        kind = self.new_kind if self.new_kind is not None else torch.tensor(int(Kind.TEXT), dtype=torch.uint8)
        kind = torch.where(real.to(kind.device), kind, int(Kind.PAD)).to(torch.uint8)
        self.store.write_new(KIND, per_head(kind, b, h, visibility.count))
        ahead = padding[:, : self.seen]
        self.pads, self._pad_columns = self.seen - ahead.sum(-1).cpu(), ~ahead
        self.first = torch.where(ahead.any(-1), ahead.to(torch.uint8).argmax(-1), self.seen).to(self.first.device)
        if self.positions == "slot" and bool(
            (~padding[:, : self.seen]).sum(-1).to(self.first.device).ne(self.first).any()
        ):
            raise UnsupportedOperationError('positions="slot" needs padding on the left only')

    def visible(self, visibility: Visibility) -> tuple[int | None, Visible | None]:
        """`(causal_offset, visible)` for the attention functions: at most one of them is set, none means that
        every query sees every key. Older queries than the new ones may have lost keys between them, so only the
        new ones can count on a triangle."""
        if visibility.everything and not self.has_pads and isinstance(self.store, DenseStore):
            return None, None
        plain = visibility.function is None and not visibility.everything and not self.has_pads
        if plain and visibility.count == 1:
            return None, None
        if plain and self.store.ordered and visibility.count <= self.store.new:
            return self.store.longest - visibility.count, None
        positions = self.store.read(POSITION)
        if plain:
            return None, ByPosition(
                visibility.start, positions, None if isinstance(self.store, DenseStore) else self.store.live
            )
        live = self.store.live
        if self.has_pads:
            live = live & (self.store.read(KIND) != Kind.PAD)
        return None, lambda s, e: visibility.mask(positions, live, s, e)

    def attended_keys(self) -> Tensor:
        """Keys as attention sees them: `[B, Hkv, N, D]` of a dense store, `[total, D]` of a ragged one."""
        if self.positions == "slot" and self.rope is not None and self.evictions:
            return placement.towards_newest(self.store, self.rope, self.next_place - 1)
        return self.store.read(KEY) if isinstance(self.store, DenseStore) else self.store.columns[KEY]

    def attention_mass(self, view: LayerView, queries: Tensor, weights: Tensor | None, reduce: str) -> Tensor:
        """See `LayerView.attention_mass`."""
        t = queries.shape[2]
        visibility = replace(view._visibility, start=view.seen - t, count=t)
        real = visibility.real_queries()
        if real is not None and not bool(real.all()):
            real = real[:, None].to(queries.device, queries.dtype)
            weights = real if weights is None else weights * real
        offset, visible = self.visible(visibility)
        keys = self.attended_keys()
        if isinstance(self.store, DenseStore):
            return attention_mass(
                queries, keys, weights, reduce, visible=visible, causal_offset=offset,
                scale=self.scale, softcap=self.softcap, sinks=self.sinks,
            )  # fmt: skip
        assert isinstance(self.store, RaggedStore)
        return ragged_attention.attention_mass(
            self.store, queries, keys, weights, reduce, visible=visible,
            scale=self.scale, softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip


def per_head(values: Tensor, b: int, h: int, t: int) -> Tensor:
    """`[T]` or `[B, T]` -> `[B, Hkv, T]`."""
    return (values[None] if values.dim() == 1 else values)[:, None].expand(b, h, t)
