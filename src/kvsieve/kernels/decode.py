"""Attention of few queries over keys and values packed head after head in one buffer, as three Triton kernels.

Heads hold different numbers of tokens. The keys of every head are split into spans, so that one query keeps the whole
device busy: every program attends to one span, a second kernel puts the spans together. Where the attention that each
stored token receives is asked for, the first kernel leaves its logits, `H * T` numbers per token against the `D + Dv`
that it has read, and a third turns them into probabilities.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `G = H / Hkv`, `T` new tokens, `D` head dim. Rows as in
`attention_mass`: row `r` of a group is token `r // G` of head `r % G`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import DTYPES, MAX_HEAD_DIM
from .shared import REDUCTIONS, factors, load_keys, load_rows, logits_base2, side, split, widened

__all__ = ["decode"]

MAX_SPLITS = 64
WARPS = 4
BLOCK_TOKENS = 128
"""Tokens of a program that sums up what they receive."""


@triton.jit(do_not_specialize=["rows"])
def _span_kernel(
    q, keys, values, starts, lengths, places, query_places, parts, lses, logits,
    stride_qb, stride_qh, stride_qt, stride_kn, stride_vn, heads, rows, span, factor, cap,
    group: tl.constexpr, d: tl.constexpr, dv: tl.constexpr, placed: tl.constexpr, capped: tl.constexpr,
    collected: tl.constexpr, widen: tl.constexpr,
    block_r: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """One block of rows against one span of a head's keys: `parts` `[splits, B * Hkv, rows, Dv]` is the attention over
    that span alone, `lses` `[splits, B * Hkv, rows]` its log-sum-exp in base 2."""
    part = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    head_start = tl.load(starts + bh).to(tl.int64)
    length = tl.load(lengths + bh)
    keys += head_start * stride_kn
    values += head_start * stride_vn

    r = tl.program_id(2) * block_r + tl.arange(0, block_r)
    q_tile = load_rows(q + b * stride_qb + h * group * stride_qh, rows, r, stride_qh, stride_qt, group, d, block_d)
    last_seen = r
    if placed:
        last_seen = tl.load(query_places + b * (rows // group) + r // group, mask=r < rows, other=-1)
    top = tl.full([block_r], float("-inf"), tl.float32)
    total = tl.zeros([block_r], tl.float32)
    attended = tl.zeros([block_r, block_v], tl.float32)
    first = part * span
    for start in range(first, tl.minimum(first + span, length), block_n):
        j = start + tl.arange(0, block_n)
        x = logits_base2(q_tile, load_keys(keys, length, j, stride_kn, d, block_d), factor, cap, capped, widen)
        seen = (j < length)[None, :]
        if placed:
            place = tl.load(places + head_start + j, mask=j < length, other=0)
            seen = seen & (place[None, :] <= last_seen[:, None])
        x = tl.where(seen, x, float("-inf"))
        if collected:
            where = (head_start + j)[None, :] * rows + r[:, None]
            tl.store(logits + where, x, mask=(j < length)[None, :] & (r < rows)[:, None])
        new_top = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(x - safe[:, None])
        keep = tl.exp2(top - safe)
        value = load_keys(values, length, j, stride_vn, dv, block_v)
        if widen:
            value = value.to(tl.float32)
        attended = attended * keep[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        total = total * keep + tl.sum(p, 1)
        top = new_top
    some = total > 0
    total = tl.where(some, total, 1.0)
    row = (part * tl.num_programs(1) + bh) * rows + r
    tl.store(lses + row, tl.where(some, top + tl.log2(total), float("-inf")), mask=r < rows)
    column = tl.arange(0, block_v)
    mask = (r < rows)[:, None] & (column < dv)[None, :]
    tl.store(parts + row[:, None] * dv + column[None, :], attended / total[:, None], mask=mask)


@triton.jit(do_not_specialize=["rows", "splits"])
def _join_kernel(
    parts, lses, sinks, out, lse, heads, rows, splits,
    group: tl.constexpr, dv: tl.constexpr, sunk: tl.constexpr, block_s: tl.constexpr, block_v: tl.constexpr,
):  # fmt: skip
    """One row: the attention of all spans, `out` `[B, H, T, Dv]`, and its `lse` `[B * Hkv, rows]` in base 2."""
    r = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, block_s)
    row = (part * tl.num_programs(1) + bh) * rows + r
    span_lse = tl.load(lses + row, mask=part < splits, other=float("-inf"))
    top = tl.max(span_lse, 0)
    sink = float("-inf")
    if sunk:
        sink = tl.load(sinks + (bh % heads) * group + r % group).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    safe = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(span_lse - safe)
    total = tl.sum(share, 0)
    if sunk:
        total += tl.exp2(sink - safe)
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(lse + bh * rows + r, tl.where(some, safe + tl.log2(total), float("-inf")))
    column = tl.arange(0, block_v)
    mask = (part < splits)[:, None] & (column < dv)[None, :]
    part_out = tl.load(parts + row[:, None] * dv + column[None, :], mask=mask, other=0.0)
    attended = tl.sum(part_out * share[:, None], 0) / total
    where = ((bh * group + r % group) * (rows // group) + r // group) * dv
    tl.store(out + where + column, attended.to(out.dtype.element_ty), mask=column < dv)


@triton.jit(do_not_specialize=["rows"])
def _received_kernel(
    logits, lse, starts, lengths, mass, rows,
    reduction: tl.constexpr, block_r: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """One block of a head's tokens: the attention that they receive, `mass` `[total]`."""
    bh = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + bh)
    j = tl.program_id(0) * block_n + tl.arange(0, block_n)
    token = tl.load(starts + bh).to(tl.int64) + j
    received = tl.zeros([block_n], tl.float32)
    for first in range(0, rows, block_r):
        r = first + tl.arange(0, block_r)
        total = tl.load(lse + bh * rows + r, mask=r < rows, other=float("inf"))
        total = tl.where(total == float("-inf"), float("inf"), total)  # a row that sees nothing gives nothing
        mask = (j < length)[:, None] & (r < rows)[None, :]
        x = tl.load(logits + token[:, None] * rows + r[None, :], mask=mask, other=float("-inf"))
        p = tl.exp2(x - total[None, :])
        if reduction == 1:
            received = tl.maximum(received, tl.max(p, 1))
        elif reduction == 2:
            received += tl.sum(p * p, 1)
        else:
            received += tl.sum(p, 1)
    tl.store(mass + token, received, mask=j < length)


@torch.no_grad()
def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    reduce: str | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a few new tokens over packed keys and values, and what every stored token receives of it.

    Args:
        q: `[B, H, T, D]` rotated queries, `T` small.
        keys: `[total, D]` rotated keys of all heads, of the same dtype.
        values: `[total, Dv]`, of the same dtype.
        starts, lengths: `[B, Hkv]` where every head's tokens begin in the buffers, and how many they are.
        positions: `[total]` position of every key; together with `query_positions`, a query sees the keys whose
            position is not above its own. Every query sees every key of its head by default.
        query_positions: `[T]` or `[B, T]`.
        scale: factor on the logits, `D ** -0.5` by default.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: `[H]` logits that join the denominator but belong to no key.
        reduce: collect the attention of every stored token over the rows and heads of its group: `"sum"`, `"max"` or
            `"square"`.
        longest: the largest of `lengths`, where the caller has it without asking the device.

    Returns:
        `[B, H, T, Dv]` in `values`' dtype, zero for rows that see no key; and `[total]` float32, or None without
        `reduce`. Tokens that belong to no head receive nothing.

    Raises:
        ValueError: shapes, dtypes or options that the kernels do not take.
    """
    b, h, t, d = q.shape
    hkv, dv = starts.shape[1], values.shape[-1]
    _check(q, keys, values, starts, lengths, (positions, query_positions), reduce)
    group, rows, heads = h // hkv, h // hkv * t, b * hkv
    longest = (int(lengths.max()) if lengths.numel() else 0) if longest is None else longest
    out = q.new_zeros(b, h, t, dv, dtype=values.dtype)
    mass = None if reduce is None else q.new_zeros(keys.shape[0], dtype=torch.float32)
    if not heads * rows * longest:
        return out, mass
    starts, lengths = (x.to(q.device, torch.int32).contiguous() for x in (starts, lengths))
    q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
    places = query_places = starts
    if positions is not None and query_positions is not None:
        places = positions.to(torch.int32).contiguous()
        query_places = query_positions.to(q.device, torch.int32).expand(b, t).contiguous()
    block_d, block_v = side(d), side(dv)
    most_rows, most_keys = tiles(max(block_d, block_v), q.dtype)
    block_r, block_n = side(rows, most_rows), side(longest, most_keys)
    row_blocks, blocks = triton.cdiv(rows, block_r), triton.cdiv(longest, block_n)
    splits, each = split(heads * row_blocks, blocks, MAX_SPLITS)
    parts = q.new_empty(splits, heads, rows, dv, dtype=torch.float32)
    lses, lse = parts.new_empty(splits, heads, rows), parts.new_empty(heads, rows)
    logits = lse if mass is None else parts.new_empty(keys.shape[0], rows)
    with torch.cuda.device_of(q):
        _span_kernel[(splits, heads, row_blocks)](
            q, keys, values, starts, lengths, places, query_places, parts, lses, logits,
            *q.stride()[:3], keys.stride(0), values.stride(0), hkv, rows, each * block_n, *factors(scale, softcap, d),
            group=group, d=d, dv=dv, placed=positions is not None, capped=softcap is not None,
            collected=mass is not None, widen=widened(q.dtype),
            block_r=block_r, block_n=block_n, block_d=block_d, block_v=block_v, num_warps=WARPS,
        )  # fmt: skip
        _join_kernel[(rows, heads)](
            parts, lses, lse if sinks is None else sinks.contiguous(), out, lse, hkv, rows, splits,
            group=group, dv=dv, sunk=sinks is not None,
            block_s=triton.next_power_of_2(splits), block_v=block_v, num_warps=WARPS,
        )  # fmt: skip
        if mass is not None and reduce is not None:
            _received_kernel[(triton.cdiv(longest, BLOCK_TOKENS), heads)](
                logits, lse, starts, lengths, mass, rows,
                reduction=REDUCTIONS[reduce], block_r=min(32, triton.next_power_of_2(rows)), block_n=BLOCK_TOKENS,
                num_warps=WARPS,
            )  # fmt: skip
    return out, mass


def tiles(d: int, dtype: torch.dtype) -> tuple[int, int]:
    """`(rows, keys)` of a tile of logits, for heads of `d` (a power of two): loads in flight fit into shared memory."""
    if dtype == torch.float32:  # exact products do not use the matrix units and need more registers
        return 16, 32 if d <= 64 else 16
    return (64, 64) if d <= 64 else (32, 64) if d <= 128 else (16, 32)


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    visibility: tuple[Tensor | None, Tensor | None],
    reduce: str | None,
) -> None:
    b, h, _, d = q.shape
    if starts.shape != lengths.shape or starts.shape[0] != b or h % starts.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not belong to heads {tuple(starts.shape)}")
    if keys.shape != (len(values), d):
        raise ValueError(
            f"keys {tuple(keys.shape)} do not belong to queries {tuple(q.shape)} and values {tuple(values.shape)}"
        )
    if q.dtype not in DTYPES or {keys.dtype, values.dtype} != {q.dtype}:
        raise ValueError(
            f"the kernels take float16, bfloat16 or float32, not {q.dtype} with {keys.dtype} and {values.dtype}"
        )
    if max(d, values.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(f"the kernels take head dims up to {MAX_HEAD_DIM}, not {d} and {values.shape[-1]}")
    if (visibility[0] is None) != (visibility[1] is None):
        raise ValueError("positions and query_positions are of use only together")
    if reduce is not None and reduce not in REDUCTIONS:
        raise ValueError(f'reduce={reduce!r} is not "sum", "max" or "square"')
