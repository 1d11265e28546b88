"""Storage for heads of different length: each has a segment of its own in one flat buffer, and holds exactly what it
keeps.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens of the longest head, `T` new tokens, `total` slots of the
flat buffer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .ledger import KEY, POSITION, VALUE, spec_of
from .store import MIN_SPARE, Columns, DenseStore, Store, fresh, spare

__all__ = ["RaggedStore"]

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
        self.new = 0
        self._free: Tensor | None = None
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
        return list(zip(self._offsets.tolist(), (self._offsets + self._lengths).tolist(), strict=True))

    def _padded(self) -> tuple[Tensor, Tensor]:
        """`[B, Hkv, N]` flat index of every slot (dead slots point at the head's start), and the live mask."""
        if self._table is None:
            step = np.arange(self.longest)
            live = step < self._lengths[:, None]
            index = (self._offsets[:, None] + step * live).clip(max=max(self.columns[KEY].shape[0] - 1, 0))
            self._table = self._shaped(index), self._shaped(live)
        return self._table

    def _shaped(self, table: npt.NDArray[np.generic]) -> Tensor:
        """`[B * Hkv, ...]` on the CPU -> `[B, Hkv, -1]` where the tokens are."""
        return torch.from_numpy(table).view(self.batch, self.heads, -1).to(self.columns[KEY].device)

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

    def _newest(self, count: int) -> Tensor:
        """`[B * Hkv * count]` flat index of the last tokens of every head."""
        if self._free is None:
            self._free = self._shaped(self._offsets + self._lengths).view(-1)
        if count == 1:
            return self._free - 1
        return (self._free[:, None] + torch.arange(-count, 0, device=self._free.device)).flatten()

    def append(self, new: Columns, limit: int | None = None) -> None:
        t = new[KEY].shape[2]
        for name in new:
            self.ensure(name)
        if (self._lengths + t > self._capacities).any():
            need = self._lengths + t
            roomy = need + max(spare(int(need.sum())) // need.size, MIN_SPARE // 2)
            self._relayout(roomy if limit is None else np.maximum(need, roomy.clip(max=limit)))
        self._lengths = self._lengths + t
        self.new, self._table = t, None
        self._free = None if self._free is None else self._free + t
        where = self._newest(t)
        for name, buffer in self.columns.items():
            if name in new:
                buffer.index_copy_(0, where, new[name].flatten(0, 2).to(buffer.dtype))
            else:
                buffer.index_fill_(0, where, spec_of(name).fill)

    def write_new(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        buffer = self.columns[name]
        buffer.index_copy_(0, self._newest(self.new), values.flatten(0, 2).to(buffer.dtype))

    def add(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        index, live = self._padded()
        self.columns[name][index[live]] += values[live]

    def _relayout(self, capacities: Integers) -> None:
        """Move every segment into a buffer where it has this capacity."""
        index, live = self._padded()
        offsets = capacities.cumsum() - capacities
        target = self._shaped(offsets[:, None] + np.arange(index.shape[-1]))
        for name, old in self.columns.items():
            buffer = fresh(old, (int(capacities.sum()),), name)
            buffer[target[live]] = old[index[live]]
            self.columns[name] = buffer
        self._offsets, self._capacities, self._table, self._free = offsets, capacities, None, None

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
        slots = victims.flatten().cpu().numpy()
        heads = (slots >= 0).nonzero()[0]
        last = (self._offsets + self._lengths)[heads] - 1
        device = self.columns[KEY].device
        gone = torch.from_numpy(self._offsets[heads] + slots[heads]).to(device)
        moved = torch.from_numpy(last).to(device)
        for buffer in self.columns.values():
            buffer.index_copy_(0, gone, buffer.index_select(0, moved))
        self.columns[POSITION].index_fill_(0, moved, spec_of(POSITION).fill)  # or `find` would find it twice
        self._lengths = self._lengths - (slots >= 0)
        self.new, self._table, self._free = 0, None, None
        if self._wasteful(self._lengths):
            self.pack()

    def find(self, position: int) -> Tensor | None:
        hits = (self.columns[POSITION] == position).nonzero()[:, 0].cpu().numpy()
        whole = hits.size == self._lengths.size  # a head holds a position once
        return self._shaped(hits - self._offsets)[..., 0] if whole else None

    def at(self, name: str, slots: Tensor) -> Tensor:
        return self.columns[name][slots + self._shaped(self._offsets)[..., 0]]

    def pack(self) -> None:
        self._relayout(self._lengths)

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
        rows = rows.to(self.columns[KEY].device)
        index, live = self._padded()
        keep = live[rows]
        columns = {name: buffer[index[rows][keep]] for name, buffer in self.columns.items()}
        return RaggedStore(rows.numel(), self.heads, columns, self.lengths[rows.cpu()])
