"""`SieveCache`: a `transformers` cache whose layers stay within a policy's budget."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from . import hf
from .budgets import Budget, parse_budget
from .cache_layer import SieveLayer
from .errors import PolicyError, UnsupportedModelError, UnsupportedOperationError
from .hf_rotary import rotary_of
from .joint import LayerGroup
from .layer import KVLayer
from .measure import kept_positions, measure
from .policy import Policy
from .rope import Rotary
from .steps import StepGroup
from .triggers import EveryForward, OnRequest

__all__ = ["SieveCache", "SieveLayer"]


class SieveCache(Cache):
    """A `transformers` cache that keeps itself within a policy's budget.

    Constructing it switches this model's decoder attention to kvsieve's (other caches go on as before).

    Args:
        model: a decoder-only model, or a vision-language model with one.
        policy: what to keep, from `kvsieve.get_policy`.
        positions: `"original"`: kept keys keep their rotation. `"slot"`: gaps are closed towards the newest token, so
            that a stream can run past the length the model was trained for; keys are rotated as they are read, every
            time from the key as it came. `"contiguous"`: gaps are closed towards the oldest token, once, by `evict`;
            what comes next is to be fed with `position_ids` that begin at `next_position`. For a host that does so
            and for a policy with `when="request"`; a key is rounded once for every `evict` that moves it.

    Raises:
        UnsupportedModelError: the model has nothing that can be managed, or its rotary positions cannot be shifted.
        PolicyError: the policy does not go with these positions.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, positions: str = "original") -> None:
        if positions not in ("original", "slot", "contiguous"):
            raise PolicyError(f'positions={positions!r} is not "original", "slot" or "contiguous"')
        if not isinstance(policy, Policy):
            raise PolicyError(f"policy must be a Policy, such as get_policy('snapkv', budget=0.5), not {policy!r}")
        if positions == "contiguous" and not isinstance(policy.trigger, OnRequest):
            raise PolicyError(f'{policy.name}: positions="contiguous" needs a policy made with when="request"')
        if positions == "contiguous" and policy.scorer.wants_rope:
            raise PolicyError(f'{policy.name} reckons with the positions tokens came with; use positions="slot"')
        hf.check_model(model)
        config = hf.text_config(model)
        stock = DynamicCache(config=config).layers
        managed = [i for i, layer in enumerate(stock) if type(layer) is DynamicLayer]
        if not managed:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in stock})) or "none that are known"
            raise UnsupportedModelError(
                f"{type(model).__name__} has no full-attention layer to manage (its layers are: {kinds})"
            )
        scorer, slot = policy.scorer, positions != "original"
        rope: Rotary | None = rotary_of(model, managed, slot) if slot or scorer.wants_rope else None
        scorer.check_model(config)
        hf.enable(model)
        if scorer.wants_hidden:
            hf.hook_hidden_states(hf.attention_modules(model))
        group, steps = LayerGroup(), StepGroup()
        for rank, index in enumerate(managed):
            stock[index] = SieveLayer(KVLayer(policy, index, rank, len(managed), positions, rope, group, steps))
        super().__init__(layers=stock)
        self.policy, self.positions = policy, positions
        self._config, self._first = config, managed[0]

    @property
    def managed(self) -> list[SieveLayer]:
        """The layers under the policy."""
        return [layer for layer in self.layers if isinstance(layer, SieveLayer)]

    # ---- what the model and generation call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values of one layer; see `SieveLayer.update`."""
        if layer_idx == self._first and not hf.enabled(self._config):  # once per forward pass: asking takes its time
            raise UnsupportedOperationError(
                f"the model's attention was set to {self._config._attn_implementation!r} after this cache was made; "
                "make a new cache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, as if they had never been fed.

        Args:
            tokens_to_remove: zero or negative; or, as before transformers 5.16, the positive length to keep.

        Raises:
            UnsupportedOperationError: an eviction came after them, or the scorer has counted their attention.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding hands over a tensor in some versions
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.managed[0].core.seen, 0)
        # a layer that has evicted lately cannot go back: it has to say so before another one is changed
        for layer in sorted(self.managed, key=lambda layer: -layer.core.evicted_at):
            layer.crop(tokens_to_remove)
        others: list[Any] = [layer for layer in self.layers if not isinstance(layer, SieveLayer)]
        for other in others:
            other.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget the sequence; model and policy stay."""
        for layer in self.layers:
            if isinstance(layer, SieveLayer):
                layer.reset()
            else:
                hf.reset_stock_layer(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> SieveCache:
        """A copy that goes on independently; policy and model are shared."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    # ---- what a host calls that evicts when it sees fit

    @property
    def next_position(self) -> int:
        """Position of the next token to be fed: how many were fed; with `positions="contiguous"`, or since the last
        `rewind`, counted from what was held then."""
        core = self.managed[0].core
        return core.seen if self.positions == "original" else core.next_place

    def rewind(self) -> None:
        """For a stream of millions of tokens with `positions="slot"`: let what is held begin at position 0 again. From
        then on `position_ids` that begin at `next_position` are to be fed. Models compute angles from positions in
        float32, which are wrong where those no longer fit; a key is rounded once for every `rewind`.

        Raises:
            UnsupportedOperationError: other positions, or layers that are not managed and cannot follow.
            PolicyError: the policy reckons with keys, or with positions, as they came.
        """
        if self.positions != "slot" or len(self.managed) < len(self.layers):
            raise UnsupportedOperationError('rewind() needs positions="slot" and a model whose layers are all managed')
        if self.policy.scorer.wants_rope or self.policy.scorer.compares_keys:
            raise PolicyError(f"{self.policy.name} reckons with keys as they came, which a rewind turns")
        for layer in self.managed:
            layer.core.settle()
        self._place()

    def _place(self) -> None:
        """Close the gaps of all layers towards the oldest token, up to where the longest head of all ends."""
        cores = [layer.core for layer in self.managed]
        longest = max(core.store.longest for core in cores)
        for core in cores:
            core.place(longest)

    def label(self, segment: int | None = None, kind: Tensor | None = None) -> None:
        """Say what the tokens of the next forward pass are.

        Args:
            segment: the frame or turn they belong to.
            kind: `[T]` or `[B, T]` uint8 of `kvsieve.ledger.Kind`.
        """
        for layer in self.managed:
            layer.labels = (kind, segment)

    def evict(self, budget: Budget | float | int | str | None = None) -> None:
        """Evict now, for a policy made with `when="request"`.

        Args:
            budget: what may stay this time, as in `get_policy`; by default the policy's own.

        Raises:
            PolicyError: the policy has another trigger, which decides by itself.
            BudgetError: more than that is protected.
        """
        if not isinstance(self.policy.trigger, OnRequest):
            raise PolicyError(f'{self.policy.name} evicts by itself; make it with when="request" to say when')
        amount = self.policy.budget if budget is None else parse_budget(budget)
        now = replace(self.policy, budget=amount, trigger=EveryForward())
        cores = [layer.core for layer in self.managed]
        try:
            for core in cores:
                core.policy = now
            for core in cores:
                core.evict()
        finally:
            for core in cores:
                core.policy = self.policy
        if self.positions == "contiguous":
            self._place()

    def take_back(self) -> None:
        """Take back the last token although an eviction may have come after it, so that it can be fed again: what it
        pushed out stays out, and methods that count attention have counted it.

        A prompt is read and cut, and then its last token reads what is left. Without that, the first token to be
        generated comes from attention over everything.

        Raises:
            UnsupportedOperationError: some layers are not managed, and cannot forget a token.
        """
        if len(self.managed) < len(self.layers):
            raise UnsupportedOperationError("the layers of this model that are not managed cannot take back a token")
        for layer in self.managed:
            layer.core.crop(1, regardless=True)

    # ---- what it costs

    def report(self) -> dict[str, Any]:
        """Measured state of the cache.

        Returns:
            `method`, what `kvsieve.measure.measure` says of the managed layers (`tokens_seen`, `tokens_held`,
            `bytes_held`, `bytes_spare`, `bytes_ledger`, `bytes_full`, `compression_ratio`, `evictions`),
            `managed_layers` and `unmanaged_layers` (index and kind).
        """
        cores = [layer.core for layer in self.managed]
        return {
            "method": self.policy.name,
            **measure(cores),
            "managed_layers": [core.layer_idx for core in cores],
            "unmanaged_layers": {
                i: type(layer).__name__ for i, layer in enumerate(self.layers) if not isinstance(layer, SieveLayer)
            },
        }

    def kept_positions(self, layer: int) -> Tensor:
        """`[B, Hkv, N]` int64 original positions of what layer `layer` holds, ascending; -1 behind the last token of
        heads that hold fewer."""
        found = self.layers[layer]
        if not isinstance(found, SieveLayer):
            raise UnsupportedOperationError(f"layer {layer} is not managed ({type(found).__name__})")
        return kept_positions(found.core)

    # ---- storage

    def save(self, path: str) -> None:
        """Write the cache to one safetensors file, to go on later with `load`."""
        from .storage import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, path: str, model: PreTrainedModel, policy: Policy | None = None) -> SieveCache:
        """Read a cache written by `save` for the same model. `policy` replaces the stored one; it is needed where the
        stored policy held live objects."""
        from .storage import load_cache

        return load_cache(cls, path, model, policy)
