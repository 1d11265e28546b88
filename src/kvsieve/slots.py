"""Storage of fixed capacity for decode steps that a compiler can follow.

Every head has the same number of slots, which never move and are written in place. What changes from step to step is
held in tensors: which slot holds which token, where the next token goes, how many were fed. No decision is taken in
Python, so one graph serves all steps.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `C` slots of a head, `D` head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UnsupportedOperationError
from .ledger import KEY, KIND, PLACE, POSITION, SEGMENT, VALUE, spec_of
from .store import Columns, DenseStore, NewColumns, Store

__all__ = ["SlotStore", "fill_of"]

_DROPPED = (KIND, SEGMENT, PLACE)
"""Columns that say nothing about tokens that hold text and keep their rotation."""


def fill_of(name: str) -> float:
    """What an empty slot holds in column `name`."""
    return 0.0 if name in (KEY, VALUE) else spec_of(name).fill


class SlotStore(Store):
    """`C` slots per head; a slot whose position is -1 is empty.

    Attributes:
        slot: `[B, Hkv]` int64, where the next token goes.
        length: int64 without dimensions, columns fed so far.
        first: `[B]` int64 column of the first real token of every row.
        failed: bool without dimensions, whether a score was NaN in a step that could not raise.
        state: what the scorer keeps between forward passes, in buffers that stay where they are.
        filled_at: columns that had been fed when the slots were filled.
        most: tokens of the longest head at that time.
    """

    def __init__(self, source: Store, capacity: int, state: Columns) -> None:
        """Empty slots for the columns of `source`, and buffers for `state`."""
        self.batch, self.heads, self.capacity = source.batch, source.heads, capacity
        self.ordered, self.new = False, 0
        self.filled_at = self.most = 0
        self.columns = {}
        device = source.columns[KEY].device
        shape = (self.batch, self.heads, capacity)
        for name, buffer in source.columns.items():
            if name not in _DROPPED:
                tail = (buffer.shape[-1],) if name in (KEY, VALUE) else ()
                self.columns[name] = torch.full((*shape, *tail), fill_of(name), dtype=buffer.dtype, device=device)
        self.slot = torch.zeros(self.batch, self.heads, dtype=torch.long, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.first = torch.zeros(self.batch, dtype=torch.long, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.state = {name: tensor.detach().clone() for name, tensor in state.items()}
        self.rows = torch.arange(self.batch, device=device)[:, None]
        self.ranks = torch.arange(self.heads, device=device)[None]
        for tensor in (self.slot, self.length, self.first, self.failed, *self.columns.values(), *self.state.values()):
            torch._dynamo.mark_static_address(tensor)

    def fits(self, source: Store, state: Columns) -> bool:
        """Whether these slots can hold what `source` holds, and these buffers `state`."""

        def kinds(columns: Columns) -> dict[str, object]:
            return {
                name: (buffer.dtype, buffer.device, buffer.shape[-1] if name in (KEY, VALUE) else 1)
                for name, buffer in columns.items()
                if name not in _DROPPED
            }

        def shapes(columns: Columns) -> dict[str, object]:
            return {name: (tensor.dtype, tensor.device, tensor.shape) for name, tensor in columns.items()}

        return (
            (self.batch, self.heads) == (source.batch, source.heads)
            and kinds(self.columns) == kinds(source.columns)
            and shapes(self.state) == shapes(state)
            and (torch.is_inference_mode_enabled() or not self.slot.is_inference())
        )

    def fill(self, source: Store, state: Columns, seen: int, first: Tensor) -> None:
        """Take over what `source` holds, at most `C - 1` tokens per head; everything else is emptied."""
        held, live = source.longest, source.live
        for name, buffer in self.columns.items():
            buffer.fill_(fill_of(name))
            if held:
                mask = live[..., None] if name in (KEY, VALUE) else live
                buffer[:, :, :held] = source.read(name).detach().masked_fill(~mask, fill_of(name))
        for name, tensor in state.items():
            self.state[name].copy_(tensor.detach())
        self.slot.copy_(live.sum(-1))
        self.length.fill_(seen)
        self.first.copy_(first)
        self.failed.fill_(False)
        self.filled_at, self.most = seen, held

    # ---- one decode step

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Write the next token, `[B, Hkv, 1, D]` each, into the free slot of every head."""
        new = {KEY: keys[:, :, 0], VALUE: values[:, :, 0], POSITION: self.length.to(torch.int32).expand_as(self.slot)}
        for name, buffer in self.columns.items():
            value = new.get(name)
            if value is None:
                value = torch.full_like(self.slot, fill_of(name), dtype=buffer.dtype)
            buffer[self.rows, self.ranks, self.slot] = value.detach().to(buffer.dtype)
        self.length.add_(1)

    def free(self, victims: Tensor) -> None:
        """Empty the slots `victims` `[B, Hkv]`, one per head, which are those to be written next."""
        nobody = torch.full_like(victims, -1, dtype=torch.int32)
        self.columns[POSITION][self.rows, self.ranks, victims] = nobody
        self.slot.copy_(victims)

    def keep_state(self, state: Columns) -> None:
        """Write what a scorer has put into its `state` back into the buffers."""
        for name, tensor in state.items():
            if name not in self.state:
                raise UnsupportedOperationError(
                    f"the scorer begins the state {name!r} in a decode step, where a cache of fixed capacity has no "
                    "room for it; begin it with the prompt, or use SieveCache"
                )
            if tensor is not self.state[name]:
                self.state[name].copy_(tensor.detach())

    # ---- the interface of a store

    @property
    def lengths(self) -> Tensor:
        return self.live.sum(-1).cpu()

    @property
    def longest(self) -> int:
        return int(self.live.sum(-1).max())

    @property
    def tokens(self) -> int:
        return int(self.live.sum())

    @property
    def live(self) -> Tensor:
        return self.columns[POSITION] >= 0

    def read(self, name: str) -> Tensor:
        return self.columns[name]

    def ensure(self, name: str) -> None:
        if name not in self.columns:
            raise UnsupportedOperationError(
                f"the scorer begins the record {name!r} in a decode step, where a cache of fixed capacity has no room "
                "for it; begin it with the prompt, or use SieveCache"
            )

    def write_new(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        self.columns[name][self.rows, self.ranks, self.slot] = values[:, :, 0].detach().to(self.columns[name].dtype)

    def add(self, name: str, values: Tensor) -> None:
        self.ensure(name)
        self.columns[name].add_(values.detach())

    def append(self, new: NewColumns, count: int, limit: int | None = None) -> None:
        raise UnsupportedOperationError("fixed slots take one token at a time")

    def keep(self, mask: Tensor, uniform: bool = False, room: int | None = None) -> Store:
        return self.packed(mask)

    def pack(self) -> None:
        """There is nothing to give up."""

    def map_rows(self, rows: Tensor) -> Store:
        return self.packed().map_rows(rows)

    def packed(self, mask: Tensor | None = None) -> Store:
        """A copy of what is held, or of the part of it where `mask` `[B, Hkv, C]` is true, in order of position and
        without empty slots: dense where all heads hold as many tokens."""
        live = self.live if mask is None else self.live & mask
        counts = live.sum(-1)
        store = DenseStore(self.batch, self.heads)
        store.n = int(counts.max())
        behind = torch.iinfo(torch.int32).max
        order = self.columns[POSITION].masked_fill(~live, behind).argsort(-1)[..., : store.n]
        for name, buffer in self.columns.items():
            index = order[..., None].expand(*order.shape, buffer.shape[-1]) if buffer.dim() == 4 else order
            store.columns[name] = buffer.gather(2, index)
        return store.keep(torch.arange(store.n, device=order.device) < counts[..., None])
