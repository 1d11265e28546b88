"""Token-by-token eviction in one parallel forward pass, exactly.

A policy that never takes a key back is one integer per key: the first query that no longer sees it (`_deaths`,
`_recurrence`). Once a layer knows these integers, all its queries can attend at once, block of queries by block of
queries, each block over the keys that are still alive for one of its rows. The scores of a layer come from the
hidden states of this same pass, which are those of the token-by-token run, so nothing is approximated.

Shapes: `n` tokens fed, `H` query heads, `Hkv` key-value heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .. import hf
from ..attention import attend
from ..budgets import Bytes, Ratio, Threshold, Tokens
from ..errors import UnsupportedModelError
from ..layer import KVLayer
from ..policy import Policy
from ..select import check_scores
from ..shares import Pyramid, Uniform
from ..triggers import EveryForward
from ..view import LayerView, Visibility
from ._deaths import drops_per_step, threshold_deaths, top_deaths
from ._layers import ParallelLayer
from ._recurrence import METHODS, Recurrence

__all__ = ["OnePassLayer", "one_pass_reason"]

BLOCK_ROWS = 128
"""Queries per block. Smaller blocks carry fewer keys that are dead for most of their rows."""


def one_pass_reason(policy: Policy, positions: str = "original") -> str | None:
    """Why one parallel pass would not be exact for this policy; `None` when it is.

    Args:
        policy: fed one token at a time.
        positions: as in `SieveCache`.
    """
    name, scorer, budget = policy.name, policy.scorer, policy.budget
    if not policy.evicts:
        return None
    if positions != "original":
        return f'with positions="{positions}" a key is rotated anew after every eviction, so no key stays the same'
    if type(policy) is not Policy:
        return f"{name} chooses by rules of its own ({type(policy).__name__})"
    if type(policy.trigger) is not EveryForward:
        return f"{name} does not decide after every token ({policy.trigger})"
    if policy.joint:
        return f"{name} cuts all layers together ({type(policy.share).__name__})"
    if type(policy.share) not in (Uniform, Pyramid):
        return (
            f"{name} lets the heads of a layer compete ({type(policy.share).__name__}), so how many keys a head keeps "
            "is not known beforehand"
        )
    if type(budget) not in (Tokens, Ratio, Bytes, Threshold):
        return f"{name} has a kind of budget that one pass does not know ({type(budget).__name__})"
    if scorer.fixed or (type(scorer) in METHODS and not isinstance(budget, Threshold)):
        return None
    return f"{name} judges a key anew at every step, from more than the attention of that step"


class OnePassLayer(ParallelLayer):
    """One managed layer: finds out when every key dies, then attends with all queries at once.

    Attributes:
        held: keys that outlive the text, over all heads.
        heads: `Hkv`.
        bytes_per_token: bytes of the key and value of one token in one head.
    """

    def __init__(self, core: KVLayer, done: Callable[[], None]) -> None:
        super().__init__(core, done)
        self.held = self.heads = self.bytes_per_token = 0

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of all queries `[1, H, n, D]`, each over what it would see token by token; `[1, n, H, Dv]`."""
        self._check_call(module, value, dropout, kwargs)
        if hf.implementation_before(module) == "sdpa":  # which leaves these out, or refuses them
            kwargs |= {"softcap": softcap, "s_aux": s_aux}
            softcap = s_aux = None
        self.core.scale, self.core.softcap, self.core.sinks = scaling, softcap, s_aux
        visibility = self._visibility(mask, query.shape[2])
        if visibility.function is not None:
            raise UnsupportedModelError(
                f"layer {self.core.layer_idx} has a mask that is not simply causal; score this model token by token "
                '(mode="token")'
            )
        death = self._deaths(query, key, value, visibility)
        self._count(death, key, value)
        first = min(int(death.min()), query.shape[2])
        q, k, v = (x[:, :, :first] for x in (query, key, value))
        if softcap is None and s_aux is None:
            out = hf.stock_sdpa(module, q, k, v, None, scaling=scaling, **kwargs)
        else:
            out = attend(q, k, v, causal_offset=0, scale=scaling, softcap=softcap, sinks=s_aux).transpose(1, 2)
        rest = masked_attention(query, key, value, death, first, scale=scaling, softcap=softcap, sinks=s_aux)
        self.hidden, self._awaiting = None, False
        self._done()
        return torch.cat([out, rest.transpose(1, 2)], dim=1)

    def _visibility(self, mask: Any, count: int) -> Visibility:
        function = None if mask is None else super()._visibility(mask, count).function
        return Visibility(0, count, function=function)

    def _deaths(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        """`[Hkv, n]`. The policy's own scorer and counts are asked; they see the text as one forward pass."""
        core, policy, n = self.core, self.core.policy, key.shape[2]
        if not policy.evicts:
            return torch.full((key.shape[1], n), n + 1, device=key.device)
        core.append(key, value)
        view = LayerView(core, query, visibility, self.hidden)
        try:
            if not policy.scorer.fixed:
                drops = drops_per_step(view, core, n)
                return Recurrence(policy.scorer, policy.protect, query, key, core).deaths(drops)
            policy.scorer.observe(view)
            scores = check_scores(policy.scorer.score(view), view.positions)[0]
            if isinstance(policy.budget, Threshold):
                return threshold_deaths(scores, policy.budget.value, policy.protect)
            return top_deaths(scores, drops_per_step(view, core, n), policy.protect)
        finally:
            core.reset()

    def _count(self, death: Tensor, key: Tensor, value: Tensor) -> None:
        """What the token-by-token run would hold and have seen."""
        self.heads, n = death.shape
        self.bytes_per_token = key.shape[-1] * key.element_size() + value.shape[-1] * value.element_size()
        self.held = int((death > n).sum())
        self.visible = int((death.clamp_max(n) - torch.arange(n, device=death.device)).sum())


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    death: Tensor,
    first: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the queries `first ..`, `[1, H, n - first, Dv]`, where query `i` sees the keys `j <= i` with
    `death[j] > i`.

    Args:
        query, key, value: `[1, H, n, D]`, `[1, Hkv, n, D]`, `[1, Hkv, n, Dv]`.
        death: `[Hkv, n]`.
        scale, softcap, sinks: as in `kvsieve.attention.attend`.
    """
    heads, n = death.shape
    group = query.shape[1] // heads
    out = query.new_zeros(1, query.shape[1], n - first, value.shape[-1])
    columns = torch.arange(first, device=death.device).expand(heads, -1)
    for s in range(first, n, BLOCK_ROWS):
        e = min(s + BLOCK_ROWS, n)
        columns = torch.cat([columns, torch.arange(s, e, device=death.device).expand(heads, -1)], dim=1)
        columns = _alive(columns, death, s)
        dies = death.gather(1, columns.clamp_max(n - 1))
        row = torch.arange(s, e, device=death.device)[:, None]
        mask = ((columns[:, None] <= row) & (dies[:, None] > row))[None]
        k, v = (x[0].gather(1, columns.clamp_max(n - 1)[..., None].expand(-1, -1, x.shape[-1]))[None]
                for x in (key, value))  # fmt: skip
        q = query[:, :, s:e]
        if softcap is None and sinks is None:
            stacked = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
            block = scaled_dot_product_attention(
                q.unflatten(1, (heads, group)).flatten(2, 3), k, v, attn_mask=stacked, scale=scale
            ).view(1, -1, e - s, v.shape[-1])  # fmt: skip
        else:
            block = attend(q, k, v, visible=_rows_of(mask), scale=scale, softcap=softcap, sinks=sinks)
        out[:, :, s - first : e - first] = block
    return out


def _alive(columns: Tensor, death: Tensor, step: int) -> Tensor:
    """`[Hkv, width]`: those of `columns` that query `step` may still see, ascending; `n` behind the last one of heads
    that have fewer."""
    n = death.shape[1]
    gone = (columns == n) | (death.gather(1, columns.clamp_max(n - 1)) <= step)
    width = int((~gone).sum(1).max())
    return columns.masked_fill(gone, n).sort(1).values[:, :width]


def _rows_of(mask: Tensor) -> Callable[[int, int], Tensor]:
    return lambda s, e: mask[:, :, s:e]
