"""Storage for heads of different length: each has a segment of its own in one flat buffer, and holds exactly what it
keeps.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens of the longest head, `T` new tokens, `total` slots of the
flat buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .ledger import KEY, POSITION, VALUE, spec_of
from .store import MIN_SPARE, Columns, DenseStore, NewColumns, Store, fresh, move, put, spare

__all__ = ["RaggedStore", "look_up"]

Integers = npt.NDArray[np.int64]


class RaggedStore(Store):
    """Every head has its own segment `[offset, offset + length)` of a flat buffer, with spare room behind it."""

    ordered = False

    def __init__(self, batch: int, heads: int, columns: Columns, lengths: Tensor) -> None:
        """`columns`: `[total, ...]` packed head after head; `lengths`: `[B, Hkv]` tokens per head."""
        self.batch, self.heads = batch, heads
        self.columns = columns
        self._lengths: Integers = lengths.reshape(-1).cpu().numpy().astype(np.int64)
        self._capacities: Integers = self._lengths
        self._offsets: Integers = self._lengths.cumsum() - self._lengths
        self._room = 0  # so many tokens fit into every head, and perhaps more
        self.new = 0
        self._gaps: Integers | None = None  # flat slot among the first length + 1 of every head, -1 where there is none
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_dense(cls, dense: DenseStore, mask: Tensor) -> RaggedStore:
        """Pack what `mask` `[B, Hkv, N]` keeps of a dense store, in order of position."""
        rows = mask.flatten(0, 1)
        if dense.ordered:
            head, slot = rows.nonzero(as_tuple=True)
        else:
            order = dense.read(POSITION).flatten(0, 1).argsort(-1)
            head, rank = rows.gather(1, order).nonzero(as_tuple=True)
            slot = order[head, rank]
        where = head * dense.capacity + slot
        columns = {name: buffer.flatten(0, 2).index_select(0, where) for name, buffer in dense.columns.items()}
        return cls(dense.batch, dense.heads, columns, mask.sum(-1))

    @property
    def lengths(self) -> Tensor:
        return torch.from_numpy(self._lengths.copy()).view(self.batch, self.heads)

    @property
    def longest(self) -> int:
        return int(self._lengths.max())

    @property
    def tokens(self) -> int:
        return int(self._lengths.sum())

    def segments(self) -> list[tuple[int, int]]:
        """`(start, end)` of every head's live tokens in the flat buffer, batch-major."""
        self.settle()
        return list(zip(self._offsets.tolist(), (self._offsets + self._lengths).tolist(), strict=True))

    def _padded(self) -> tuple[Tensor, Tensor]:
        """`[B, Hkv, N]` flat index of every slot (dead slots point at the head's start), and the live mask."""
        if self._table is None:
            step = np.arange(self.longest)
            live = step < self._lengths[:, None]
            index = (self._offsets[:, None] + step * live).clip(max=max(self._columns[KEY].shape[0] - 1, 0))
            self._table = self._shaped(index), self._shaped(live)
        return self._table

    def _shaped(self, table: npt.NDArray[np.generic]) -> Tensor:
        """`[B * Hkv, ...]` on the CPU -> `[B, Hkv, -1]` where the tokens are."""
        return torch.from_numpy(table).view(self.batch, self.heads, -1).to(self.device)

    @property
    def live(self) -> Tensor:
        return self._padded()[1]

    def read(self, name: str) -> Tensor:
        out = self.padded(self.columns[name])
        return out if name in (KEY, VALUE) else out.masked_fill_(~self.live, spec_of(name).fill)

    def padded(self, values: Tensor) -> Tensor:
        """`[total, ...]` -> `[B, Hkv, N, ...]`; anything may stand behind the last token of a head."""
        return values[self._padded()[0]]

    def spans(self) -> tuple[Tensor, Tensor]:
        """`[B, Hkv]` where every head's tokens begin in the flat buffer, and how many they are."""
        return self._shaped(self._offsets)[..., 0], self._shaped(self._lengths)[..., 0]

    def flat(self, values: Tensor) -> Tensor:
        """`[B, Hkv, N]` -> `[total]`: laid out as the columns are, zero where no token lies."""
        index, live = self._padded()
        flat = values.new_zeros(self.columns[KEY].shape[0])
        flat[index[live]] = values[live]
        return flat

    def append(self, new: NewColumns, count: int, limit: int | None = None) -> None:
        for name in new:
            self.ensure(name)
        if count > 1:
            self.settle()
        need = self._lengths + count
        self._room -= count
        if self._room < 0:
            if (need > self._capacities).any():
                roomy = need + max(spare(int(need.sum())) // need.size, MIN_SPARE // 2)
                self._relayout(roomy if limit is None else np.maximum(need, roomy.clip(max=limit)))
            self._room = int((self._capacities - need).min())
        where = self._offsets + self._lengths
        if self._gaps is not None:
            where = np.where(self._gaps >= 0, self._gaps, where)
        if count > 1:
            where = (where[:, None] + np.arange(count)).ravel()
        newest = torch.from_numpy(where).to(self.device)
        for name, buffer in self._columns.items():
            put(buffer, newest, new.get(name, spec_of(name).fill))
        self._gaps, self._newest = None, newest
        self._lengths, self.new, self._table = need, count, None

    def write_new(self, name: str, values: Tensor) -> None:
        self._check_new(values)
        self.ensure(name)
        buffer, where = self.columns[name], self._newest
        if where is None:  # others were taken back since
            end = (self._offsets + self._lengths)[:, None]
            where = self._shaped(end + np.arange(-self.new, 0)).flatten()
        put(buffer, where, values)

    def add(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        index, live = self._padded()
        self.columns[name][index[live]] += values[live]

    def _relayout(self, capacities: Integers) -> None:
        """Move every segment into a buffer where it has this capacity."""
        self.settle()
        index, live = self._padded()
        offsets = capacities.cumsum() - capacities
        target = self._shaped(offsets[:, None] + np.arange(index.shape[-1]))
        for name, old in self.columns.items():
            buffer = fresh(old, (int(capacities.sum()),), name)
            buffer[target[live]] = old[index[live]]
            self.columns[name] = buffer
        self._offsets, self._capacities, self._table, self._room = offsets, capacities, None, -1

    def keep(self, mask: Tensor, uniform: bool = False, room: int | None = None) -> Store:
        counts = mask.sum(-1).flatten().cpu().numpy()
        drops = self._lengths - counts
        if uniform and counts.min() == counts.max():
            return self._gather(mask, counts)
        if drops.max() == 0:
            return self
        if drops.max() == 1 and counts.min() > 0 and not self._wasteful(counts):
            slots = (mask | ~self.live).to(torch.uint8).argmin(-1)
            self.drop(slots.masked_fill(self._shaped(drops == 0)[..., 0], -1))
            return self
        return self._gather(mask, counts)

    def _wasteful(self, counts: Integers) -> bool:
        """Whether the buffer would be mostly spare room after dropping to `counts`."""
        total = int(counts.sum())
        return int(self._capacities.sum()) > total + 2 * max(spare(total), 8 * counts.size)

    def drop(self, victims: Tensor, room: int | None = None) -> None:
        self.settle()
        slots = victims.flatten().cpu().numpy()
        self._gaps = np.where(slots >= 0, self._offsets + slots, -1)
        self._lengths = self._lengths - (slots >= 0)
        self.new, self._newest, self._table = 0, None, None
        if self._wasteful(self._lengths):
            self.pack()

    def settle(self) -> None:
        if self._gaps is None:
            return
        heads = (self._gaps >= 0).nonzero()[0]
        into = torch.from_numpy(self._gaps[heads]).to(self.device)
        last = torch.from_numpy((self._offsets + self._lengths)[heads]).to(self.device)
        for buffer in self._columns.values():
            move(buffer, last, into)
        put(self._columns[POSITION], last, spec_of(POSITION).fill)  # or `find` would find it twice
        self._gaps = None

    def find(self, position: int) -> Tensor | None:
        hits = _places(self.columns[POSITION], position)
        whole = hits.size == self._lengths.size  # a head holds a position once
        return self._shaped(hits - self._offsets)[..., 0] if whole else None

    def entries(self, name: str, where: Integers) -> npt.NDArray[Any]:
        """Entries of column `name` at flat slots."""
        column = self._columns[name].detach()
        if column.device.type == "cpu":
            return column.numpy()[where]
        return column[torch.from_numpy(where).to(column.device)].cpu().numpy()

    def at(self, name: str, slots: Tensor) -> Tensor:
        return self.columns[name][slots + self._shaped(self._offsets)[..., 0]]

    def pack(self) -> None:
        self._relayout(self._lengths)
        self.new, self._newest = 0, None

    def _gather(self, mask: Tensor, counts: Integers) -> Store:
        """Pack what stays; back to the dense layout when all heads are equally long again."""
        index, _ = self._padded()
        position = self.read(POSITION).masked_fill(~mask, torch.iinfo(torch.int32).max)
        order = position.argsort(-1)
        where = index.gather(-1, order)[mask.gather(-1, order)]
        columns = {name: buffer[where] for name, buffer in self.columns.items()}
        n = int(counts.max())
        if n == 0 or int(counts.min()) != n:
            return RaggedStore(self.batch, self.heads, columns, torch.from_numpy(counts))
        dense = DenseStore(self.batch, self.heads)
        dense.columns = {k: v.view(self.batch, self.heads, n, *v.shape[1:]) for k, v in columns.items()}
        dense.n = n
        return dense

    def map_rows(self, rows: Tensor) -> Store:
        rows = rows.to(self.device)
        index, live = self._padded()
        keep = live[rows]
        columns = {name: buffer[index[rows][keep]] for name, buffer in self.columns.items()}
        return RaggedStore(rows.numel(), self.heads, columns, self.lengths[rows.cpu()])


def _places(values: Tensor, wanted: int) -> Integers:
    """Indices of `values` `[total]` that equal `wanted`."""
    if values.device.type == "cpu":  # where it takes a tenth of the time
        return np.flatnonzero(values.numpy() == wanted)
    return (values == wanted).nonzero()[:, 0].cpu().numpy()


def look_up(stores: Sequence[Store], position: int, name: str) -> tuple[Integers, npt.NDArray[Any]] | None:
    """Where the token lies that came at `position`, and what column `name` holds of it, in stores of equally many rows
    and heads: `[stores, B, Hkv]` slots and entries. Ragged stores are searched all at once, others one at a time.

    Returns `None` where a head does not hold the token, and for several stores that are not all ragged.
    """
    shape = len(stores), stores[0].batch, stores[0].heads
    ragged = [store for store in stores if isinstance(store, RaggedStore)]
    if len(ragged) < len(stores):
        slots = stores[0].find(position) if len(stores) == 1 else None
        if slots is None:
            return None
        return slots.cpu().numpy().reshape(shape), stores[0].at(name, slots).detach().cpu().numpy().reshape(shape)
    columns = [store.columns[POSITION] for store in ragged]
    hits = _places(torch.cat(columns), position)
    if hits.size != math.prod(shape):  # a head holds a position once
        return None
    ends = np.cumsum([len(column) for column in columns])
    where = hits.reshape(len(stores), -1)
    where[1:] -= ends[:-1, None]
    entries = [store.entries(name, flat) for store, flat in zip(ragged, where, strict=True)]
    offsets = np.stack([store._offsets for store in ragged])
    return (where - offsets).reshape(shape), np.stack(entries).reshape(shape)
