"""What the kernels have in common: products in base 2, loads, and how loops are split.

Shapes: `D` head dim; rows as in `attention_mass`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

__all__ = ["REDUCTIONS", "factors", "load_keys", "load_rows", "logits_base2", "side", "split", "widened"]

PROGRAMS = 512
"""Programs that a launch should have, some for each multiprocessor; loops are split until it has."""

MIN_BLOCKS = 4
"""Steps that a part of a split loop has at least."""

LOG2_E = math.log2(math.e)
REDUCTIONS = {"sum": 0, "max": 1, "square": 2}


@triton.jit
def logits_base2(a, b, factor, cap, capped: tl.constexpr, widen: tl.constexpr):
    """`a @ b.T` times `factor`, or `cap * tanh` of that, in float32."""
    if widen:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    x = tl.dot(a, tl.trans(b), input_precision="ieee") * factor
    if capped:
        small = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
        x = cap * tl.where(x < 0, -1.0, 1.0) * (1.0 - small) / (1.0 + small)
    return x


@triton.jit
def load_rows(q, rows, r, stride_h, stride_t, group: tl.constexpr, d: tl.constexpr, block_d: tl.constexpr):
    """Rows `r` of one group of heads, `[len(r), block_d]`; zero beyond the last row."""
    column = tl.arange(0, block_d)
    where = (r % group).to(tl.int64) * stride_h + (r // group).to(tl.int64) * stride_t
    return tl.load(q + where[:, None] + column[None, :], mask=(r < rows)[:, None] & (column < d)[None, :], other=0.0)


@triton.jit
def load_keys(k, length, j, stride_n, d: tl.constexpr, block_d: tl.constexpr):
    """Keys (or values) `j` of one head, `[len(j), block_d]`; zero from `length` on."""
    column = tl.arange(0, block_d)
    where = j.to(tl.int64) * stride_n
    return tl.load(k + where[:, None] + column[None, :], mask=(j < length)[:, None] & (column < d)[None, :], other=0.0)


def factors(scale: float | None, softcap: float | None, d: int) -> tuple[float, float]:
    """`(factor, cap)` of `logits_base2`."""
    scale = d**-0.5 if scale is None else scale
    return (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def side(count: int, most: int | None = None) -> int:
    """Side of a tile that has `count` rows, keys or columns to cover; matrix units take no less than 16."""
    whole = max(16, 1 << (count - 1).bit_length())
    return whole if most is None else min(most, whole)


def split(programs: int, blocks: int, most: int | None = None) -> tuple[int, int]:
    """`(parts, blocks of each)` for a loop of `blocks` steps that `programs` programs run, in at most `most` parts."""
    wanted = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(blocks, MIN_BLOCKS), blocks if most is None else most)
    each = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, each), each


def widened(dtype: torch.dtype) -> bool:
    """Whether products need float32 inputs: the interpreter holds bfloat16 as integers, and multiplies those."""
    return dtype == torch.bfloat16 and not isinstance(logits_base2, triton.JITFunction)
