"""Exact attention over what is held, and the attention that each key receives, without an `N x N` matrix.

Both go through blocks of query rows, so scratch memory is one block of logits whatever the length. Query heads of a
group are stacked as rows of one matrix product; keys are never repeated. The twins in `attention_naive.py` form the
matrix.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` stored tokens, `T` new tokens, `D` head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import kernels

__all__ = [
    "BLOCK_BYTES",
    "FEW_ROWS",
    "ByPosition",
    "attend",
    "attend_and_count",
    "attend_few",
    "attention_mass",
    "count_one",
    "needs_gradient",
]

BLOCK_BYTES = 16 << 20
"""Upper bound on the logits of one block; 16 MiB keeps a block near the caches of a CPU core."""

FEW_ROWS = 256
"""Query rows of a group up to which stacking its heads beats the stock attention, which repeats keys or reads them once
for every head (measured on a processor; see `benchmarks/`)."""

TILE = 4096
"""Keys of a head that are widened at a time."""

MANY_LOGITS = 1 << 18
"""Logits of a head from which a processor works faster head by head."""

HEAD_LOGITS = 1 << 21
"""Logits of a block where heads are worked on one by one: 8 MiB in single precision."""

HEAD_KEYS = 2048
"""Keys of one product where heads are worked on one by one; longer ones run at half the speed on a processor."""

Visible = Callable[[int, int], Tensor]
"""`visible(start, end)` -> bool `[B|1, Hkv|1, end - start, N]`: which keys these query rows may see."""


@dataclass(frozen=True)
class ByPosition:
    """`Visible` of causal attention over keys in any order: each query sees the keys whose position is not above its
    own.

    Attributes:
        start: position of the first query; the others follow.
        positions: `[B, Hkv, N]` of the keys.
        live: `[B, Hkv, N]` bool, where there is a key; everywhere by default.
    """

    start: int
    positions: Tensor
    live: Tensor | None = None

    def __call__(self, start: int, end: int) -> Tensor:
        own = torch.arange(self.start + start, self.start + end, device=self.positions.device)
        seen = self.positions[:, :, None] <= own[:, None]
        return seen if self.live is None else seen & self.live[:, :, None]


@torch.no_grad()
def attention_mass(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None = None,
    reduce: str = "sum",
    lse: Tensor | None = None,
    *,
    scale: float | None = None,
    visible: Visible | None = None,
    causal_offset: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention received by every key, reduced over query rows and over the query heads of its group.

    Args:
        q: `[B, H, T, D]` rotated queries.
        k: `[B, Hkv, N, D]` rotated keys.
        weights: `[B|1, H|1, T]` weight of every query row; zero leaves a row out.
        reduce: `"sum"`, `"max"`, or `"square"` (sum of squared probabilities).
        lse: `[B, H, T]` log-sum-exp of every row when the forward pass has saved it.
        scale: factor on the logits, `D ** -0.5` by default.
        visible: rows to keys, evaluated block by block.
        causal_offset: instead of `visible`: row `i` sees keys `0 .. i + causal_offset`.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: `[H]` logits that join the denominator but belong to no key.

    Returns:
        `[B, Hkv, N]` float32 (float64 for float64 queries).
    """
    placed = isinstance(visible, ByPosition) and visible.live is None
    if (placed or visible is None) and kernels.available(q, k):
        from .kernels.attention_mass import attention_mass as fused

        at = visible.positions if isinstance(visible, ByPosition) else None
        offset = visible.start if isinstance(visible, ByPosition) else causal_offset
        return fused(
            q, k, weights, reduce, lse, causal_offset=offset, scale=scale, softcap=softcap, sinks=sinks, positions=at
        )
    b, hkv, n = k.shape[:3]
    mass = torch.zeros(b, hkv, n, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    plain = visible is None and softcap is None and sinks is None and lse is None
    if plain and q.device.type == "cpu" and q.shape[2] * n >= MANY_LOGITS:
        _head_by_head(q, k, mass, reduce, scale, causal_offset=causal_offset, weights=weights)
        return mass
    for s, e, width, p in _blocks(q, k, scale, visible, causal_offset, softcap, sinks, lse):
        if weights is not None:
            w = weights[:, :, s:e].expand(b, q.shape[1], e - s).reshape(b, hkv, -1, e - s, 1)
            p = p * w
        _count(mass[..., :width], p, reduce)
    return mass


def _count(mass: Tensor, p: Tensor, reduce: str) -> None:
    """Take the probabilities `p` `[B, Hkv, G, rows, N]` of a block into `mass` `[B, Hkv, N]`."""
    if reduce == "max":
        torch.maximum(mass, _reduced(p, reduce), out=mass)
    else:
        mass += _reduced(p, reduce)


def _reduced(p: Tensor, reduce: str) -> Tensor:
    """Probabilities `p` `[B, Hkv, G, rows, N]` over query rows and heads, `[B, Hkv, N]`."""
    if reduce == "sum":
        return p.sum((2, 3))
    if reduce == "square":
        return p.square().sum((2, 3))
    if reduce == "max":
        return p.amax((2, 3))
    raise ValueError(f'reduce={reduce!r} is not "sum", "max" or "square"')


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    visible: Visible | None = None,
    causal_offset: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output `[B, H, T, Dv]` in `v`'s dtype; arguments as in `attention_mass`. Rows that see no key are
    zero."""
    b, hkv = k.shape[:2]
    group = q.shape[1] // hkv
    if group == 1 and visible is None and causal_offset is None and softcap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    if q.shape[2] == 1 and visible is None and causal_offset is None and softcap is None and sinks is None:
        return attend_few(q, k, v, scale=scale)
    out = q.new_zeros(b, hkv, group, q.shape[2], v.shape[-1])
    for s, e, width, p in _blocks(q, k, scale, visible, causal_offset, softcap, sinks, None):
        rows = p.flatten(2, 3).to(v.dtype) @ v[:, :, :width]
        out[:, :, :, s:e] = rows.unflatten(2, (group, e - s))
    return out.flatten(1, 2)


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """Attention of a few queries, `[B, H, T, Dv]`: the query heads of a group become rows of one attention, so that
    keys are read once and never repeated.

    Args:
        q: `[B, H, T, D]`, with `H // Hkv * T` up to about `FEW_ROWS`.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, Dv]`.
        mask: `[B|1, Hkv|1, T, N]` bool, what each query may see; everything by default.
        scale: factor on the logits, `D ** -0.5` by default.
    """
    b, hkv, t = q.shape[0], k.shape[1], q.shape[2]
    rows = q.reshape(b, hkv, -1, q.shape[-1])
    seen = None if mask is None else mask.repeat(1, 1, rows.shape[2] // t, 1)
    return scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale).reshape(*q.shape[:3], -1)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether an output made of these tensors has to let gradients through, which `attend_and_count` does not."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.no_grad()
def attend_and_count(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reduce: str = "sum",
    *,
    causal_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` and `attention_mass` from one computation of the probabilities; arguments as there.

    Returns:
        `[B, H, T, Dv]` in `v`'s dtype, and `[B, Hkv, N]` as `attention_mass` gives it.
    """
    if softcap is None and sinks is None and causal_offset is None and q.shape[2] == 1:
        return count_one(q, k, v, reduce, scale)
    b, hkv, n = k.shape[:3]
    group = q.shape[1] // hkv
    mass = torch.zeros(b, hkv, n, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    out = v.new_zeros(b, hkv, group, q.shape[2], v.shape[-1])
    if q.device.type == "cpu" and softcap is None and sinks is None and q.shape[2] * n >= MANY_LOGITS:
        _head_by_head(q, k, mass, reduce, scale, causal_offset=causal_offset, v=v, out=out)
        return out.flatten(1, 2), mass
    for s, e, width, p in _blocks(q, k, scale, None, causal_offset, softcap, sinks, None):
        out[:, :, :, s:e] = (p.flatten(2, 3).to(v.dtype) @ v[:, :, :width]).unflatten(2, (group, e - s))
        _count(mass[..., :width], p, reduce)
    return out.flatten(1, 2), mass


def count_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reduce: str,
    scale: float | None = None,
    live: Tensor | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """`attend_and_count` for one query `[B, H, 1, D]`, over the keys where `live` `[B, Hkv, N]` is true (all of them by
    default). A processor multiplies a few rows in half precision ten times slower than in single precision, so keys and
    values are widened there, a tile at a time."""
    b, hkv, n, d = k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(b * hkv, -1, d) * (d**-0.5 if scale is None else scale)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # of products, one call each: this runs in every step
    if q.device.type != "cpu" or q.dtype == wide:
        p = _shares(torch.bmm(rows, keys.transpose(1, 2)), live, wide)
        out = torch.bmm(p.to(v.dtype), values)
    else:
        rows, steps = rows.to(wide), range(0, n, tile)
        logits = torch.cat([torch.bmm(rows, keys[:, s : s + tile].to(wide).transpose(1, 2)) for s in steps], -1)
        p = _shares(logits, live, wide)
        out = torch.stack([torch.bmm(p[..., s : s + tile], values[:, s : s + tile].to(wide)) for s in steps]).sum(0)
    return out.to(v.dtype).view(*q.shape[:3], -1), _reduced(p.view(b, hkv, -1, 1, n), reduce)


def _shares(logits: Tensor, live: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Probabilities from logits `[B * Hkv, G, N]`, exactly zero where `live` `[B, Hkv, N]` is false."""
    seen = logits if live is None else logits.masked_fill(~live.flatten(0, 1)[:, None], -math.inf)
    return seen.softmax(-1, dtype=dtype)


def _head_by_head(
    q: Tensor,
    k: Tensor,
    mass: Tensor,
    reduce: str,
    scale: float | None,
    *,
    causal_offset: int | None = None,
    weights: Tensor | None = None,
    v: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Take the attention of all queries into `mass` `[B, Hkv, N]`, and where `v` is given its output into `out`
    `[B, Hkv, G, T, Dv]`, with one buffer for all blocks: for a processor, fresh memory for every block costs as much
    as the products."""
    b, hkv, n = mass.shape
    t, group = q.shape[2], q.shape[1] // hkv
    rows = max(16, min(256, t, HEAD_LOGITS // n))
    buffer = mass.new_empty(rows * n)
    given = mass.new_ones(b, q.shape[1], t) if weights is None else weights.to(mass.dtype).expand(b, q.shape[1], t)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    first = 0 if causal_offset is None else max(0, -causal_offset)  # queries before this see no key
    for i in range(b):
        for j in range(hkv):
            kt = k[i, j].to(mass.dtype).T
            values = None if v is None else v[i, j].to(mass.dtype)
            for g in range(group):
                head = q[i, j * group + g].to(mass.dtype) * factor
                weight = given[i, j * group + g]
                for s in range(first, t, rows):
                    e = min(s + rows, t)
                    width = n if causal_offset is None else min(n, e + causal_offset)
                    block = buffer[: (e - s) * width].view(e - s, width)
                    for a in range(0, width, HEAD_KEYS):
                        z = min(a + HEAD_KEYS, width)
                        torch.mm(head[s:e], kt[:, a:z], out=block[:, a:z])
                    if causal_offset is not None:
                        _hide_later(block, s + causal_offset)
                    torch.softmax(block, -1, out=block)
                    if values is not None and out is not None:
                        out[i, j, g, s:e] = block @ values[:width]
                    if reduce == "sum":
                        mass[i, j, :width].addmv_(block.T, weight[s:e])
                    else:
                        block *= weight[s:e, None]
                        _count(mass[i : i + 1, j : j + 1, :width], block[None, None, None], reduce)


def _hide_later(block: Tensor, last: int) -> None:
    """Row `i` of the logits `block` `[rows, width]` sees columns up to `last + i`."""
    rows, width = block.shape
    if width > last + 1:
        start = max(0, last + 1)
        row = torch.arange(rows, device=block.device)[:, None] + last
        block[:, start:].masked_fill_(torch.arange(start, width, device=block.device) > row, -math.inf)


def _blocks(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    visible: Visible | None,
    causal_offset: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yield `(start, end, width, probabilities [B, Hkv, G, rows, width])` for blocks of query rows."""
    b, h, t, d = q.shape
    hkv, n = k.shape[1], k.shape[2]
    group = h // hkv
    scale = d**-0.5 if scale is None else scale
    rows = max(16, min(256, BLOCK_BYTES // max(1, b * h * n * 4)))
    q5 = q.unflatten(1, (hkv, group))
    kt = k.transpose(-1, -2)
    for s in range(0, t, rows):
        e = min(t, s + rows)
        width = n if causal_offset is None else max(0, min(n, e + causal_offset))
        block = q5[:, :, :, s:e].reshape(b, hkv, group * (e - s), d) * scale
        logits = (block @ kt[..., :width]).to(torch.promote_types(q.dtype, torch.float32))
        logits = logits.unflatten(2, (group, e - s))
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if visible is not None:
            logits = logits.masked_fill(~visible(s, e)[:, :, None, :, :width], -math.inf)
        elif causal_offset is not None:
            first = max(0, s + causal_offset)
            row = torch.arange(s, e, device=q.device)[:, None] + causal_offset
            column = torch.arange(first, width, device=q.device)
            logits[..., first:width].masked_fill_(column > row, -math.inf)
        if visible is None and causal_offset is None and sinks is None and lse is None:
            yield s, e, width, logits.softmax(-1)
            continue
        if lse is not None:
            yield s, e, width, (logits - lse[:, :, s:e].unflatten(1, (hkv, group))[..., None]).exp_()
            continue
        top = logits.amax(-1, keepdim=True) if width else logits.new_full((*logits.shape[:-1], 1), -math.inf)
        extra: Tensor | float = 0.0
        if sinks is not None:
            sink = sinks.to(logits.dtype).view(1, hkv, group, 1, 1)
            top = torch.maximum(top, sink)
            extra = (sink - top).exp()
        top = top.masked_fill(top == -math.inf, 0.0)
        p = (logits - top).exp_()
        yield s, e, width, p / (p.sum(-1, keepdim=True) + extra).clamp_min(torch.finfo(p.dtype).tiny)
