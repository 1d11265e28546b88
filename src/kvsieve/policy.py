"""A policy: what a token is worth, how many stay, which never leave, when to look.

Policies are frozen: everything that belongs to one sequence lives in its cache.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import budgets as _budgets
from . import protect as _protect
from . import shares as _shares
from . import triggers as _triggers
from .budgets import Budget, Bytes, EvictRatio, OfStream, Ratio, Threshold, Tokens, Unlimited, parse_budget
from .errors import BudgetError, PolicyError
from .protect import Protect
from .scorer import SCORERS, Scorer
from .select import check_scores
from .shares import AcrossHeads, LayerVariance, Pyramid, Share, Uniform
from .triggers import AfterPrefill, EveryForward, Trigger, parse_trigger
from .view import LayerView

__all__ = ["Policy", "get_policy", "list_methods"]


@dataclass(frozen=True)
class Policy:
    """The four answers put together.

    Attributes:
        scorer: what each cached token is worth.
        budget: how many tokens may stay.
        protect: which tokens may never leave.
        trigger: when a layer is looked at.
        share: how the budget is shared over layers and heads.
    """

    scorer: Scorer
    budget: Budget = field(default_factory=Unlimited)
    protect: Protect = field(default_factory=Protect)
    trigger: Trigger = field(default_factory=EveryForward)
    share: Share = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if isinstance(self.budget, Tokens) and self.protect.smallest > self.budget.n:
            raise BudgetError(
                f"{self.name}: a budget of {self.budget.n} tokens is below what is protected "
                f"({self.protect.sink} sinks + {self.protect.recent} recent); "
                f"the smallest legal budget is {self.protect.smallest}"
            )
        if self.share.joint and not isinstance(self.budget, (Tokens, Ratio, Bytes, OfStream, Unlimited)):
            raise PolicyError(f"{self.name}: {type(self.budget).__name__} cannot be shared between layers; name tokens")
        if isinstance(self.budget, Threshold) and not isinstance(self.share, Uniform):
            raise PolicyError(f"{self.name}: a threshold decides token by token and cannot be shared ({self.share})")

    @property
    def name(self) -> str:
        """The method's name."""
        return self.scorer.name

    @property
    def evicts(self) -> bool:
        """False for a policy that never removes anything."""
        return not isinstance(self.budget, Unlimited)

    @property
    def uniform(self) -> bool:
        """Whether all heads of a layer are meant to hold the same number of tokens."""
        return self.share.uniform and not isinstance(self.budget, Threshold)

    @property
    def exact_fit(self) -> bool:
        """Whether every head of every layer holds at most one and the same number of tokens between forward passes,
        so that storage need not have spare room."""
        return type(self.share) is Uniform and isinstance(self.trigger, EveryForward)

    @property
    def joint(self) -> bool:
        """Whether the layers of a cache have to be cut together."""
        return self.share.joint and self.evicts

    def limit(self, each: int, room: int = 1) -> int | None:
        """That number, where it is known beforehand. `each`: bytes of one token in every layer, row and head; `room`:
        tokens to set aside for the next forward pass."""
        if self.exact_fit and isinstance(self.budget, Tokens):
            return self.budget.n
        if self.exact_fit and isinstance(self.budget, Bytes):
            return self.budget.tokens(each, exact=True, room=room)
        return None

    def keep(self, view: LayerView, counts: Tensor | None = None) -> Tensor | None:
        """`[B, Hkv, N]` bool of the tokens that stay, or `None` when this forward pass calls for no decision.

        Args:
            view: the layer after the forward pass.
            counts: `[B]` tokens per head, where a joint share has already decided on them.
        """
        decided = counts is not None
        if not self.evicts or not (decided or self.trigger.fires(view)):
            return view.valid if view.expires else None
        valid = view.valid
        if isinstance(self.budget, Threshold):
            scores = check_scores(self.scorer.score(view), view.positions, valid)
            return valid & (view.protected | (scores >= self.budget.value))
        counts = torch.tensor(self.count_list(view)) if counts is None else counts
        held = valid.sum(-1)
        if self.share.uniform and not bool((held.cpu() > counts[:, None]).any()):
            return valid
        protected = view.protected
        if not decided:
            counts = self._above_protection(counts, protected, view)
        view.counts = counts
        scores = check_scores(self.scorer.score(view), view.positions, valid)
        per_head = self.share.per_head(scores, valid, protected, counts)
        return self.share.choose(scores, view.positions, valid, protected, per_head)

    def count_list(self, view: LayerView) -> list[int]:
        """Tokens per head of this layer, on average over its heads, for every row."""
        if type(self.budget) is Tokens and type(self.share) is Uniform:
            return [self.budget.n] * view.positions.shape[0]
        rows = []
        for amount, seen in zip(self.budget.amounts(view), view.real_seen, strict=True):
            count = self.budget.counts(amount) if math.isfinite(amount) else seen
            rows.append(self.share.per_layer(amount, count, seen, view))
        return rows

    def _above_protection(self, counts: Tensor, protected: Tensor, view: LayerView) -> Tensor:
        """A ratio never cuts into protection (the measured rate tells); a token or byte budget must not be able to."""
        least = self.scorer.least(view)
        needed = protected.sum(-1).amax(-1).cpu().clamp_min(least)
        if isinstance(self.budget, (Ratio, EvictRatio)) or not bool((needed > counts).any()):
            return torch.maximum(counts, needed)
        smallest = int(needed.max())
        raise BudgetError(
            f"{self.name}: layer {view.layer_idx} may keep {int(counts.min())} tokens per head, but "
            f"{smallest} are {'needed' if smallest == least else 'protected'}; the smallest legal budget here is "
            f"{smallest} tokens per head in every layer"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description, read back by `Policy.from_dict`."""
        if not self.scorer.serializable:
            raise PolicyError(f"{self.name}: this scorer holds live objects; name them by path to make it storable")
        parts = [(f.name, getattr(self, f.name)) for f in fields(self)]
        out = {key: {"type": type(part).__name__, **asdict(part)} for key, part in parts}
        out["scorer"]["type"] = self.scorer.name
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        """Inverse of `to_dict`."""
        parts: dict[str, Any] = {}
        for key, entry in data.items():
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "type"}
            kind = _find(entry["type"]) if key == "scorer" else getattr(_PARTS[key], entry["type"])
            parts[key] = kind(**values)
        return cls(**parts)


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    from . import methods  # noqa: F401  (defining a method registers it)

    return sorted(SCORERS)


def _find(name: str) -> type[Scorer]:
    known = list_methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise PolicyError(f"unknown method {name!r}{hint} Known methods: {', '.join(known)}")
    return SCORERS[name]


_PARTS = {"budget": _budgets, "protect": _protect, "trigger": _triggers, "share": _shares}
_SHARES: dict[str, type[Share]] = {
    "uniform": Uniform,
    "pyramid": Pyramid,
    "across_heads": AcrossHeads,
    "layer_variance": LayerVariance,
}


def get_policy(
    name: str,
    *,
    budget: Budget | float | int | str | None = None,
    compression_ratio: float | None = None,
    threshold: float | None = None,
    window: int | None = None,
    when: str | Trigger | None = None,
    share: str | Share | None = None,
    protect: Protect | None = None,
    **hyper: Any,
) -> Policy:
    """Make a policy from a method's name.

    Args:
        name: a method, see `list_methods()`.
        budget: what is **kept**: a float is a share of the tokens seen, an int is tokens per head (on average over
            heads and layers), a string such as `"512MiB"` is bytes over all layers.
        compression_ratio: instead of `budget`: the share **removed**, in [0, 1); counts are
            `max(1, int(n * (1 - compression_ratio)))`.
        threshold: instead of `budget`: a token stays while its score is at least this.
        window: the last `window` tokens are never evicted (overrides the method's own window).
        when: `"prefill"` (default for ratios), `"every_forward"` (default otherwise), `"every:N"`, `"over:N"`,
            `"request"` (only when `SieveCache.evict` is called).
        share: `"uniform"`, `"pyramid"`, `"across_heads"`, `"layer_variance"`, or a `Share`; by default the method's
            own.
        protect: replaces the method's protection altogether.
        **hyper: the method's hyper-parameters.

    Raises:
        PolicyError: unknown method or hyper-parameter, or a value outside its range.
        BudgetError: a budget below what is protected, or no budget for a method that needs one.
    """
    cls = _find(name)
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(hyper) - known)
    if unknown:
        allowed = ", ".join(sorted(known)) or "none"
        raise PolicyError(f"{name} has no hyper-parameter {unknown[0]!r}; it has: {allowed}")
    scorer = cls(**hyper)
    amount = _amount(scorer, budget, compression_ratio, threshold)
    guard = scorer.default_protect() if protect is None else protect
    if window is not None:
        guard = replace(guard, recent=window)
    if when is None:
        when = AfterPrefill() if isinstance(amount, Ratio) else EveryForward()
    return Policy(scorer, amount, guard, parse_trigger(when), _share(scorer, share, amount))


def _amount(
    scorer: Scorer,
    budget: Budget | float | int | str | None,
    compression_ratio: float | None,
    threshold: float | None,
) -> Budget:
    given = [k for k, v in (("budget", budget), ("compression_ratio", compression_ratio), ("threshold", threshold))
             if v is not None]  # fmt: skip
    if len(given) > 1:
        raise PolicyError(f"{scorer.name}: give only one of {' and '.join(given)}")
    if threshold is not None:
        return Threshold(float(threshold))
    if compression_ratio is not None:
        if not 0.0 <= compression_ratio < 1.0:
            raise BudgetError(f"compression_ratio is the share removed and must lie in [0, 1), not {compression_ratio}")
        return Ratio(1 - compression_ratio)
    default = scorer.default_budget()
    if budget is None and default is None:
        raise BudgetError(
            f"{scorer.name} needs a budget: budget=0.5 (share kept), budget=1024 (tokens) or budget='512MiB'"
        )
    return default if budget is None and default is not None else parse_budget(budget)


def _share(scorer: Scorer, share: str | Share | None, amount: Budget) -> Share:
    if share is None:
        return Uniform() if isinstance(amount, Threshold) else scorer.default_share()
    if isinstance(share, Share):
        return share
    if share not in _SHARES:
        raise PolicyError(f"share={share!r} is not one of {', '.join(sorted(_SHARES))}")
    return _SHARES[share]()
