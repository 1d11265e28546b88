"""When a policy looks at a layer: the fourth answer of a `Policy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import PolicyError

if TYPE_CHECKING:
    from .view import LayerView

__all__ = [
    "AfterPrefill",
    "Between",
    "EveryForward",
    "EveryTokens",
    "OnRequest",
    "OverLength",
    "Trigger",
    "parse_trigger",
]


@dataclass(frozen=True)
class Trigger:
    """Base class. `fires` decides from counts alone, never from tensor values."""

    def fires(self, view: LayerView) -> bool:
        """Whether the layer is to be reduced now, after the attention of the forward pass in `view`."""
        raise NotImplementedError


@dataclass(frozen=True)
class AfterPrefill(Trigger):
    """After every forward pass with more than one new token: prompts, chunks of prompts, later turns."""

    def fires(self, view: LayerView) -> bool:
        return view.new > 1


@dataclass(frozen=True)
class EveryForward(Trigger):
    """After every forward pass, decode steps included."""

    def fires(self, view: LayerView) -> bool:
        return True


@dataclass(frozen=True)
class EveryTokens(Trigger):
    """Each time the number of tokens seen passes a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise PolicyError(f"a trigger needs a positive number of tokens, not {self.n}")

    def fires(self, view: LayerView) -> bool:
        return view.seen // self.n > (view.seen - view.new) // self.n


@dataclass(frozen=True)
class Between(Trigger):
    """While the number of tokens seen lies strictly between two numbers."""

    after: int
    before: int

    def fires(self, view: LayerView) -> bool:
        return self.after < view.seen < self.before


@dataclass(frozen=True)
class OverLength(Trigger):
    """When the longest head of the layer holds more than `n` tokens."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise PolicyError(f"a trigger needs a positive number of tokens, not {self.n}")

    def fires(self, view: LayerView) -> bool:
        return view.held > self.n


@dataclass(frozen=True)
class OnRequest(Trigger):
    """Never by itself: only when the host calls `SieveCache.evict`."""

    def fires(self, view: LayerView) -> bool:
        return False


def parse_trigger(when: str | Trigger) -> Trigger:
    """`"prefill"`, `"every_forward"`, `"every:N"`, `"over:N"`, `"request"`, or a `Trigger` as it is."""
    if isinstance(when, Trigger):
        return when
    head, _, number = str(when).partition(":")
    if head == "prefill" and not number:
        return AfterPrefill()
    if head == "every_forward" and not number:
        return EveryForward()
    if head == "request" and not number:
        return OnRequest()
    if head in ("every", "over") and number.isdigit():
        return (EveryTokens if head == "every" else OverLength)(int(number))
    raise PolicyError(f'when={when!r} is not one of "prefill", "every_forward", "every:N", "over:N", "request"')
