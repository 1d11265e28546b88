"""`SieveLayer`: what a model of `transformers` sees of one managed layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from . import attention, hf
from .attention import FEW_ROWS, Visible, attend_few
from .errors import UnsupportedModelError, UnsupportedOperationError
from .layer import KVLayer
from .ledger import KEY, VALUE
from .store import DenseStore
from .view import Visibility

__all__ = ["SieveLayer"]

_FULL_PRECISION = (torch.float32, torch.float64)


class SieveLayer(CacheLayerMixin):
    """One managed layer: the cache-layer interface of `transformers` around a `KVLayer`."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, core: KVLayer) -> None:
        super().__init__()
        self.core = core
        self.record_past = False
        self.hidden: Tensor | None = None
        self.labels: tuple[Tensor | None, int | None] = (None, None)
        self._awaiting = False

    @property
    def layer_idx(self) -> int:
        """Index among the model's layers."""
        return self.core.layer_idx

    @property
    def wants_hidden(self) -> bool:
        """Whether the scorer reads the input of the attention block."""
        return self.core.policy.scorer.wants_hidden

    # ---- what the model calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values `[B, Hkv, T, D]`; returns tensors that lead the attention back to this layer."""
        if self._awaiting:
            raise UnsupportedModelError(
                f"layer {self.core.layer_idx} received new tokens, but the attention over the last ones never came by. "
                "Either that forward pass was interrupted (then reset() the cache), or the cache was made for another "
                "model, or this model does not hand its cached keys to the attention function, so that nothing can be "
                "evicted"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.core.append(key_states, value_states, *self.labels)
        self.labels = (None, None)
        self._awaiting = True
        store = self.core.store
        dense = isinstance(store, DenseStore)
        keys = store.read(KEY) if dense else key_states[:]
        values = store.read(VALUE) if dense else value_states[:]
        hf.tag(keys, values, self)
        return keys, values

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
        """Exact attention over what is held, `[B, T, H, Dv]`; then statistics and eviction."""
        core = self.core
        self._check_call(module, value, dropout, kwargs)
        stock = hf.implementation_before(module) == "sdpa"
        if stock:  # what the stock kernel leaves out or refuses, so do statistics
            kwargs |= {"softcap": softcap, "s_aux": s_aux}
            softcap = s_aux = None
        core.scale, core.softcap, core.sinks = scaling, softcap, s_aux
        visibility = self._visibility(mask, query.shape[2])
        if visibility.start + visibility.count != core.seen:
            raise UnsupportedOperationError(
                f"layer {core.layer_idx} has seen {core.seen} tokens, but the model is at "
                f"{visibility.start + visibility.count}: an earlier forward pass was interrupted; reset() the cache"
            )
        core.mark_padding(visibility)
        offset, visible = core.visible(visibility)
        counted = bool(core.counting(visible, query, key, value)) and _best_counted(query, core.store.longest)
        if isinstance(core.store, DenseStore) and softcap is None and s_aux is None and not counted:
            keys, values = core.attended_keys(), core.store.read(VALUE)
            seen = self._mask(visibility.count, offset, visible)
            group = query.shape[1] // keys.shape[1]
            unmasked = seen is None and visibility.count > 1  # a triangle, which the stock attention sees to
            if group > 1 and not unmasked and group * visibility.count <= FEW_ROWS and kwargs.get("s_aux") is None:
                out = attend_few(query, keys, values, seen, scale=scaling).transpose(1, 2).contiguous()
            else:
                if seen is not None and seen.shape[1] > 1:
                    seen = seen.repeat_interleave(group, dim=1)
                out = hf.stock_sdpa(module, query, keys, values, seen, scaling=scaling, **kwargs)
        else:
            out = core.attend_visible(query, offset, visible).transpose(1, 2).contiguous()
        self._awaiting = False
        core.observe(query, visibility, self.hidden, hold=self.record_past)
        self.hidden = None
        return out

    def _check_call(self, module: nn.Module, value: Tensor, dropout: float, extra: dict[str, Any]) -> None:
        """Raise where the answer would not be what the caller expects."""
        if dropout or module.training:
            raise UnsupportedOperationError("a cache is for inference: call model.eval() first")
        if extra.get("output_attentions"):
            raise UnsupportedOperationError("attention weights are never formed here: leave out output_attentions=True")
        if extra.get("position_bias") is not None or getattr(value, hf.TAG, None) is not self:
            raise UnsupportedModelError(
                f"{type(module).__name__} changes its values after the cache, or adds a bias per position; neither can "
                "be carried through evictions"
            )

    def _visibility(self, mask: Any, count: int) -> Visibility:
        start = self.core.seen - count
        if mask is None:
            return Visibility(start, count)
        if isinstance(mask, hf.MaskSpec):
            return mask.visibility
        raise UnsupportedOperationError(
            "a ready-made 4-D attention mask cannot follow tokens that move; pass the 2-D mask of real tokens"
        )

    def _mask(self, count: int, offset: int | None, visible: Visible | None) -> Tensor | None:
        """What each of `count` queries sees, from what `KVLayer.visible` says: nothing where attention can do without a
        mask, else `[B|1, 1|Hkv, T, N]` bool."""
        held = self.core.store.longest
        if visible is None and (count == 1 or offset == 0):
            return None
        if visible is None:
            ones = torch.ones(count, held, dtype=torch.bool, device=self.device)
            return ones.tril(held - count)[None, None]
        mask = visible(0, count)
        return mask[:, :1] if bool((mask[:, :1] == mask).all()) else mask

    # ---- what generation calls

    def get_seq_length(self) -> int:
        """Tokens fed so far (not tokens held: positions go on)."""
        return self.core.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for masks that kvsieve does not make."""
        held = self.core.store.longest if self.core.seen else 0
        return held + query_length, self.core.seen - held

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def activate_past_recording(self) -> None:
        """Hold evictions back until `crop`, so that rejected tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens."""
        self.core.crop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget the sequence."""
        self.core.reset()
        self.is_initialized = self._awaiting = self.record_past = False
        self.hidden = None
        self.labels = (None, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.core.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.core.map_rows(torch.arange(self.core.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.core.map_rows(torch.arange(self.core.store.batch)[indices.cpu()])

    def __deepcopy__(self, memo: dict[int, Any]) -> SieveLayer:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.core, twin.hidden = copy.deepcopy(self.core, memo), None
        return twin

    def offload(self) -> None:
        raise UnsupportedOperationError("a managed layer stays on its device; lower the budget instead")

    def prefetch(self) -> None:
        raise UnsupportedOperationError("a managed layer stays on its device; lower the budget instead")


def _best_counted(query: Tensor, held: int) -> bool:
    """Whether a scorer that needs the attention of `query` `[B, H, T, D]` over `held` keys anyway is served best by an
    output from the same probabilities: for a single query, and on a processor for long prompts, where it costs a
    quarter less than the stock attention and a second pass."""
    long = query.shape[2] * held >= attention.MANY_LOGITS
    return query.shape[2] == 1 or (long and query.device.type == "cpu" and query.dtype in _FULL_PRECISION)
