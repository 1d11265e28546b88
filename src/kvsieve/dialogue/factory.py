"""Strategies by name: those of this package, every method of kvsieve, and those that users register."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..budgets import Unlimited
from ..errors import PolicyError
from ..policy import Policy, get_policy, list_methods
from ..protect import Protect
from ..scorer import SCORERS
from .strategies import (
    BaseContextStrategy,
    DropAll,
    DropMiddle,
    KeepNothing,
    SummarizeAndDrop,
    keep_tokens,
    room_for,
    with_last,
)

if TYPE_CHECKING:
    from ..cache import SieveCache

__all__ = ["ContextStrategyFactory", "PolicyStrategy", "register_strategy"]


class PolicyStrategy(BaseContextStrategy):
    """Any method of kvsieve by its name: a full cache is reduced to as many tokens as `drop_middle` would keep, and
    the method chooses which. `full` never reduces.

    Args:
        method: see `kvsieve.list_methods()`.
        protect_initial: the initial context stays whatever it scores; by default the method decides.
        **options: those of every strategy, and the method's hyper-parameters; `window_size` is at most half of
            `last_keep_len` unless given.
    """

    def __init__(self, method: str, protect_initial: bool = False, **options: Any) -> None:
        known = set(inspect.signature(BaseContextStrategy.__init__).parameters) - {"self"}
        super().__init__(**{name: value for name, value in options.items() if name in known})
        self.method, self.protect_initial = method, protect_initial
        self.hyper = {name: value for name, value in options.items() if name not in known}
        sizes = {field.name: field.default for field in fields(SCORERS[method])} if method in list_methods() else {}
        window = sizes.get("window_size")
        if isinstance(window, int):
            self.hyper.setdefault("window_size", max(1, min(window, self.last_keep_len // 2)))
        self._policy = self._made()

    def _made(self) -> Policy:
        if self.method == "full":
            return get_policy("full", **self.hyper)
        made = get_policy(self.method, budget=self.max_seq_len, when="request", **self.hyper)
        guard = made.protect
        if self.protect_initial:
            guard = Protect(guard.sink, guard.recent, guard.kinds, guard.kinds_recent, (*guard.segments, 0))
        return Policy(made.scorer, made.budget, guard, made.trigger, made.share)

    @property
    def name(self) -> str:
        return self.method

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"protect_initial": self.protect_initial} | self.hyper

    def policy(self) -> Policy:
        return self._policy

    def check(self, initial: int, frame: int) -> None:
        if not isinstance(self._policy.budget, Unlimited):
            super().check(initial, frame)

    def _stays(self, initial: int) -> tuple[int, str]:
        return with_last(self, initial)

    def should_reduce_cache(self, current_seq_len: int) -> bool:
        return not isinstance(self._policy.budget, Unlimited) and super().should_reduce_cache(current_seq_len)

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        room = room_for(self, **context)
        return (keep_tokens(past_key_values, room) if room > 0 else None), last_msg


_STRATEGIES: dict[str, Callable[..., BaseContextStrategy]] = {
    strategy.name: strategy for strategy in (KeepNothing, DropAll, DropMiddle, SummarizeAndDrop)
}


def register_strategy(name: str, strategy: type[BaseContextStrategy]) -> None:
    """Make a strategy known by name.

    Args:
        name: what to call it.
        strategy: the class; it is called with the options as keywords.

    Raises:
        PolicyError: the name is taken, the class calls itself otherwise, or it is no class of strategies.
    """
    if not (isinstance(strategy, type) and issubclass(strategy, BaseContextStrategy)):
        raise PolicyError(f"{strategy!r} is no class derived from BaseContextStrategy")
    own: Any = strategy.name
    if isinstance(own, str) and own != name:  # results are filed under it, where they would meet those of another
        raise PolicyError(f"{strategy.__name__} calls itself {own!r}; give it name = {name!r}")
    if name in ContextStrategyFactory.available() and _STRATEGIES.get(name) is not strategy:
        raise PolicyError(f"there is a strategy {name!r} already")
    _STRATEGIES[name] = strategy


class ContextStrategyFactory:
    """Makes strategies by name."""

    @staticmethod
    def available() -> list[str]:
        """All names: the strategies, then every method of kvsieve."""
        return [*_STRATEGIES, *(name for name in list_methods() if name not in _STRATEGIES)]

    @staticmethod
    def create_strategy(
        strategy_type: str,
        max_seq_len: int = 4096,
        reserved_seq_len: int = 128,
        last_keep_len: int = 512,
        **options: Any,
    ) -> BaseContextStrategy:
        """A strategy by name.

        Args:
            strategy_type: `none`, `drop_all`, `drop_middle`, `summarize_and_drop`, a method of kvsieve such as
                `snapkv`, `full`, or a registered name.
            max_seq_len: see `BaseContextStrategy`.
            reserved_seq_len: see `BaseContextStrategy`.
            last_keep_len: see `BaseContextStrategy`.
            **options: more options of `BaseContextStrategy` and of the strategy itself.

        Raises:
            PolicyError: unknown strategy or option.
            BudgetError: options that cannot be met together.
        """
        names = ContextStrategyFactory.available()
        if strategy_type not in names:
            raise PolicyError(f"Unknown context strategy: {strategy_type}. Available: {names}")
        common: dict[str, Any] = {
            "max_seq_len": max_seq_len,
            "reserved_seq_len": reserved_seq_len,
            "last_keep_len": last_keep_len,
        }
        if strategy_type in _STRATEGIES:
            cls = _STRATEGIES[strategy_type]
            known = _options(cls)
            unknown = sorted(set(options) - known)
            if unknown:
                raise PolicyError(f"{strategy_type} has no option {unknown[0]!r}; it has: {', '.join(sorted(known))}")
            made = cls(**common, **options)
        else:
            made = PolicyStrategy(strategy_type, **common, **options)
        made.check(0, 1)  # what cannot hold for the smallest frame cannot hold at all
        return made


def _options(cls: Any) -> set[str]:
    """Keywords that a class of strategies takes, those it hands on to its base included."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}
