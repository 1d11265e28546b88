"""What a model remembers of one stream: a managed cache, what is still to be fed, and how it is reduced."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..budgets import Unlimited
from ..cache import SieveCache
from ..errors import BudgetError, DataError
from ..ledger import KEY, VALUE, Kind
from .strategies import BaseContextStrategy
from .vlm import Picture, VisionLanguageModel

__all__ = ["Choose", "StreamContext", "greedy", "sampler"]

Choose = Callable[[Tensor], int]
"""The next token from `[vocabulary]` logits."""


def greedy(logits: Tensor) -> int:
    """The most probable token."""
    return int(logits.argmax())


def sampler(temperature: float, top_p: float, generator: torch.Generator) -> Choose:
    """Draws among the most probable tokens that make up `top_p` of the probability.

    Args:
        temperature: above 0; higher is more even.
        top_p: in (0, 1].
        generator: on the CPU.
    """

    def choose(logits: Tensor) -> int:
        share, order = (logits / temperature).softmax(-1).cpu().sort(descending=True)
        share = share.masked_fill(share.cumsum(-1) - share >= top_p, 0.0)
        return int(order[torch.multinomial(share, 1, generator=generator)])

    return choose


class StreamContext:
    """The context of one stream under one strategy.

    The tokens of the initial context are segment 0 of the cache's ledger; every frame and every line after it is a
    segment of its own, with the reply it gets.

    Args:
        vlm: the model.
        strategy: what to do when the context is full.

    Attributes:
        pending: token ids that go in front of what is fed next.
        initial: tokens of the initial context.
        closed: whether that has come to its end.
        fed: tokens fed so far.
        compressions: how often tokens were dropped because the context was full.
        largest: the most tokens that any head has held.
        bytes_largest: the most bytes that keys and values have taken.
        latest: tokens before and after the last reduction, bytes likewise, and its seconds.
    """

    def __init__(self, vlm: VisionLanguageModel, strategy: BaseContextStrategy) -> None:
        self.vlm, self.strategy = vlm, strategy
        policy = strategy.policy()
        self._endless = isinstance(policy.budget, Unlimited)
        exact = vlm.model.dtype in (torch.float32, torch.float64) and not policy.scorer.wants_rope
        moved = "contiguous" if exact else "slot"  # in half precision keys are rotated from what came, as they are read
        self.cache = SieveCache(
            vlm.model, policy, moved if strategy.positions == "slot" and not self._endless else "original"
        )
        self.pending: list[int] = []
        self.initial = self.compressions = self.largest = self.bytes_largest = self.fed = 0
        self.latest: dict[str, Any] = {}
        self.closed = False
        self._segment, self._begun = 0, False

    @property
    def length(self) -> int:
        """Tokens of the longest head of any layer."""
        return max(layer.core.store.longest for layer in self.cache.managed)

    @property
    def bytes(self) -> int:
        """Bytes behind keys and values."""
        return sum(layer.core.store.bytes_of((KEY, VALUE)) for layer in self.cache.managed)

    @property
    def limit(self) -> int:
        """Most tokens of a context that is not reduced before a reply."""
        return self.strategy.ctxlen_to_reduce - 1

    @property
    def room(self) -> int:
        """Tokens that may still be fed; without a bound for `full`."""
        return 2**31 if self._endless else self.strategy.max_seq_len - self.length

    def begin(self) -> None:
        """The next token fed is the first one of a context that opens afresh."""
        self.cache.reset()
        self.pending, self._begun, self.closed = [], False, False
        self._segment = self.initial = 0

    def opened(self, text: str) -> str:
        """Text with what opens a context in front of it, if this is the first."""
        first, self._begun = not self._begun, True
        return self.vlm.format.opening + text if first else text

    def open(self) -> None:
        """Feed what opens a context, if nothing else has: it belongs to the initial context."""
        ids = self.vlm.encode(self.opened(""))
        if ids:
            self.feed(ids)

    def close_initial(self, frame: int) -> None:
        """What has been fed is the initial context; `frame` tokens are those of one frame.

        Raises:
            BudgetError: the strategy cannot hold its settings with it.
        """
        self.initial, self.closed = self.length, True
        self.strategy.check(self.initial, frame)

    def feed(self, ids: Sequence[int], pictures: Sequence[Picture] = (), same: bool = False) -> Tensor:
        """Feed what is pending and these tokens; `[vocabulary]` logits after them.

        Args:
            ids: token ids, pictures included.
            pictures: those that stand among them.
            same: they go on with the segment of what was fed last.

        Raises:
            DataError: they do not fit.
        """
        tokens = [*self.pending, *ids]
        if len(tokens) > self.room:
            raise DataError(
                f"{len(tokens)} tokens do not fit: {self.length} of max_seq_len={self.strategy.max_seq_len} are taken"
            )
        if not same and self.closed:
            self._segment += 1
        kind = torch.tensor(tokens) == self.vlm.image_token
        self.cache.label(self._segment, kind.to(torch.uint8) * int(Kind.PATCH))
        naive = self.strategy.positions == "naive" and not self._endless
        position = self.length if naive else self.cache.next_position
        logits = self.vlm.forward(tokens, list(pictures), self.cache, position)
        self.pending = []
        self.fed += len(tokens)
        self.track()
        return logits

    def track(self) -> None:
        """Remember the largest sizes."""
        self.largest, self.bytes_largest = max(self.largest, self.length), max(self.bytes_largest, self.bytes)

    def reply(self, logits: Tensor, most: int, choose: Choose) -> list[int]:
        """Write a line that begins with the token `logits` call for. All its tokens are fed but the last, which is
        left pending, with the end of the line behind it.

        Args:
            logits: after what is answered.
            most: most tokens to write.
            choose: how to choose them.
        """
        end, out = self.vlm.format.end, []
        newline = self.vlm.encode("\n")
        picture = torch.tensor(self.vlm.image_token, device=logits.device)  # never written: there is none to go with it
        most = max(1, min(most, self.room))
        while True:
            token = choose(logits.index_fill(0, picture, -torch.inf))
            out.append(token)
            if token == end or len(out) == most:
                break
            logits = self.feed([token], same=True)
        self.pending = [out[-1], *([] if out[-1] == end else [end]), *newline]
        return out

    def opening(self, text: str) -> list[int]:
        """Begin afresh with this line of the system."""
        self.begin()
        return self.vlm.encode(self.opened(self.vlm.format.turn("system", text)))

    def forget(self) -> None:
        """Keep the initial context alone, for a strategy that begins every frame with that."""
        if self.length > self.initial:
            cache, message = self.strategy.handle_overflow(self.cache, self.pending, initial=self.initial, incoming=0)
            self._take(cache, message)

    def make_room(self, incoming: int, frame: int, **context: Any) -> bool:
        """Reduce the context if the strategy says so; whether tokens were dropped.

        Args:
            incoming: tokens about to be fed beside those pending.
            frame: tokens of one frame.
            **context: handed on to the strategy, see `BaseContextStrategy.handle_overflow`.

        Raises:
            BudgetError: the initial context does not fit.
            DataError: what comes next does not fit.
        """
        before, wide = self.length, len(self.pending) + incoming
        if not self.strategy.should_reduce_cache(before + wide) or not (self.closed or before + wide > self.limit):
            return False
        if not self.closed:
            raise BudgetError(
                f"{self.strategy.name}: the initial context ({before} tokens so far, {wide} to come) is longer "
                f"than max_seq_len={self.strategy.max_seq_len} leaves room for ({self.limit})"
            )
        if not before:
            return False
        begun, bytes_before = time.perf_counter(), self.bytes
        cache, message = self.strategy.handle_overflow(
            self.cache, self.pending, initial=self.initial, incoming=wide, opening=self.opening, **context
        )
        self._take(cache, message)
        self._check_fits(incoming)
        if not self.closed:  # the strategy has opened a new context
            self.feed([])
            self.initial, self.closed = self.length, True
            self._check_frame(frame)
        after = self.length
        dropped = cache is None or after < before
        self.compressions += dropped
        self.latest = {
            "tokens_before": before,
            "tokens_after": after,
            "bytes_before": bytes_before,
            "bytes_after": self.bytes,
            "seconds": time.perf_counter() - begun,
        }
        return dropped

    def _take(self, cache: SieveCache | None, message: list[int] | str) -> None:
        """Go on with what a strategy has left."""
        if cache is None:
            self.cache.reset()
            self.initial, self._segment = 0, int(self.closed)
        else:
            self.cache = cache
        self.pending = self.vlm.encode(message) if isinstance(message, str) else list(message)

    def _check_frame(self, frame: int) -> None:
        """Raise where no frame fits behind an initial context that a strategy has written."""
        if self.initial + frame > self.limit:
            raise BudgetError(
                f"{self.strategy.name}: the new context has {self.initial} tokens, and a frame of {frame} has no room "
                f"behind it below {self.limit + 1} tokens; raise max_seq_len"
            )

    def _check_fits(self, incoming: int) -> None:
        after = self.length
        need = after + len(self.pending) + incoming
        if need > self.strategy.max_seq_len:
            raise DataError(
                f"{self.strategy.name} has left {after} tokens, and {len(self.pending) + incoming} come next: more "
                f"than max_seq_len={self.strategy.max_seq_len}"
            )
