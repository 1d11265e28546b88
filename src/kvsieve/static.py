"""`StaticSieveCache`: a cache of fixed capacity, whose decode step can be compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .budgets import Tokens
from .cache import SieveCache
from .errors import PolicyError, UnsupportedModelError, UnsupportedOperationError
from .policy import Policy
from .shares import Uniform
from .static_layer import StaticSieveLayer
from .triggers import EveryForward

__all__ = ["StaticSieveCache"]


class StaticSieveCache(SieveCache):
    """A `SieveCache` of `budget + 1` slots per head that decodes in one graph, the same for every step.

    Prompts, and whatever feeds several tokens at once, run as in `SieveCache` and break a graph. What follows one token
    at a time keeps, evicts and generates the same as there; `generate` compiles it by itself where it compiles (on a
    GPU, or with a `CompileConfig`; leave out `prefill_chunk_size`, which compiles prompts too). `reset` leaves the
    slots where they are, and what was compiled for them goes on. NaN scores cannot raise in a graph: they do when the
    cache is looked at next (`report`, `kept_positions`, the next prompt). Beams and guessed tokens move the cache out
    of its slots and back, which is exact and slow.

    Args:
        model: a decoder-only model all of whose layers attend to everything.
        policy: what to keep: a number of tokens per head, the same for all heads and layers, after every forward pass.
        positions: `"original"`; there is no other.

    Raises:
        UnsupportedModelError: the model has layers that cannot be managed.
        PolicyError: the policy needs storage that grows, or takes decisions outside of tensors.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, positions: str = "original") -> None:
        if isinstance(policy, Policy):  # what is none is refused below
            _check_policy(policy)
        if positions != "original":
            raise PolicyError(
                f"positions={positions!r} turns keys as the text grows, which a cache of fixed capacity does not do; "
                "use SieveCache"
            )
        super().__init__(model, policy, positions)
        others = self.report()["unmanaged_layers"]
        if others:
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers that kvsieve does not manage "
                f"({', '.join(sorted(set(others.values())))}) and that grow as they decode; use SieveCache"
            )
        self.layers = [StaticSieveLayer(layer.core) for layer in self.managed]

    def label(self, segment: int | None = None, kind: Tensor | None = None) -> None:
        """Not here: slots have no record of segments and kinds.

        Raises:
            UnsupportedOperationError: always.
        """
        raise UnsupportedOperationError("a cache of fixed capacity keeps no segments and kinds; use SieveCache")

    def save(self, path: str) -> None:
        """Write the cache to one safetensors file, to go on later with `load`. The next forward pass, here and there,
        must not be compiled; that of `generate` is not."""
        for layer in self.managed:
            if isinstance(layer, StaticSieveLayer):
                layer.leave()
        super().save(path)


def _check_policy(policy: Policy) -> None:
    """Raise if slots of a fixed number cannot serve this policy."""
    guard, scorer = policy.protect, policy.scorer
    reason: Any = None
    if not isinstance(policy.budget, Tokens):
        reason = f"a number of tokens, such as budget=1024, not {policy.budget}"
    elif not isinstance(policy.trigger, EveryForward):
        reason = f'eviction after every forward pass, when="every_forward", not {policy.trigger}'
    elif type(policy.share) is not Uniform:
        reason = f'the same number in every head and layer, share="uniform", not {policy.share}'
    elif guard.kinds or guard.segments:
        reason = "protection by position, such as protect=Protect(sink=4), not by kinds or segments of tokens"
    elif not scorer.tensors_only:
        reason = (
            "scores made of tensors alone, but this method decides token by token, or reads files as it scores (then "
            "hand it the object itself)"
        )
    if reason is not None:
        raise PolicyError(f"{policy.name}: a cache of fixed capacity needs {reason}; otherwise use SieveCache")
