"""Attention over heads of different length, as a `RaggedStore` packs them.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` tokens of the longest head, `T` new tokens, `D` head dim;
`total` slots of the flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import attention, kernels
from .attention import ByPosition, Visible
from .ledger import POSITION
from .ragged import RaggedStore

__all__ = ["attend", "attention_mass"]

FEW_QUERIES = 16
"""Queries up to which the decode kernel leaves its logits for the attention mass; they are as many per key."""


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
    reduce: str = "",
    *,
    visible: Visible | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `queries` `[B, H, T, D]` over `keys` `[total, D]` and `values` `[total, Dv]`; the other arguments as
    in `attention.attend`.

    Returns:
        `[B, H, T, Dv]`, and with `reduce` what `attention_mass` returns, from the same computation; that only without
        `visible`.
    """
    if _kernel_takes(visible, queries, keys, values) and (not reduce or queries.shape[2] <= FEW_QUERIES):
        return _decode(store, queries, keys, values, reduce, visible, scale, softcap, sinks)
    if queries.shape[2] == 1 and visible is None and softcap is None and sinks is None and not reduce:
        return _attend_one(store, queries, keys, values, scale), None
    out = queries.new_zeros(*queries.shape[:3], values.shape[-1])
    mass = _no_mass(store, queries) if reduce else None
    for head in _heads(store, queries.shape[1], visible, sinks):
        q, k, v = queries[head.b, head.rows][None], keys[None, None, head.span], values[None, None, head.span]
        if mass is None:
            out[head.b, head.rows] = attention.attend(
                q, k, v, visible=head.visible, scale=scale, softcap=softcap, sinks=head.sinks
            )[0]
        elif k.shape[2]:
            own, received = attention.attend_and_count(q, k, v, reduce, scale=scale, softcap=softcap, sinks=head.sinks)
            out[head.b, head.rows], mass[head.b, head.h, : k.shape[2]] = own[0], received[0, 0]
    return out, mass


def _attend_one(store: RaggedStore, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """`attend` for one query per head: those of a group are the rows of one call per head."""
    b, h, _, d = queries.shape
    rows = queries.reshape(b * store.heads, 1, 1, -1, d).unbind()
    parts = [
        scaled_dot_product_attention(row, _segment(keys, start, end), _segment(values, start, end), scale=scale)
        if end > start else row.new_zeros(*row.shape[:3], values.shape[-1])
        for row, (start, end) in zip(rows, store.segments(), strict=True)
    ]  # fmt: skip
    return torch.cat(parts, 1).view(b, h, 1, -1)


def _segment(flat: Tensor, start: int, end: int) -> Tensor:
    """`flat[None, None, start:end]` of `[total, D]`, in a third of the time."""
    row, column = flat.stride()
    shape = (1, 1, end - start, flat.shape[1])
    return flat.as_strided(shape, (0, 0, row, column), flat.storage_offset() + start * row)


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
    if _kernel_takes(visible, queries, keys):
        if weights is None and queries.shape[2] <= FEW_QUERIES:
            mass = _decode(store, queries, keys, keys, reduce, visible, scale, softcap, sinks)[1]
            assert mass is not None
            return mass
        return _padded_mass(store, queries, keys, weights, reduce, visible, scale, softcap, sinks)
    mass = _no_mass(store, queries)
    if weights is not None:
        weights = weights.expand(*queries.shape[:3])
    for head in _heads(store, queries.shape[1], visible, sinks):
        mass[head.b, head.h, : head.span.stop - head.span.start] = attention.attention_mass(
            queries[head.b, head.rows][None], keys[None, None, head.span],
            None if weights is None else weights[head.b, head.rows][None], reduce,
            visible=head.visible, scale=scale, softcap=softcap, sinks=head.sinks,
        )[0, 0]  # fmt: skip
    return mass


def _no_mass(store: RaggedStore, queries: Tensor) -> Tensor:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return torch.zeros(store.batch, store.heads, store.longest, dtype=dtype, device=queries.device)


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


# ---- on a graphics processor


def _kernel_takes(visible: Visible | None, *tensors: Tensor) -> bool:
    return (visible is None or isinstance(visible, ByPosition)) and kernels.available(*tensors)


def _decode(
    store: RaggedStore, queries: Tensor, keys: Tensor, values: Tensor, reduce: str, visible: Visible | None,
    scale: float | None, softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    from .kernels.decode import decode

    places = query_places = None
    if isinstance(visible, ByPosition):
        places, last = store.columns[POSITION], visible.start + queries.shape[2]
        query_places = torch.arange(visible.start, last, dtype=torch.int32, device=queries.device)
    out, mass = decode(
        queries, keys, values, *store.spans(), positions=places, query_positions=query_places,
        scale=scale, softcap=softcap, sinks=sinks, reduce=reduce or None, longest=store.longest,
    )  # fmt: skip
    return out, None if mass is None else store.padded(mass).masked_fill_(~store.live, 0.0)


def _padded_mass(
    store: RaggedStore, queries: Tensor, keys: Tensor, weights: Tensor | None, reduce: str, visible: Visible | None,
    scale: float | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Many queries at once: a prompt, where a copy of the layer's keys is small beside what is computed."""
    from .kernels.attention_mass import attention_mass as fused

    first = visible.start if isinstance(visible, ByPosition) else None
    return fused(
        queries, store.padded(keys), weights, reduce, causal_offset=first, scale=scale, softcap=softcap, sinks=sinks,
        lengths=store.spans()[1], positions=None if first is None else store.read(POSITION),
    )  # fmt: skip
