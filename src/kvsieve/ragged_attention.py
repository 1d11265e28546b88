"""Attention over heads of different length, as a `RaggedStore` packs them.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` tokens of the longest head, `T` new tokens, `D` head dim;
`total` slots of the flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import attention
from .attention import Visible
from .ragged import RaggedStore

__all__ = ["attend", "attention_mass"]


class _Head(NamedTuple):
    """One head of a ragged store: its batch row, its query heads, its span in the flat buffer."""

    b: int
    h: int
    rows: slice
    span: slice
    visible: Visible | None
    sinks: Tensor | None


def attend(
    store: RaggedStore,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output `[B, H, T, Dv]` of `queries` `[B, H, T, D]` over `keys` `[total, D]` and `values`
    `[total, Dv]`; the other arguments as in `attention.attend`."""
    out = queries.new_zeros(*queries.shape[:3], values.shape[-1])
    for head in _heads(store, queries.shape[1], visible, sinks):
        out[head.b, head.rows] = attention.attend(
            queries[head.b, head.rows][None], keys[None, None, head.span], values[None, None, head.span],
            visible=head.visible, scale=scale, softcap=softcap, sinks=head.sinks,
        )[0]  # fmt: skip
    return out


def attention_mass(
    store: RaggedStore,
    queries: Tensor,
    keys: Tensor,
    weights: Tensor | None = None,
    reduce: str = "sum",
    *,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attention.attention_mass` over `keys` `[total, D]`: `[B, Hkv, N]`, zero behind the last token of a head."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    mass = torch.zeros(store.batch, store.heads, store.longest, dtype=dtype, device=queries.device)
    if weights is not None:
        weights = weights.expand(*queries.shape[:3])
    for head in _heads(store, queries.shape[1], visible, sinks):
        mass[head.b, head.h, : head.span.stop - head.span.start] = attention.attention_mass(
            queries[head.b, head.rows][None], keys[None, None, head.span],
            None if weights is None else weights[head.b, head.rows][None], reduce,
            visible=head.visible, scale=scale, softcap=softcap, sinks=head.sinks,
        )[0, 0]  # fmt: skip
    return mass


def _heads(store: RaggedStore, query_heads: int, visible: Visible | None, sinks: Tensor | None) -> Iterator[_Head]:
    """Every head, with what its part of the attention needs."""
    group = query_heads // store.heads
    for i, (start, end) in enumerate(store.segments()):
        b, h = divmod(i, store.heads)
        rows = slice(h * group, (h + 1) * group)
        own = None if sinks is None else sinks[rows]
        yield _Head(b, h, rows, slice(start, end), _of_head(visible, b, h, end - start), own)


def _of_head(visible: Visible | None, b: int, h: int, n: int) -> Visible | None:
    """The visibility of one head, cut to its own length."""
    if visible is None:
        return None
    inner = visible
    return lambda s, e: inner(s, e)[b : b + 1, h : h + 1, :, :n]
