"""Context strategies: what a stream of frames may keep of its past when the cache is full.

A strategy holds settings only; all that belongs to one video lies in its cache. It names the policy that the cache
runs under, says when the context has to be reduced, and reduces it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..budgets import Tokens, Unlimited
from ..errors import BudgetError, DataError, PolicyError
from ..methods.streaming_llm import StreamingLLM
from ..policy import Policy, get_policy, list_methods
from ..protect import Protect
from ..scorer import SCORERS
from ..triggers import OnRequest

if TYPE_CHECKING:
    from ..cache import SieveCache

__all__ = [
    "BaseContextStrategy",
    "ContextStrategyFactory",
    "DropAll",
    "DropMiddle",
    "KeepNothing",
    "PolicyStrategy",
    "SummarizeAndDrop",
    "register_strategy",
]

POSITIONS = ("slot", "original", "naive")
INITIAL = ("user_turn", "system", "first_turn")


class BaseContextStrategy(ABC):
    """What to do when the context is full. Derive from it, override `name` and `handle_overflow`, and
    `register_strategy` the class to use it by name.

    Args:
        max_seq_len: tokens that the cache never exceeds: input, replies and summaries included.
        reserved_seq_len: how many of them are kept free for a reply when something is fed.
        last_keep_len: recent tokens that a reduction keeps, for strategies that keep any.
        positions: where kept tokens stand. `"slot"`: without gaps, as if they had been the whole stream.
            `"original"`: where they came, and the stream goes on counting. `"naive"`: kept tokens stay where they were
            while new ones are counted from the length of the cache, so that old keys lie in the future of new queries;
            only to reproduce systems that do so.
        initial: what counts as the initial context: everything up to the end of the first user turn (`"user_turn"`),
            system turns (`"system"`), or the first turn with its first frame and the reply to it (`"first_turn"`).

    Raises:
        PolicyError: an option outside its range.
        BudgetError: options that cannot be met together.
    """

    needs_cache: ClassVar[bool] = True
    """False for a strategy that can do without a cache, recomputing the initial context for every frame."""

    def __init__(
        self,
        max_seq_len: int = 4096,
        reserved_seq_len: int = 128,
        last_keep_len: int = 512,
        positions: str = "slot",
        initial: str = "user_turn",
    ) -> None:
        for option, value in {"max_seq_len": max_seq_len, "reserved_seq_len": reserved_seq_len}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PolicyError(f"{option} must be a whole number above 0, not {value!r}")
        if not isinstance(last_keep_len, int) or last_keep_len < 0:
            raise PolicyError(f"last_keep_len must be a whole number, 0 or more, not {last_keep_len!r}")
        if reserved_seq_len >= max_seq_len:
            raise BudgetError(f"reserved_seq_len={reserved_seq_len} leaves nothing of max_seq_len={max_seq_len}")
        if positions not in POSITIONS:
            raise PolicyError(f"positions={positions!r} is not one of {', '.join(POSITIONS)}")
        if initial not in INITIAL:
            raise PolicyError(f"initial={initial!r} is not one of {', '.join(INITIAL)}")
        self.max_seq_len, self.reserved_seq_len, self.last_keep_len = max_seq_len, reserved_seq_len, last_keep_len
        self.positions, self.initial = positions, initial

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that results are filed under."""

    @property
    def ctxlen_to_reduce(self) -> int:
        """Length of the context, in tokens, from which it has to be reduced."""
        return self.max_seq_len - self.reserved_seq_len

    @property
    def settings(self) -> dict[str, Any]:
        """All options, as JSON values."""
        names = ("max_seq_len", "reserved_seq_len", "last_keep_len", "positions", "initial")
        return {name: getattr(self, name) for name in names}

    def policy(self) -> Policy:
        """What the cache runs under. It evicts nothing unless `handle_overflow` asks it to."""
        return Policy(StreamingLLM(n_sink=0), Tokens(self.max_seq_len), Protect(segments=(0,)), OnRequest())

    def check(self, initial: int, frame: int) -> None:
        """Refuse settings that cannot hold for a video.

        Args:
            initial: tokens of the initial context.
            frame: tokens of one frame.

        Raises:
            BudgetError: they cannot.
        """
        if frame >= self.ctxlen_to_reduce:
            raise BudgetError(
                f"{self.name}: a frame has {frame} tokens, and below max_seq_len={self.max_seq_len} there are "
                f"{self.ctxlen_to_reduce - 1} beside reserved_seq_len={self.reserved_seq_len}"
            )

    def should_reduce_cache(self, current_seq_len: int) -> bool:
        """Whether a context of this length, what is about to be fed included, has to be reduced first."""
        return current_seq_len >= self.ctxlen_to_reduce

    @abstractmethod
    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        """Reduce the context.

        Args:
            past_key_values: the cache, one sequence; `evict(n)` keeps `n` tokens, segment 0 is the initial context.
            last_msg: token ids that are not in the cache yet and go in front of what is fed next.
            **context: `initial` (tokens of the initial context), `incoming` (tokens about to be fed, `last_msg`
                included), `say(prompt, max_new_tokens)` (feeds a system line, returns the answer's text, and records it
                as a summary), `opening(text)` (a fresh context that begins with this system line), `system_prompt` and
                `task_knowledge` (texts).

        Returns:
            The cache, or None to begin with an empty one, and what is fed next in the place of `last_msg`.
        """

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({options})"


class KeepNothing(BaseContextStrategy):
    """`none`: nothing but the initial context outlives its frame."""

    name = "none"
    needs_cache = False

    def should_reduce_cache(self, current_seq_len: int) -> bool:
        return True

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        return _kept(past_key_values, context["initial"]), []


class DropAll(BaseContextStrategy):
    """`drop_all`: a full cache is emptied, the initial context with it."""

    name = "drop_all"

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        return None, last_msg


class DropMiddle(BaseContextStrategy):
    """`drop_middle`: the initial context and the last `last_keep_len` tokens stay, fewer where the initial context
    and what comes next leave no room for them."""

    name = "drop_middle"

    def check(self, initial: int, frame: int) -> None:
        super().check(initial, frame)
        _check_sum(self, initial, frame)

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        return _kept(past_key_values, _room(self, context["initial"], context["incoming"])), last_msg


class SummarizeAndDrop(BaseContextStrategy):
    """`summarize_and_drop`: the model says what has happened so far, and goes on from that alone: the system prompt,
    the summary and the task's knowledge become the new context.

    Args:
        summary_prompt: what asks for a summary, a line of the system; by default what the model was trained with, or
            the earlier system's words.
        summary_max_length: most tokens of a summary.
    """

    name = "summarize_and_drop"
    DEFAULT_PROMPT = "Watch the user's actions and track the task progress. Please summarize the progress."

    def __init__(self, *args: Any, summary_prompt: Any = None, summary_max_length: int = 512, **options: Any) -> None:
        super().__init__(*args, **options)
        if isinstance(summary_prompt, dict):
            summary_prompt = summary_prompt.get("content")
        if summary_prompt is not None and not (isinstance(summary_prompt, str) and summary_prompt.strip()):
            raise PolicyError(f"summary_prompt must be a text, or a message with one, not {summary_prompt!r}")
        if not isinstance(summary_max_length, int) or summary_max_length < 1:
            raise PolicyError(f"summary_max_length must be a whole number above 0, not {summary_max_length!r}")
        if summary_max_length >= self.max_seq_len:
            raise BudgetError(
                f"summary_max_length={summary_max_length} leaves nothing of max_seq_len={self.max_seq_len}"
            )
        self.summary_prompt, self.summary_max_length = summary_prompt, summary_max_length
        self.reserved_for_summary = summary_max_length + _words(summary_prompt or self.DEFAULT_PROMPT)

    @property
    def settings(self) -> dict[str, Any]:
        own = {"summary_prompt": self.summary_prompt, "summary_max_length": self.summary_max_length}
        return super().settings | own

    @property
    def ctxlen_to_reduce(self) -> int:
        """As of every strategy, with room for the request and the summary as well."""
        return self.max_seq_len - max(self.reserved_seq_len, self.reserved_for_summary)

    def check(self, initial: int, frame: int) -> None:
        super().check(initial, frame)
        if initial + self.summary_max_length + frame >= self.ctxlen_to_reduce:
            raise BudgetError(
                f"{self.name}: a context that begins with up to {initial} tokens and a summary of up to "
                f"{self.summary_max_length} has no room for frames of {frame} below {self.ctxlen_to_reduce} tokens; "
                "raise max_seq_len or lower summary_max_length"
            )

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        summary = context["say"](self.summary_prompt, self.summary_max_length)
        parts = (context["system_prompt"], summary, context["task_knowledge"])
        return None, context["opening"](" ".join(part for part in parts if part))


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
            _check_sum(self, initial, frame)

    def should_reduce_cache(self, current_seq_len: int) -> bool:
        return not isinstance(self._policy.budget, Unlimited) and super().should_reduce_cache(current_seq_len)

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        return _kept(past_key_values, _room(self, context["initial"], context["incoming"])), last_msg


_STRATEGIES: dict[str, Callable[..., BaseContextStrategy]] = {
    strategy.name: strategy for strategy in (KeepNothing, DropAll, DropMiddle, SummarizeAndDrop)
}


def register_strategy(name: str, strategy: type[BaseContextStrategy]) -> None:
    """Make a strategy known by name.

    Args:
        name: what to call it.
        strategy: the class; it is called with the options as keywords.

    Raises:
        PolicyError: the name is taken, or this is no class of strategies.
    """
    if not (isinstance(strategy, type) and issubclass(strategy, BaseContextStrategy)):
        raise PolicyError(f"{strategy!r} is no class derived from BaseContextStrategy")
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
        if strategy_type not in _STRATEGIES:
            return PolicyStrategy(strategy_type, **common, **options)
        cls = _STRATEGIES[strategy_type]
        known = _options(cls)
        unknown = sorted(set(options) - known) if known is not None else []
        if unknown:
            raise PolicyError(f"{strategy_type} has no option {unknown[0]!r}; it has: {', '.join(sorted(known or ()))}")
        return cls(**common, **options)


def _options(cls: Any) -> set[str] | None:
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


def _room(strategy: BaseContextStrategy, initial: int, incoming: int) -> int:
    """Tokens that may stay so that what comes next fits."""
    return min(initial + strategy.last_keep_len, strategy.ctxlen_to_reduce - 1 - incoming)


def _kept(cache: SieveCache, count: int) -> SieveCache | None:
    """The cache with so many tokens left; None for an empty one.

    Raises:
        DataError: the initial context alone is longer.
    """
    if count <= 0:
        return None
    try:
        cache.evict(count)
    except BudgetError as error:
        raise DataError(f"what comes next does not fit beside what has to stay: {error}") from error
    return cache


def _check_sum(strategy: BaseContextStrategy, initial: int, frame: int) -> None:
    need = initial + strategy.last_keep_len + frame
    if need >= strategy.ctxlen_to_reduce:
        raise BudgetError(
            f"{strategy.name}: an initial context of {initial} tokens, last_keep_len={strategy.last_keep_len} and a "
            f"frame of {frame} make {need}, which has to stay below max_seq_len - reserved_seq_len = "
            f"{strategy.ctxlen_to_reduce}; raise max_seq_len or lower last_keep_len"
        )


def _words(text: str | Sequence[str]) -> int:
    """An upper bound on the tokens of a prompt, before any tokenizer is at hand."""
    return 2 * len(str(text).split()) + 16
