"""A stock layer of a `transformers` cache after some of its tokens were taken out."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..cache import SieveCache
from ..errors import UnsupportedOperationError

__all__ = ["EvictedLayer", "plain_layers"]


class EvictedLayer(DynamicLayer):
    """Holds less than was fed, and goes on counting what was fed: the cache's length is where the model takes the next
    position from.

    Attributes:
        evicted: tokens taken out so far.
        settled: tokens held when the last ones were taken out.
    """

    evicted = 0
    settled = 0

    @classmethod
    def of(cls, layer: Any, index: Tensor) -> EvictedLayer:
        """`layer`, a `DynamicLayer` that holds something, with the slots `index` only."""
        thinned = cls()
        thinned.lazy_initialization(layer.keys, layer.values)
        thinned.keys, thinned.values = (x.index_select(-2, index) for x in (layer.keys, layer.values))
        thinned.settled = index.numel()
        thinned.evicted = layer.get_seq_length() - thinned.settled
        return thinned

    def get_seq_length(self) -> int:
        """Tokens fed so far."""
        return self._held() + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask. What was kept is taken to lie right before what came later, so every key is
        in the past of every later query, as it is."""
        return self._held() + query_length, self.evicted

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, but none that came before an eviction."""
        if tokens_to_remove > 0:  # as before transformers 5.16: the length to keep
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        if -tokens_to_remove > self._held() - self.settled:
            raise UnsupportedOperationError(
                f"cannot take back {-tokens_to_remove} tokens: only {self._held() - self.settled} came after the last "
                "eviction, and what was evicted before them is gone"
            )
        if tokens_to_remove and self.keys is not None and self.values is not None:
            self.keys, self.values = (x[..., :tokens_to_remove, :] for x in (self.keys, self.values))

    def reset(self) -> None:
        """Forget the sequence. Done here, since versions of `transformers` differ in what is left."""
        self.evicted = self.settled = 0
        self.keys = self.values = None
        self.is_initialized = False

    def _held(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None and self.keys.numel() else 0


def plain_layers(cache: Any) -> list[Any]:
    """The layers of a cache whose tokens can be taken out.

    Raises:
        UnsupportedOperationError: it is not such a cache.
    """
    if isinstance(cache, SieveCache):
        raise UnsupportedOperationError(
            "a SieveCache evicts by its own policy; make it with get_policy('sink_recent_uniform', ...)"
        )
    if not isinstance(cache, DynamicCache):
        raise UnsupportedOperationError(
            f"cannot evict from {type(cache).__name__}: only transformers.DynamicCache has layers that can be thinned"
        )
    layers: list[Any] = list(cache.layers)
    others = sorted({type(x).__name__ for x in layers if type(x) not in (DynamicLayer, EvictedLayer)})
    if others:
        raise UnsupportedOperationError(f"cannot evict from layers of the kind {', '.join(others)}")
    if not layers or not all(layer.is_initialized for layer in layers):
        raise UnsupportedOperationError("this cache holds nothing yet: evict after a forward pass")
    return layers
