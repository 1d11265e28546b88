"""Deaths of keys that are judged by the attention they receive (TOVA, H2O, observed attention).

The logits of a block of queries are computed at once; then a short loop goes through its rows, because which keys
join the softmax of a row depends on what the rows before have evicted. A step is two small matrix-vector products and
an argmin over at most the budget and one block of keys.

Shapes: `n` tokens fed, `H` query heads, `Hkv` key-value heads, `D` head dim.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention import BLOCK_BYTES, attention_mass
from ..errors import ScoreError
from ..layer import KVLayer
from ..methods.h2o import H2O
from ..methods.observed_attention import ObservedAttention
from ..methods.tova import TOVA
from ..protect import Protect
from ..scorer import Scorer
from ._deaths import Integers

__all__ = ["METHODS", "Recurrence"]

Floats = NDArray[Any]

METHODS: tuple[type[Scorer], ...] = (TOVA, H2O, ObservedAttention)
"""The scorers that this recurrence covers."""

_ROWS = 128
_LOWEST_TOTAL = 1e-6
"""Rows are scaled by the largest logit of the block, evicted keys included. Below this sum the largest one was
evicted and small probabilities are about to vanish, so the block is done again in smaller pieces."""


class Recurrence:
    """One layer of one text.

    Args:
        scorer: one of `METHODS`.
        protect: sinks and recent tokens.
        q, k: `[1, H, n, D]` and `[1, Hkv, n, D]`, rotated.
        layer: knows the scale, the softcap and the sinks of this attention.
    """

    def __init__(self, scorer: Scorer, protect: Protect, q: Tensor, k: Tensor, layer: KVLayer) -> None:
        self.protect, self.q, self.k = protect, q, k
        self.scale = q.shape[-1] ** -0.5 if layer.scale is None else layer.scale
        self.softcap, self.sinks = layer.softcap, layer.sinks
        self.sums = not isinstance(scorer, TOVA)
        self.by_age = isinstance(scorer, ObservedAttention)
        self.sets = k.shape[1] if self.sums else 1
        """How many sets of keys are kept: TOVA chooses one for all heads of a layer."""

    def deaths(self, drops: Integers) -> Tensor:
        """`[Hkv, n]` deaths when `drops[i]` keys of every head leave after step `i`.

        Raises:
            ScoreError: the logits are not finite.
        """
        heads, n = self.k.shape[1:3]
        self.death = np.full((self.sets, n), n + 1, dtype=np.int64)
        when = np.flatnonzero(drops)
        if when.size:
            start, stop = int(when[0]), int(when[-1]) + 1
            self.held = np.tile(np.arange(start), (self.sets, 1))
            self.mass = self._mass_before(start)
            while start < stop:
                room = BLOCK_BYTES // (4 * self.q.shape[1] * (self.held.shape[1] + _ROWS))
                end = min(stop, start + max(16, min(_ROWS, room)))
                self._block(start, end, drops)
                start = end
        return torch.from_numpy(self.death).to(self.k.device).expand(heads, n)

    def _mass_before(self, start: int) -> Floats:
        """`[sets, start]` attention received by the first keys from the queries before any eviction."""
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        if not start or not self.sums:
            return torch.zeros(self.sets, start, dtype=dtype).numpy()
        return attention_mass(
            self.q[:, :, :start], self.k[:, :, :start], causal_offset=0,
            scale=self.scale, softcap=self.softcap, sinks=self.sinks,
        )[0].cpu().numpy()  # fmt: skip

    @np.errstate(divide="ignore", invalid="ignore", over="ignore")
    def _block(self, start: int, end: int, drops: Integers) -> None:
        """Go through rows `start:end`: advance `held` and `mass` `[sets, N]` and fill in `death`."""
        weights, sink = self._exponentials(start, end)
        old, rows = self.held.shape[1], end - start
        shape = (self.sets, rows)
        held = np.concatenate([self.held, np.broadcast_to(np.arange(start, end), shape)], axis=1)
        mass = np.concatenate([self.mass, np.zeros(shape, self.mass.dtype)], axis=1)[:, None]
        alive = np.ones((self.sets, old + rows, 1), self.mass.dtype)
        totals = np.empty((rows, self.sets, weights.shape[1], 1), self.mass.dtype)
        low, recent, born = self.protect.sink, self.protect.recent, held.astype(self.mass.dtype)
        victims: list[tuple[int, list[int]]] = []
        for r, count in enumerate(drops[start:end].tolist()):
            width = old + r + 1
            row = weights[:, :, r, :width]
            total = np.matmul(row, alive[:, :width], out=totals[r])
            if sink is not None:
                total += sink[:, :, r]
            received = np.matmul((1 / total).transpose(0, 2, 1), row)
            ranked = mass[:, :, :width]  # infinite where evicted; zero for a method that keeps no sum
            ranked = np.add(ranked, received, out=ranked if self.sums else received)
            if not count:
                continue
            loose = ranked[:, 0, low : width - recent]
            if self.by_age:
                loose = loose / (start + r + 1 - born[:, low : width - recent])
            for _ in range(count):
                chosen = loose.argmin(1).tolist()
                victims.append((start + r + 1, chosen))
                for h, slot in enumerate(chosen):
                    loose[h, slot] = mass[h, 0, low + slot] = math.inf
                    alive[h, low + slot, 0] = 0
        if rows > 1 and totals.min() < _LOWEST_TOTAL:
            middle = (start + end) // 2
            self._block(start, middle, drops)
            self._block(middle, end, drops)
            return
        for h in range(self.sets):
            slots = np.array([chosen[h] for _, chosen in victims], dtype=np.int64)
            self.death[h, held[h, low + slots]] = [step for step, _ in victims]
        stay = alive[..., 0] > 0
        self.held, self.mass = (x[stay].reshape(self.sets, -1) for x in (held, mass[:, 0]))

    def _exponentials(self, start: int, end: int) -> tuple[Floats, Floats | None]:
        """Numerators of the softmax of rows `start:end`, `[sets, H / sets, rows, N]`, over the keys in `held` and the
        rows' own, zero where the key is later than the query; and the sink's share, `[sets, H / sets, rows, 1]`."""
        hkv, dim = self.k.shape[1], self.k.shape[-1]
        held = torch.from_numpy(self.held).to(self.k.device).expand(hkv, -1)
        keys = self.k[0].gather(1, held[..., None].expand(-1, -1, dim))
        keys = torch.cat([keys, self.k[0, :, start:end]], dim=1)
        queries = self.q[0, :, start:end] * self.scale
        logits = queries.unflatten(0, (hkv, -1)).flatten(1, 2) @ keys.transpose(1, 2)
        logits = logits.to(torch.promote_types(self.q.dtype, torch.float32)).view(-1, end - start, keys.shape[1])
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=logits.device).triu(1)
        logits[..., held.shape[1] :].masked_fill_(later, -math.inf)
        top = logits.amax(-1, keepdim=True)
        if not bool(top.isfinite().all()):
            raise ScoreError("attention logits are not finite; the model's keys or queries are probably not finite")
        sink = None
        if self.sinks is not None:
            column = self.sinks.to(logits.dtype).view(-1, 1, 1)
            top = torch.maximum(top, column)
            sink = (column - top).exp().unflatten(0, (self.sets, -1)).cpu().numpy()
        return logits.sub_(top).exp_().unflatten(0, (self.sets, -1)).cpu().numpy(), sink
