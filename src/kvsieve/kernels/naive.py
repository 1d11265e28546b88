"""Naive twins of the kernels: the same arguments and results from whole softmax matrices, for tests and for reading.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `N` stored tokens, `T` new tokens, `D` head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["attention_mass_naive", "decode_naive", "log_sum_exp_naive"]


def _logits(
    q: Tensor,
    k: Tensor,
    causal_offset: int | Tensor | None,
    scale: float | None,
    softcap: float | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """`[B, Hkv, G, T, N]`, minus infinity where a query does not see a key."""
    b, hkv, n, d = k.shape
    t = q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(1, (hkv, -1))
    logits = rows @ k.to(wide)[:, :, None].transpose(-1, -2) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    index = torch.arange(n, device=k.device).expand(b, hkv, n)
    seen = torch.ones(b, hkv, t, n, dtype=torch.bool, device=k.device)
    if lengths is not None:
        seen &= (index < lengths[..., None])[:, :, None]
    if causal_offset is not None:
        offset = torch.as_tensor(causal_offset, device=k.device).expand(b, hkv)
        last = torch.arange(t, device=k.device) + offset[..., None]
        seen &= (index if positions is None else positions)[:, :, None] <= last[..., None]
    return logits.masked_fill(~seen[:, :, None], -math.inf)


def log_sum_exp_naive(
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
    """Twin of `attention_mass.log_sum_exp`."""
    lse = _logits(q, k, causal_offset, scale, softcap, lengths, positions).logsumexp(-1).flatten(1, 2)
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])


def attention_mass_naive(
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
    """Twin of `attention_mass.attention_mass`; float64 for float64 queries."""
    b, h, t, _ = q.shape
    hkv, n = k.shape[1:3]
    logits = _logits(q, k, causal_offset, scale, softcap, lengths, positions)
    if lse is None:
        lse = log_sum_exp_naive(
            q, k, causal_offset=causal_offset, scale=scale, softcap=softcap, sinks=sinks, lengths=lengths,
            positions=positions,
        )  # fmt: skip
    total = lse.to(logits.dtype).view(b, hkv, -1, t, 1)
    p = (logits - total.masked_fill(total == -math.inf, math.inf)).exp()
    if weights is not None:
        p = p * weights.to(p.dtype).expand(b, h, t).reshape(b, hkv, -1, t, 1)
    if t == 0:
        return p.new_zeros(b, hkv, n)
    return _reduced(p, reduce)


def _reduced(p: Tensor, reduce: str) -> Tensor:
    """`[B, Hkv, G, T, N]` -> `[B, Hkv, N]`."""
    if reduce == "max":
        return p.amax((2, 3)).clamp_min(0.0)
    if reduce not in ("sum", "square"):
        raise ValueError(f'reduce={reduce!r} is not "sum", "max" or "square"')
    return (p.square() if reduce == "square" else p).sum((2, 3))


def decode_naive(
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
    """Twin of `decode.decode`, head by head."""
    b, h, t, _ = q.shape
    hkv = starts.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(b, h, t, values.shape[-1], dtype=values.dtype)
    mass = None if reduce is None else torch.zeros(keys.shape[0], dtype=wide, device=q.device)
    for i in range(b):
        for j in range(hkv):
            rows = slice(j * (h // hkv), (j + 1) * (h // hkv))
            span = slice(int(starts[i, j]), int(starts[i, j] + lengths[i, j]))
            logits = q[i, rows].to(wide) @ keys[span].to(wide).T * (q.shape[-1] ** -0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if positions is not None and query_positions is not None:
                last = query_positions.expand(b, t)[i]
                logits = logits.masked_fill(positions[span] > last[:, None], -math.inf)
            if sinks is None:
                p = logits.softmax(-1).nan_to_num(0.0)
            else:
                column = sinks[rows].to(wide).view(-1, 1, 1).expand(-1, t, 1)
                p = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
            out[i, rows] = (p @ values[span].to(wide)).to(out.dtype)
            if mass is not None and reduce is not None:
                mass[span] = _reduced(p[None, None], reduce)[0, 0]
    return out, mass
