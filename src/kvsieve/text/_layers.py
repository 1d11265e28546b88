"""Cache layers that receive a whole text in one forward pass and still decide chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import hf
from ..cache_layer import SieveLayer
from ..errors import UnsupportedModelError
from ..layer import KVLayer
from ..view import Visibility

__all__ = ["ParallelLayer", "SteppedLayer"]


class ParallelLayer(SieveLayer):
    """Base: takes the keys and values of the whole text at once, and shows the model nothing but those.

    Attributes:
        visible: keys seen by a query, summed over queries and heads, the query's own token included.
    """

    def __init__(self, core: KVLayer, done: Callable[[], None]) -> None:
        core.decide_alone()  # its steps are over before the next layer begins
        super().__init__(core)
        self.visible = 0
        self._done = done

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag the tensors, so that the attention function finds this layer."""
        if self._awaiting or self.core.seen:
            raise UnsupportedModelError(
                f"layer {self.core.layer_idx} was given tokens twice in one forward pass; score this model token by "
                'token (mode="token")'
            )
        self.lazy_initialization(key_states, value_states)
        self._awaiting = True
        keys, values = key_states[:], value_states[:]
        hf.tag(keys, values, self)
        return keys, values


class SteppedLayer(ParallelLayer):
    """Walks through the text inside one layer: the same calls, on the same code, as feeding it chunk by chunk.

    Every decision of a policy is local to its layer, so the projections, the feed-forward parts and the other layers
    can run over the whole text at once.
    """

    def __init__(self, core: KVLayer, done: Callable[[], None], chunk_size: int) -> None:
        super().__init__(core, done)
        self.chunk_size = chunk_size

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attention of all queries `[1, H, n, D]`, each over what was held when it came; `[1, n, H, Dv]`."""
        self._function = None if mask is None else super()._visibility(mask, query.shape[2]).function
        hidden = self.hidden
        out = []
        for s in range(0, query.shape[2], self.chunk_size):
            rows = slice(s, s + self.chunk_size)
            if hidden is not None:
                self.hidden = hidden[:, rows]
            held, count = self.core.store.tokens, query[:, :, rows].shape[2]
            self.visible += held * count + key.shape[1] * count * (count + 1) // 2
            self._awaiting = False
            keys, values = SieveLayer.update(self, key[:, :, rows], value[:, :, rows])
            out.append(super().attention(module, query[:, :, rows], keys, values, None, *args, **kwargs))
        self._done()
        return torch.cat(out, dim=1)

    def _visibility(self, mask: Any, count: int) -> Visibility:
        return Visibility(self.core.seen - count, count, function=self._function)
