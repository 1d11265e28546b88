"""Attention with the matrix in full: what `attention.py` is held against. Not for use on long inputs.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` stored tokens, `T` new tokens, `D` head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attend_naive", "attention_mass_naive", "probabilities_naive"]


def probabilities_naive(
    q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).repeat_interleave(group, 1).transpose(-1, -2)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    return logits.softmax(-1).nan_to_num(0.0)


def attention_mass_naive(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None = None,
    reduce: str = "sum",
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Twin of `attention_mass` that materialises the matrix; `mask` is `[B|1, H|1, T, N]` bool."""
    p = probabilities_naive(q, k, scale, mask, softcap, sinks)
    if weights is not None:
        p = p * weights[..., None]
    p = p.unflatten(1, (k.shape[1], -1))
    if reduce == "max":
        return p.amax((2, 3))
    return (p.square() if reduce == "square" else p).sum((2, 3))


def attend_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Twin of `attend` that materialises the matrix."""
    p = probabilities_naive(q, k, scale, mask, softcap, sinks)
    return (p @ v.to(p.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)).to(v.dtype)
