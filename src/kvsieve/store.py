"""Where the tensors of one layer live: named columns that are appended and kept together.

Two layouts share one interface, `Store`. `DenseStore` holds the same number of tokens in every head,
`[B, Hkv, cap, ...]`; `RaggedStore` (in `ragged.py`) gives every head a segment of its own. Neither copies the cache
when a token is appended or when one token per head is dropped: appending writes into spare capacity, and the slot of a
token that was dropped goes to the next one (attention does not care about order when keys carry their rotation, and
every token carries its position). Who looks before that token comes finds the last one moved there instead.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens of the longest head, `T` new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from .ledger import KEY, POSITION, VALUE, spec_of

__all__ = ["Columns", "DenseStore", "NewColumns", "Store", "fresh", "move", "put", "spare"]

Columns = dict[str, Tensor]
NewColumns = Mapping[str, Tensor | float]
"""`[B, Hkv, T, ...]` of new tokens; a number stands for the same everywhere."""

SPARE_SHARE, MIN_SPARE = 32, 8


def spare(need: int, share: int = SPARE_SHARE) -> int:
    """Capacity beyond `need`: about three per cent, so that copies on growth are rare and bytes stay honest."""
    return max(need // share, MIN_SPARE)


class Store:
    """Common interface; `columns` maps a name to the buffer that holds it."""

    batch: int
    heads: int
    ordered: bool
    """Whether slots are in order of position, so that the new tokens lie at the end."""
    new: int
    """Tokens appended last, until the next `keep` or `drop`."""
    _columns: Columns
    _newest: Tensor | None = None
    """`[B * Hkv * T]` flat slots of the new tokens, where they do not lie at the end of a dense store."""

    @property
    def columns(self) -> Columns:
        """Names to the buffers that hold them; changes to the dictionary count."""
        self.settle()
        return self._columns

    @columns.setter
    def columns(self, columns: Columns) -> None:
        self._columns = columns

    def settle(self) -> None:
        """Close the gaps that `drop` has left for the next token."""

    @property
    def lengths(self) -> Tensor:
        """`[B, Hkv]` int64 on the CPU: tokens held by each head."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """Tokens of the longest head."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Tokens held, summed over batch and heads."""
        raise NotImplementedError

    def has_room(self, count: int) -> bool:
        """Whether `count` tokens are known to fit without a copy."""
        return False

    @property
    def live(self) -> Tensor:
        """`[B, Hkv, N]` bool: slots that hold a token (all of them in a dense store)."""
        raise NotImplementedError

    def append(self, new: NewColumns, count: int, limit: int | None = None) -> None:
        """Add `count` tokens to every head. Columns that `new` does not name get their fill value. `limit`: tokens per
        head that will never be exceeded for long, a bound on spare capacity."""
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        """`[B, Hkv, N, ...]`: the column; a view in a dense store, a padded copy in a ragged one."""
        raise NotImplementedError

    def write_new(self, name: str, values: Tensor) -> None:
        """Write `[B, Hkv, T, ...]` into the column for the `T` tokens appended last.

        Raises:
            ValueError: there are not as many, or storage has changed since.
        """
        raise NotImplementedError

    def _check_new(self, values: Tensor) -> None:
        if values.shape[2] != self.new:
            raise ValueError(f"{self.new} tokens are new, not {values.shape[2]}; storage has changed since they came")

    def add(self, name: str, values: Tensor) -> None:
        """Add `[B, Hkv, N]` to the column in place."""
        raise NotImplementedError

    def keep(self, mask: Tensor, uniform: bool = False, room: int | None = None) -> Store:
        """Keep the tokens where `mask` `[B, Hkv, N]` is true and free the others. Returns the store to use on.
        `uniform`: heads are meant to end up equally long, so a ragged store turns dense as soon as they are.
        `room`: dense storage shall have room for exactly this many more tokens; where it has that already, only the
        tokens that fill the gaps move."""
        raise NotImplementedError

    def drop(self, victims: Tensor, room: int | None = None) -> None:
        """Drop one token per head, at slots `victims` `[B, Hkv]`: the next token takes its slot, or the last one does.
        In a ragged store a head with slot -1 drops none. `room` as in `keep`."""
        raise NotImplementedError

    def find(self, position: int) -> Tensor | None:
        """`[B, Hkv]` int64 slots of the token that came at `position`; `None` where a head does not hold it."""
        raise NotImplementedError

    def at(self, name: str, slots: Tensor) -> Tensor:
        """`[B, Hkv]` entries of a ledger column at slots `[B, Hkv]`."""
        raise NotImplementedError

    def pack(self) -> None:
        """Give up all spare room."""
        raise NotImplementedError

    def map_rows(self, rows: Tensor) -> Store:
        """The store with batch rows `rows` (int64 indices), for beams and batch selection."""
        raise NotImplementedError

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of the storages behind these columns, spare capacity included."""
        return sum(self._columns[n].untyped_storage().nbytes() for n in names if n in self._columns)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one head."""
        return sum(self._columns[n].shape[-1] * self._columns[n].element_size() for n in (KEY, VALUE))

    def has(self, name: str) -> bool:
        """Whether there is a column of this name."""
        return name in self._columns

    @property
    def device(self) -> torch.device:
        """Where the tokens lie."""
        return self._columns[KEY].device

    def ensure(self, name: str) -> None:
        """Create the ledger column `name`, filled with its default, if it is not there yet."""
        if name not in self._columns:
            reference, spec = self._columns[KEY], spec_of(name)
            wide = spec.dtype.is_floating_point and reference.dtype == torch.float64
            dtype = torch.float64 if wide else spec.dtype
            self._columns[name] = torch.full(reference.shape[:-1], spec.fill, dtype=dtype, device=reference.device)


def put(rows: Tensor, where: Tensor, values: Tensor | float) -> None:
    """Write new tokens `[B, Hkv, T, ...]`, or a number, into `rows` `[slots, ...]` at the flat slots `where`."""
    if isinstance(values, Tensor):
        rows.index_copy_(0, where, values.flatten(0, 2).to(rows.device, rows.dtype))
    elif rows.device.type == "cpu":  # a third of the time
        rows.detach().numpy()[where.numpy()] = values
    else:
        rows.index_fill_(0, where, values)


def move(rows: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy the rows at flat slots `source` to `target`. A cache that was filled in inference mode may be looked at
    outside of it."""
    with torch.inference_mode() if rows.is_inference() else nullcontext():
        rows.index_copy_(0, target, rows.index_select(0, source))


def fresh(old: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """An uninitialised (keys, values) or default-filled (ledger) buffer like `old` with leading `shape`."""
    if name in (KEY, VALUE):
        return old.new_empty(*shape, old.shape[-1])
    return old.new_full(shape, spec_of(name).fill)


class DenseStore(Store):
    """Every head holds the same number of tokens."""

    def __init__(self, batch: int, heads: int, spare_share: int = SPARE_SHARE) -> None:
        """`spare_share`: a buffer that has to grow grows by one in so many tokens more than it must."""
        self.batch, self.heads, self.spare_share = batch, heads, spare_share
        self.columns = {}
        self.n = 0
        self.new = 0
        self.ordered = True
        self._gaps: Tensor | None = None  # [B * Hkv] flat slots, one among the first n + 1 of every head
        self._starts, self._spacing = torch.zeros(0, dtype=torch.long), 0

    @property
    def lengths(self) -> Tensor:
        return torch.full((self.batch, self.heads), self.n, dtype=torch.long)

    @property
    def longest(self) -> int:
        return self.n

    @property
    def tokens(self) -> int:
        return self.n * self.batch * self.heads

    @property
    def capacity(self) -> int:
        return self._columns[KEY].shape[2] if self._columns else 0

    @property
    def live(self) -> Tensor:
        return torch.ones(self.batch, self.heads, self.n, dtype=torch.bool, device=self.device)

    def has_room(self, count: int) -> bool:
        return self.n + count <= self.capacity

    def append(self, new: NewColumns, count: int, limit: int | None = None) -> None:
        if self._gaps is not None and count == 1:
            self._fill_gaps(new, self._gaps)
            return
        self.settle()
        need = self.n + count
        if need > self.capacity:
            capacity = need
            if self.n:
                roomy = need + spare(need, self.spare_share)
                capacity = max(need, min(roomy, limit)) if limit is not None else roomy
            self._resize(capacity, new)
        for name in new:
            self.ensure(name)
        for name, buffer in self._columns.items():
            values, place = new.get(name), buffer[:, :, self.n : need]
            if isinstance(values, Tensor):
                place.copy_(values)
            else:
                place.fill_(spec_of(name).fill if values is None else values)
        self.n, self.new, self._newest = need, count, None

    def _fill_gaps(self, new: NewColumns, gaps: Tensor) -> None:
        """`append` of one token per head, into the slots of those that were dropped."""
        for name in new:
            self.ensure(name)
        for name, buffer in self._columns.items():
            put(buffer.flatten(0, 2), gaps, new.get(name, spec_of(name).fill))
        self._gaps, self.n, self.new = None, self.n + 1, 1
        self._newest = None if self.ordered else gaps

    def settle(self) -> None:
        if self._gaps is None:
            return
        last = self._heads_at() + self.n
        for buffer in self._columns.values():
            move(buffer.flatten(0, 2), last, self._gaps)
        self._gaps = None

    def _heads_at(self) -> Tensor:
        """`[B * Hkv]` flat slot where every head begins."""
        heads, capacity = self.batch * self.heads, self.capacity
        if len(self._starts) != heads or self._spacing != capacity:  # kept, as every step of a full cache asks
            self._starts, self._spacing = torch.arange(heads, device=self.device) * capacity, capacity
        return self._starts

    def _resize(self, capacity: int, like: NewColumns) -> None:
        shape = (self.batch, self.heads, capacity)
        had = self.columns
        for name, old in (had or like).items():
            if isinstance(old, Tensor):  # `ensure` makes the others
                buffer = fresh(old, shape, name)
                if had and self.n:
                    buffer[:, :, : self.n] = old[:, :, : self.n]
                self._columns[name] = buffer

    def read(self, name: str) -> Tensor:
        return self.columns[name][:, :, : self.n]

    def write_new(self, name: str, values: Tensor) -> None:
        self._check_new(values)
        self.ensure(name)
        buffer = self.columns[name]
        if self._newest is None:
            buffer[:, :, self.n - self.new : self.n].copy_(values)
        else:
            put(buffer.flatten(0, 2), self._newest, values)

    def add(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        self.read(name).add_(values)

    def keep(self, mask: Tensor, uniform: bool = False, room: int | None = None) -> Store:
        counts = mask.sum(-1)
        kept = int(counts.max())
        if int(counts.min()) != kept:
            from .ragged import RaggedStore  # either layout turns into the other

            return RaggedStore.from_dense(self, mask)
        if kept == self.n:
            return self
        if room is not None and self.capacity == kept + room:
            self._close_gaps(mask, kept)
            return self
        if self.n - kept == 1 and kept and room is None:
            self.drop(mask.to(torch.uint8).argmin(-1))
            return self
        index = mask.nonzero()[:, 2].view(self.batch, self.heads, kept)
        if not self.ordered:
            order = self.read(POSITION).gather(2, index).argsort(-1)
            index, self.ordered = index.gather(2, order), True
        rows = (index + self._heads_at().view(self.batch, self.heads, 1)).flatten()
        for name, buffer in self.columns.items():
            kept_rows = buffer.flatten(0, 2).index_select(0, rows).unflatten(0, (self.batch, self.heads, kept))
            if room is not None:
                roomy = fresh(buffer, (self.batch, self.heads, kept + room), name)
                roomy[:, :, :kept] = kept_rows
                kept_rows = roomy
            self.columns[name] = kept_rows
        self.n, self.new, self._newest = kept, 0, None
        return self

    def _close_gaps(self, mask: Tensor, kept: int) -> None:
        """Move the kept tokens behind slot `kept` into the slots before it that became free."""
        slot = self._heads_at().view(self.batch, self.heads, 1) + torch.arange(self.n, device=mask.device)
        gaps, movers = slot[..., :kept][~mask[..., :kept]], slot[..., kept:][mask[..., kept:]]
        for buffer in self.columns.values():  # both run head after head, as many of one as of the other
            move(buffer.flatten(0, 2), movers, gaps)
        self.ordered = self.ordered and not bool(movers.numel())
        self.n, self.new, self._newest = kept, 0, None

    def pack(self) -> None:
        if self.capacity > self.n:
            self.columns = {name: buffer[:, :, : self.n].clone() for name, buffer in self.columns.items()}
            self.new, self._newest = 0, None

    def drop(self, victims: Tensor, room: int | None = None) -> None:
        self.settle()
        last = self.n - 1
        self.ordered = self.ordered and bool((victims == last).all())
        self._gaps = victims.flatten().to(self.device) + self._heads_at()
        self.n, self.new, self._newest = last, 0, None
        if room is not None and self.capacity != last + room:
            self._resize(last + room, self.columns)

    def find(self, position: int) -> Tensor | None:
        hits = (self.read(POSITION) == position).nonzero()
        whole = len(hits) == self.batch * self.heads  # a head holds a position once
        return hits[:, 2].view(self.batch, self.heads) if whole else None

    def at(self, name: str, slots: Tensor) -> Tensor:
        return self.columns[name].gather(2, slots[..., None])[..., 0]

    def map_rows(self, rows: Tensor) -> Store:
        rows = rows.to(self.device)
        self.columns = {name: buffer.index_select(0, rows) for name, buffer in self.columns.items()}
        self.batch, self.new, self._newest = rows.numel(), 0, None
        return self
