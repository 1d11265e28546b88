"""The attention that each key receives, in two Triton kernels.

The first finds the log-sum-exp of every query row. The second walks, for every block of keys, over the rows that see
it and reduces their probabilities. Nothing of size `N x T` exists, and every program owns what it writes, so that
results do not change from run to run. Where one pass has too few programs to fill the device, its loop is split and
the parts are added up afterwards, in a fixed order.

The query heads of a group share their keys, so that they are rows of one matrix product: row `r` is token `r // G` of
head `r % G`, and a block of rows is a short stretch of tokens, which keeps the triangle of causal attention tight.
Logits are in base 2 inside the kernels.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `G = H / Hkv`, `N` stored tokens, `T` new tokens, `D` head
dim.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import DTYPES, MAX_HEAD_DIM
from .shared import REDUCTIONS, factors, load_keys, load_rows, logits_base2, side, split, widened

__all__ = ["attention_mass", "log_sum_exp"]


@triton.jit
def _head_facts(lengths, offsets, bh, n, offset, ragged: tl.constexpr, offset_per_head: tl.constexpr):
    """How many keys a head holds, and the offset of its triangle."""
    length = n
    if ragged:
        length = tl.minimum(tl.load(lengths + bh), n)
    if offset_per_head:
        offset = tl.load(offsets + bh)
    return length, offset


@triton.jit
def _lse_step(
    q_tile, k, places, start, length, last_seen, top, total, stride_kn, factor, cap,
    d: tl.constexpr, masked: tl.constexpr, causal: tl.constexpr, placed: tl.constexpr, capped: tl.constexpr,
    widen: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into the running maximum and sum of every row."""
    j = start + tl.arange(0, block_n)
    x = logits_base2(q_tile, load_keys(k, length, j, stride_kn, d, block_d), factor, cap, capped, widen)
    if masked:
        seen = (j < length)[None, :]
        if causal:
            place = j
            if placed:
                place = tl.load(places + j, mask=j < length, other=0)
            seen = seen & (place[None, :] <= last_seen[:, None])
        x = tl.where(seen, x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp2(top - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)


@triton.jit(do_not_specialize=["rows", "n", "offset"])
def _lse_kernel(
    q, k, places, lengths, offsets, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_pb, stride_ph,
    heads, rows, n, offset, span, factor, cap,
    group: tl.constexpr, d: tl.constexpr, causal: tl.constexpr, placed: tl.constexpr, ragged: tl.constexpr,
    offset_per_head: tl.constexpr, capped: tl.constexpr, widen: tl.constexpr,
    block_r: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One block of rows against the keys of one split: their log-sum-exp, `out` `[splits, B, H, T]`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the rows that see most come first
    bh = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    b, h = bh // heads, bh % heads
    k += b * stride_kb + h * stride_kh
    places += b * stride_pb + h * stride_ph
    length, offset = _head_facts(lengths, offsets, bh, n, offset, ragged, offset_per_head)

    r = block * block_r + tl.arange(0, block_r)
    q_tile = load_rows(q + b * stride_qb + h * group * stride_qh, rows, r, stride_qh, stride_qt, group, d, block_d)
    last_seen = r // group + offset
    first = split * span
    end = tl.minimum(first + span, length)
    plain_end = end
    if causal:
        if placed:
            plain_end = first
        else:
            last_row = tl.minimum(block * block_r + block_r, rows) - 1
            end = tl.minimum(end, last_row // group + offset + 1)
            plain_end = tl.minimum(end, block * block_r // group + offset + 1)
    plain_end = first + tl.maximum(plain_end - first, 0) // block_n * block_n

    top = tl.full([block_r], float("-inf"), tl.float32)
    total = tl.zeros([block_r], tl.float32)
    for start in range(first, plain_end, block_n):
        top, total = _lse_step(
            q_tile, k, places, start, length, last_seen, top, total, stride_kn, factor, cap,
            d, False, causal, placed, capped, widen, block_n, block_d,
        )  # fmt: skip
    for start in range(plain_end, end, block_n):
        top, total = _lse_step(
            q_tile, k, places, start, length, last_seen, top, total, stride_kn, factor, cap,
            d, True, causal, placed, capped, widen, block_n, block_d,
        )  # fmt: skip
    some = total > 0
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tokens = rows // group
    where = ((split * tl.num_programs(1) + bh) * group + r % group) * tokens + r // group
    tl.store(out + where, lse, mask=r < rows)


@triton.jit
def _mass_step(
    k_tile, q, lse, weights, start, rows, place, offset, mass,
    stride_qh, stride_qt, stride_lh, stride_lt, stride_wh, stride_wt, factor, cap,
    group: tl.constexpr, d: tl.constexpr, masked: tl.constexpr, weighted: tl.constexpr, reduction: tl.constexpr,
    capped: tl.constexpr, widen: tl.constexpr, block_r: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Take the probabilities of one block of rows into what the keys have received."""
    r = start + tl.arange(0, block_r)
    g, t = (r % group).to(tl.int64), (r // group).to(tl.int64)
    q_tile = load_rows(q, rows, r, stride_qh, stride_qt, group, d, block_d)
    total = tl.load(lse + g * stride_lh + t * stride_lt, mask=r < rows, other=float("inf"))
    # a row that saw nothing has probability zero everywhere, and so have rows past the last one
    total = tl.where(total == float("-inf"), float("inf"), total * 1.4426950408889634)
    x = logits_base2(k_tile, q_tile, factor, cap, capped, widen) - total[None, :]
    if masked:
        x = tl.where(place[:, None] <= (r // group + offset)[None, :], x, float("-inf"))
    p = tl.exp2(x)
    if weighted:
        p *= tl.load(weights + g * stride_wh + t * stride_wt, mask=r < rows, other=0.0)[None, :]
    if reduction == 1:
        mass = tl.maximum(mass, tl.max(p, 1))
    elif reduction == 2:
        mass += tl.sum(p * p, 1)
    else:
        mass += tl.sum(p, 1)
    return mass


@triton.jit(do_not_specialize=["rows", "n", "offset"])
def _mass_kernel(
    q, k, lse, weights, places, lengths, offsets, out,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_lb, stride_lh, stride_lt,
    stride_wb, stride_wh, stride_wt, stride_pb, stride_ph,
    heads, rows, n, offset, span, factor, cap,
    group: tl.constexpr, d: tl.constexpr, causal: tl.constexpr, placed: tl.constexpr, ragged: tl.constexpr,
    offset_per_head: tl.constexpr, weighted: tl.constexpr, reduction: tl.constexpr, capped: tl.constexpr,
    widen: tl.constexpr, block_r: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One block of keys against the rows of one split: what it receives, `out` `[splits, B, Hkv, N]`."""
    first_key = tl.program_id(0) * block_n  # the first keys are seen by most rows, and come first
    bh = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    b, h = bh // heads, bh % heads
    q += b * stride_qb + h * group * stride_qh
    lse += b * stride_lb + h * group * stride_lh
    weights += b * stride_wb + h * group * stride_wh
    length, offset = _head_facts(lengths, offsets, bh, n, offset, ragged, offset_per_head)

    j = first_key + tl.arange(0, block_n)
    place = j
    k_tile = load_keys(k + b * stride_kb + h * stride_kh, length, j, stride_kn, d, block_d)
    begin = split * span
    end = tl.where(first_key < length, tl.minimum(begin + span, rows), begin)
    plain_begin = begin
    if causal:
        oldest = first_key
        newest = tl.minimum(first_key + block_n, length) - 1
        if placed:
            place = tl.load(places + b * stride_pb + h * stride_ph + j, mask=j < length, other=0)
            oldest = tl.min(tl.where(j < length, place, 2147483647), 0)
            newest = tl.max(tl.where(j < length, place, -2147483648), 0)
        tokens = rows // group
        seen_by = tl.minimum(tl.maximum(oldest - offset, 0), tokens) * group
        seen_by_all = tl.minimum(tl.maximum(newest - offset, 0), tokens) * group
        begin = tl.maximum(begin, seen_by // block_r * block_r)
        plain_begin = tl.maximum(begin, (seen_by_all + block_r - 1) // block_r * block_r)

    mass = tl.zeros([block_n], tl.float32)
    if causal:
        for start in range(begin, tl.minimum(plain_begin, end), block_r):
            mass = _mass_step(
                k_tile, q, lse, weights, start, rows, place, offset, mass,
                stride_qh, stride_qt, stride_lh, stride_lt, stride_wh, stride_wt, factor, cap,
                group, d, True, weighted, reduction, capped, widen, block_r, block_d,
            )  # fmt: skip
    for start in range(plain_begin, end, block_r):
        mass = _mass_step(
            k_tile, q, lse, weights, start, rows, place, offset, mass,
            stride_qh, stride_qt, stride_lh, stride_lt, stride_wh, stride_wt, factor, cap,
            group, d, False, weighted, reduction, capped, widen, block_r, block_d,
        )  # fmt: skip
    where = (split * tl.num_programs(1) + bh) * n + j
    tl.store(out + where, tl.where(j < length, mass, 0.0), mask=j < n)


@torch.no_grad()
def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    causal_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """`[B, H, T]` float32: log-sum-exp of the logits of every query row, minus infinity where a row sees no key;
    arguments and errors as in `attention_mass`."""
    call = _Call(q, k, causal_offset, scale, softcap, lengths, positions)
    return call.log_sum_exp(sinks)


@torch.no_grad()
def attention_mass(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None = None,
    reduce: str = "sum",
    lse: Tensor | None = None,
    *,
    causal_offset: int | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention received by every key, reduced over query rows and over the query heads of its group.

    Args:
        q: `[B, H, T, D]` rotated queries.
        k: `[B, Hkv, N, D]` rotated keys, of the same dtype.
        weights: `[B|1, H|1, T]` weight of every query row; zero leaves a row out.
        reduce: `"sum"`, `"max"` (never below zero), or `"square"` (sum of squared weighted probabilities).
        lse: `[B, H, T]` log-sum-exp of every row, `sinks` included, when the forward pass has saved it; infinite for
            rows that saw nothing.
        causal_offset: row `i` sees the keys at positions up to `i + causal_offset`; a number, or `[B, Hkv]`. Every
            row sees every key by default.
        scale: factor on the logits, `D ** -0.5` by default.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: `[H]` logits that join the denominator but belong to no key.
        lengths: `[B, Hkv]` how many of the `N` slots hold a key; all by default. The others receive nothing.
        positions: `[B, Hkv, N]` position of every key for `causal_offset`, in any order; its slot by default.

    Returns:
        `[B, Hkv, N]` float32.

    Raises:
        ValueError: dtypes, head dims or options that the kernels do not take.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f'reduce={reduce!r} is not "sum", "max" or "square"')
    call = _Call(q, k, causal_offset, scale, softcap, lengths, positions)
    if lse is None:
        lse = call.log_sum_exp(sinks)
    return call.mass(lse, weights, REDUCTIONS[reduce])


def tiles(d: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """`(resident, streamed, warps)`: sides of a tile of logits that stays for the whole loop and that is loaded anew
    in every step, for heads of `d` (a power of two)."""
    if dtype == torch.float32:  # exact products do not use the matrix units and need more registers
        return (64, 32, 8) if d <= 64 else (32, 16, 8)
    return (128, 64, 4) if d <= 64 else (128, 64, 8) if d <= 128 else (64, 32, 4)


class _Call:
    """The arguments that both passes share, checked and laid out for the kernels."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        causal_offset: int | Tensor | None,
        scale: float | None,
        softcap: float | None,
        lengths: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        b, h, t, d = q.shape
        hkv, n = k.shape[1], k.shape[2]
        if k.shape != (b, hkv, n, d) or h % hkv:
            raise ValueError(f"queries {tuple(q.shape)} and keys {tuple(k.shape)} do not belong together")
        if q.dtype not in DTYPES or k.dtype != q.dtype:
            raise ValueError(f"the kernels take float16, bfloat16 or float32, not {q.dtype} with {k.dtype}")
        if d > MAX_HEAD_DIM:
            raise ValueError(f"the kernels take head dims up to {MAX_HEAD_DIM}, not {d}")
        if positions is not None and causal_offset is None:
            raise ValueError("positions say which keys a query sees only together with causal_offset")
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.b, self.h, self.t, self.hkv, self.n = b, h, t, hkv, n
        self.rows = h // hkv * t
        places = self.k if positions is None else positions.to(torch.int32)
        if places.stride(-1) != 1:
            places = places.contiguous()
        offsets, self.offset = self.k, 0
        if isinstance(causal_offset, Tensor):
            offsets = causal_offset.to(q.device, torch.int32).expand(b, hkv).contiguous()
        elif causal_offset is not None:
            self.offset = causal_offset
        held = self.k if lengths is None else lengths.to(q.device, torch.int32).contiguous()
        self.tensors = places, held, offsets  # the keys stand in for what a kernel will not read
        self.place_strides = places.stride()[:2]
        self.factors = factors(scale, softcap, d)
        self.options = {
            "group": h // hkv, "d": d, "causal": causal_offset is not None, "placed": positions is not None,
            "ragged": lengths is not None, "offset_per_head": isinstance(causal_offset, Tensor),
            "capped": softcap is not None, "widen": widened(q.dtype), "block_d": side(d),
        }  # fmt: skip
        self.resident, self.streamed, self.warps = tiles(self.options["block_d"], q.dtype)

    def log_sum_exp(self, sinks: Tensor | None) -> Tensor:
        out = self.q.new_full((1, self.b, self.h, self.t), -math.inf, dtype=torch.float32)
        if out.numel() and self.n:
            block_r, block_n = side(self.rows, self.resident), side(self.n, self.streamed)
            programs = triton.cdiv(self.rows, block_r), self.b * self.hkv
            splits, each = split(programs[0] * programs[1], triton.cdiv(self.n, block_n))
            grid = *programs, splits
            out = out.new_empty(splits, self.b, self.h, self.t)
            with torch.cuda.device_of(self.q):
                _lse_kernel[grid](
                    self.q, self.k, *self.tensors, out,
                    *self.q.stride()[:3], *self.k.stride()[:3], *self.place_strides,
                    self.hkv, self.rows, self.n, self.offset, each * block_n, *self.factors,
                    **self.options, block_r=block_r, block_n=block_n, num_warps=self.warps,
                )  # fmt: skip
        lse = out[0] if len(out) == 1 else out.logsumexp(0)
        return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])

    def mass(self, lse: Tensor, weights: Tensor | None, reduction: int) -> Tensor:
        b, hkv, n = self.b, self.hkv, self.n
        if not self.rows * b * hkv * n:
            return self.q.new_zeros(b, hkv, n, dtype=torch.float32)
        lse = lse.to(torch.float32).expand(b, self.h, self.t)
        rated = lse if weights is None else weights.to(torch.float32).expand(b, self.h, self.t)
        block_n, block_r = side(n, self.resident), side(self.rows, self.streamed)
        programs = triton.cdiv(n, block_n), b * hkv
        splits, each = split(programs[0] * programs[1], triton.cdiv(self.rows, block_r))
        grid = *programs, splits
        out = self.q.new_empty(splits, b, hkv, n, dtype=torch.float32)
        with torch.cuda.device_of(self.q):
            _mass_kernel[grid](
                self.q, self.k, lse, rated, *self.tensors, out,
                *self.q.stride()[:3], *self.k.stride()[:3], *lse.stride(), *rated.stride(), *self.place_strides,
                self.hkv, self.rows, n, self.offset, each * block_r, *self.factors,
                **self.options, weighted=weights is not None, reduction=reduction,
                block_r=block_r, block_n=block_n, num_warps=self.warps,
            )  # fmt: skip
        if splits == 1:
            return out[0]
        return out.amax(0) if reduction == REDUCTIONS["max"] else out.sum(0)
