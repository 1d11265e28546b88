"""Storage for heads of different length: each has a segment of its own in one flat buffer, and holds exactly what it
keeps.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens of the longest head, `T` new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ledger import KEY, VALUE, spec_of
from .store import MIN_SPARE, Columns, DenseStore, Store, fresh, spare

__all__ = ["RaggedStore"]


class RaggedStore(Store):
    """Every head has its own segment `[offset, offset + length)` of a flat buffer, with spare room behind it."""

    ordered = False

    def __init__(self, batch: int, heads: int, columns: Columns, lengths: Tensor) -> None:
        """`columns`: `[total, ...]` packed head after head; `lengths`: `[B, Hkv]` tokens per head."""
        self.batch, self.heads = batch, heads
        self.columns = columns
        self._lengths = lengths.reshape(-1).cpu()
        self._capacities = self._lengths.clone()
        self._offsets = self._lengths.cumsum(0) - self._lengths
        self.new = 0
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_dense(cls, dense: DenseStore, mask: Tensor) -> RaggedStore:
        """Pack what `mask` `[B, Hkv, N]` keeps of a dense store, in order of position."""
        rows = mask.flatten(0, 1)
        if dense.ordered:
            where = rows.nonzero(as_tuple=True)
        else:
            order = dense.read("position").flatten(0, 1).argsort(-1)
            head, rank = rows.gather(1, order).nonzero(as_tuple=True)
            where = head, order[head, rank]
        columns = {name: buffer.flatten(0, 1)[where] for name, buffer in dense.columns.items()}
        return cls(dense.batch, dense.heads, columns, mask.sum(-1))

    @property
    def lengths(self) -> Tensor:
        return self._lengths.view(self.batch, self.heads)

    @property
    def longest(self) -> int:
        return int(self._lengths.max())

    @property
    def tokens(self) -> int:
        return int(self._lengths.sum())

    def segments(self) -> list[tuple[int, int]]:
        """`(start, end)` of every head's live tokens in the flat buffer, batch-major."""
        ends = self._offsets + self._lengths
        return list(zip(self._offsets.tolist(), ends.tolist(), strict=True))

    def _padded(self) -> tuple[Tensor, Tensor]:
        """`[B, Hkv, N]` flat index of every slot (dead slots point at the head's start), and the live mask."""
        if self._table is None:
            device = self.columns[KEY].device
            step = torch.arange(self.longest)
            live = step < self._lengths[:, None]
            index = self._offsets[:, None] + step * live
            index.clamp_(max=max(self.columns[KEY].shape[0] - 1, 0))
            shape = (self.batch, self.heads, -1)
            self._table = index.view(shape).to(device), live.view(shape).to(device)
        return self._table

    @property
    def live(self) -> Tensor:
        return self._padded()[1]

    def read(self, name: str) -> Tensor:
        index, live = self._padded()
        buffer = self.columns[name]
        out = buffer[index]
        if name in (KEY, VALUE):
            return out
        return out.masked_fill_(~live, spec_of(name).fill)

    def flat(self, values: Tensor) -> Tensor:
        """`[B, Hkv, N]` -> `[total]`: laid out as the columns are, zero where no token lies."""
        index, live = self._padded()
        flat = values.new_zeros(self.columns[KEY].shape[0])
        flat[index[live]] = values[live]
        return flat

    def _new_index(self) -> Tensor:
        """`[B, Hkv, T]` flat index of the tokens appended last."""
        first = (self._offsets + self._lengths - self.new).view(self.batch, self.heads, 1)
        return (first + torch.arange(self.new)).to(self.columns[KEY].device)

    def append(self, new: Columns, limit: int | None = None) -> None:
        t = new[KEY].shape[2]
        for name in new:
            self.ensure(name)
        if bool((self._lengths + t > self._capacities).any()):
            total = int(self._lengths.sum()) + t * self._lengths.numel()
            need = self._lengths + t
            roomy = need + max(spare(total) // need.numel(), MIN_SPARE // 2)
            self._relayout(roomy if limit is None else torch.maximum(need, roomy.clamp_max(limit)))
        self._lengths = self._lengths + t
        self.new, self._table = t, None
        where = self._new_index()
        for name, buffer in self.columns.items():
            if name in new:
                buffer[where] = new[name].to(buffer.dtype)
            else:
                buffer[where] = spec_of(name).fill

    def write_new(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        self.columns[name][self._new_index()] = values.to(self.columns[name].dtype)

    def add(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        index, live = self._padded()
        self.columns[name][index[live]] += values[live]

    def _relayout(self, capacities: Tensor) -> None:
        """Move every segment into a buffer where it has this capacity."""
        index, live = self._padded()
        offsets = capacities.cumsum(0) - capacities
        step = torch.arange(index.shape[-1])
        target = (offsets[:, None] + step).view(index.shape).to(index.device)
        for name, old in self.columns.items():
            buffer = fresh(old, (int(capacities.sum()),), name)
            buffer[target[live]] = old[index[live]]
            self.columns[name] = buffer
        self._offsets, self._capacities, self._table = offsets, capacities, None

    def keep(self, mask: Tensor, uniform: bool = False, room: int | None = None) -> Store:
        counts = mask.sum(-1).reshape(-1).cpu()
        drops = self._lengths - counts
        if uniform and int(counts.min()) == int(counts.max()):
            return self._gather(mask, counts)
        if int(drops.max()) == 0:
            return self
        if int(drops.max()) == 1 and int(counts.min()) > 0 and not self._wasteful(counts):
            self._drop_one(mask, drops)
            return self
        return self._gather(mask, counts)

    def _wasteful(self, counts: Tensor) -> bool:
        """Whether the buffer would be mostly spare room after dropping to `counts`."""
        total = int(counts.sum())
        return int(self._capacities.sum()) > total + 2 * max(spare(total), 8 * counts.numel())

    def _drop_one(self, mask: Tensor, drops: Tensor) -> None:
        device = self.columns[KEY].device
        index, live = self._padded()
        losing = drops > 0
        last = (self._offsets + self._lengths - 1)[losing].to(device)
        slot = (mask | ~live).to(torch.uint8).argmin(-1, keepdim=True)
        victim = index.gather(-1, slot).reshape(-1)[losing.to(device)]
        for buffer in self.columns.values():
            buffer[victim] = buffer[last]
        self._lengths = self._lengths - drops
        self.new, self._table = 0, None

    def pack(self) -> None:
        self._relayout(self._lengths.clone())

    def _gather(self, mask: Tensor, counts: Tensor) -> Store:
        """Pack what stays; back to the dense layout when all heads are equally long again."""
        index, _ = self._padded()
        position = self.read("position").masked_fill(~mask, torch.iinfo(torch.int32).max)
        order = position.argsort(-1)
        where = index.gather(-1, order)[mask.gather(-1, order)]
        columns = {name: buffer[where] for name, buffer in self.columns.items()}
        n = int(counts.max())
        if n == 0 or int(counts.min()) != n:
            return RaggedStore(self.batch, self.heads, columns, counts.view(self.batch, self.heads))
        dense = DenseStore(self.batch, self.heads)
        dense.columns = {k: v.view(self.batch, self.heads, n, *v.shape[1:]) for k, v in columns.items()}
        dense.n = n
        return dense

    def map_rows(self, rows: Tensor) -> Store:
        rows = rows.to(self.columns[KEY].device)
        index, live = self._padded()
        keep = live[rows]
        columns = {name: buffer[index[rows][keep]] for name, buffer in self.columns.items()}
        return RaggedStore(rows.numel(), self.heads, columns, self.lengths[rows.cpu()])
