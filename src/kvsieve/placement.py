"""Closing the gaps that evicted tokens leave, by rotating the keys that stay.

Shapes: `B` batch, `Hkv` key-value heads, `N` stored tokens of the longest head, `D` head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ledger import KEY, PLACE, POSITION
from .ragged import RaggedStore
from .rope import Rotary
from .store import DenseStore, Store

__all__ = ["towards_newest", "towards_oldest"]


def towards_newest(store: Store, rope: Rotary, newest: int) -> Tensor:
    """Keys as they would lie without gaps behind them, the newest at place `newest`, where it came; the stored ones
    stay as they are. `[B, Hkv, N, D]` of a dense store, `[total, D]` of a ragged one."""
    came = store.read(PLACE if store.has(PLACE) else POSITION).long()
    return _rotated(store, rope, (newest - came - _newer_held(store)).masked_fill(~store.live, 0))


def towards_oldest(store: Store, rope: Rotary, length: int) -> bool:
    """Rotate the stored keys to the places up to `length`, without gaps; heads that hold less begin later. Returns
    whether any of them moved."""
    if not store.has(PLACE):  # so far, every token lies where it came
        store.columns[PLACE] = store.columns[POSITION].clone()
    live, target = store.live, length - 1 - _newer_held(store)
    shift = (target - store.read(PLACE)).masked_fill(~live, 0)
    if not bool(shift.any()):
        return False
    keys = _rotated(store, rope, shift)
    if isinstance(store, RaggedStore):
        store.columns[KEY], store.columns[PLACE] = keys, store.flat(target).to(torch.int32)
    else:
        store.columns[KEY][:, :, : store.longest] = keys
        store.columns[PLACE][:, :, : store.longest] = target
    return True


def _newer_held(store: Store) -> Tensor:
    """`[B, Hkv, N]`: how many of the tokens that a head holds are newer than each of them. Slots without a token count
    as the oldest."""
    positions = store.read(POSITION)
    return positions.shape[-1] - 1 - positions.argsort(-1).argsort(-1)


def _rotated(store: Store, rope: Rotary, shift: Tensor) -> Tensor:
    """Keys rotated on by `shift` `[B, Hkv, N]`, as the store lays them out. Most keys of a stream that keeps the newest
    tokens do not move; they are copied."""
    if isinstance(store, DenseStore):
        keys = store.read(KEY)
    else:
        assert isinstance(store, RaggedStore)
        keys, shift = store.columns[KEY], store.flat(shift)
    moving = shift.nonzero(as_tuple=True)
    out = keys.clone()
    if len(moving[0]):
        out[moving] = rope.shift(keys[moving][None, None], shift[moving][None, None])[0, 0]
    return out
