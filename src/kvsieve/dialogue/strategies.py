"""Context strategies: what a stream of frames may keep of its past when the cache is full.

A strategy holds settings only; all that belongs to one video lies in its cache. It names the policy that the cache
runs under, says when the context has to be reduced, and reduces it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from ..budgets import Tokens
from ..errors import BudgetError, DataError, PolicyError
from ..methods.streaming_llm import StreamingLLM
from ..policy import Policy
from ..protect import Protect
from ..triggers import OnRequest

if TYPE_CHECKING:
    from ..cache import SieveCache

__all__ = [
    "BaseContextStrategy",
    "DropAll",
    "DropMiddle",
    "KeepNothing",
    "SummarizeAndDrop",
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
    """False for a strategy under which every frame begins with the initial context alone, so that this can be computed
    afresh as well. Its `handle_overflow` is called at every frame, then with `initial` and `incoming` alone."""

    def __init__(
        self,
        max_seq_len: int = 4096,
        reserved_seq_len: int = 128,
        last_keep_len: int = 512,
        positions: str = "slot",
        initial: str = "user_turn",
    ) -> None:
        _check_whole("max_seq_len", max_seq_len, 1)
        _check_whole("reserved_seq_len", reserved_seq_len, 1)
        _check_whole("last_keep_len", last_keep_len, 0)
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
        """What it is called."""

    @property
    def label(self) -> str:
        """What results are filed under: the name, with the positions where they are not the default."""
        return self.name if self.positions == "slot" else f"{self.name}+{self.positions}"

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
        stays, what = self._stays(initial)
        if stays + frame >= self.ctxlen_to_reduce:
            raise BudgetError(
                f"{self.name}: a frame of {frame} tokens{what} does not fit below {self.ctxlen_to_reduce}, which is "
                f"max_seq_len={self.max_seq_len} without what is reserved (reserved_seq_len={self.reserved_seq_len}); "
                "raise max_seq_len"
            )

    def _stays(self, initial: int) -> tuple[int, str]:
        """Tokens in front of a frame after a reduction, where that is sure, and words for them."""
        return 0, ""

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

    def _stays(self, initial: int) -> tuple[int, str]:
        return initial, f" behind an initial context of {initial}"

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        if not context["initial"]:
            return None, []
        return keep_tokens(past_key_values, context["initial"]), []


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

    def _stays(self, initial: int) -> tuple[int, str]:
        return with_last(self, initial)

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        room, initial = room_for(self, **context), context["initial"]
        if room < initial:
            raise DataError(
                f"{self.name}: what comes next ({context['incoming']} tokens) does not fit beside the initial context "
                f"({initial} tokens) below max_seq_len - reserved_seq_len = {self.ctxlen_to_reduce}"
            )
        return (keep_tokens(past_key_values, room) if room else None), last_msg


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
            summary_prompt = summary_prompt.get("content", "")
        if summary_prompt is not None and not (isinstance(summary_prompt, str) and summary_prompt.strip()):
            raise PolicyError(f"summary_prompt must be a text, or a message with one, not {summary_prompt!r}")
        _check_whole("summary_max_length", summary_max_length, 1)
        self.summary_prompt, self.summary_max_length = summary_prompt, summary_max_length
        self.reserved_for_summary = summary_max_length + _most_tokens(summary_prompt or self.DEFAULT_PROMPT)
        if self.ctxlen_to_reduce < 1:
            raise BudgetError(
                f"a reply (reserved_seq_len={self.reserved_seq_len}), the request for a summary and the summary "
                f"(together {self.reserved_for_summary} with summary_max_length={summary_max_length}) leave nothing of "
                f"max_seq_len={self.max_seq_len}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        own = {"summary_prompt": self.summary_prompt, "summary_max_length": self.summary_max_length}
        return super().settings | own

    @property
    def ctxlen_to_reduce(self) -> int:
        """As of every strategy, with room for the request and the summary as well: they come after a reply, which may
        have taken all that is reserved for it."""
        return self.max_seq_len - self.reserved_seq_len - self.reserved_for_summary

    def _stays(self, initial: int) -> tuple[int, str]:
        stays = initial + self.summary_max_length
        return stays, f" behind an initial context of {initial} and summary_max_length={self.summary_max_length}"

    def handle_overflow(
        self, past_key_values: SieveCache, last_msg: list[int], **context: Any
    ) -> tuple[SieveCache | None, list[int] | str]:
        summary = context["say"](self.summary_prompt, self.summary_max_length)
        parts = (context["system_prompt"], summary, context["task_knowledge"])
        return None, context["opening"](" ".join(part for part in parts if part))


def room_for(strategy: BaseContextStrategy, initial: int, incoming: int, **context: Any) -> int:
    """Tokens that may stay so that what comes next fits."""
    return min(initial + strategy.last_keep_len, strategy.ctxlen_to_reduce - 1 - incoming)


def keep_tokens(cache: SieveCache, count: int) -> SieveCache:
    """The cache with so many tokens left in the longest head.

    Raises:
        DataError: more than that is protected.
    """
    target = count
    while True:
        try:
            cache.evict(target)
        except BudgetError as error:
            raise DataError(f"what comes next does not fit beside what has to stay: {error}") from error
        longest = max(layer.core.store.longest for layer in cache.managed)
        if longest <= count or target == 1:
            return cache
        # methods that share a budget unevenly give some heads more than the mean, which is what they were asked for
        target = max(1, min(target - 1, target * count // longest))


def with_last(strategy: BaseContextStrategy, initial: int) -> tuple[int, str]:
    """The initial context and the last tokens, see `BaseContextStrategy._stays`."""
    kept = strategy.last_keep_len
    return initial + kept, f" behind an initial context of {initial} and last_keep_len={kept}"


def _check_whole(option: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolicyError(f"{option} must be a whole number of {least} or more, not {value!r}")


def _most_tokens(text: str) -> int:
    """An upper bound on the tokens of a request, its marks included, before any tokenizer is at hand: words of most
    languages are one or two tokens, letters of scripts without spaces up to three."""
    return 2 * len(text.split()) + 3 * sum(not letter.isascii() for letter in text) + 16
