"""Samples of a given size: drafts that grow until the next step would not fit, with their pieces spread over depth."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .ruler_sample import Sample, Span, count_tokens

__all__ = ["Draft", "Drafter", "Place", "Writer", "check_request", "fill", "spread"]

_TRIES = 8
"""Sizes tried by estimate before the rest is found by bisection."""


@dataclass(frozen=True)
class Place:
    """Where the answer-bearing pieces of one sample go.

    Attributes:
        depth: from 0, the start of the long text, to 1, its end.
        given: the caller asked for this depth. Several pieces then start there, and the others follow at equal
            distances up to the end; otherwise each has an equal part of the text, and stands in it at `depth`.
    """

    depth: float
    given: bool = False

    def depths(self, pieces: int) -> tuple[float, ...]:
        """The depth of each of `pieces` pieces, rising."""
        if self.given:
            return tuple(self.depth + i * (1 - self.depth) / pieces for i in range(pieces))
        return tuple((self.depth + i) / pieces for i in range(pieces))


def spread(count: int, depth: float | None, seed: str) -> list[Place]:
    """Places of `count` samples: all at `depth`, or evenly from 0 to 1 in an order that the seed decides."""
    if depth is not None:
        return [Place(depth, given=True)] * count
    places = [Place(i / (count - 1) if count > 1 else 0.5) for i in range(count)]
    random.Random(seed).shuffle(places)
    return places


def evenly(depths: int | Sequence[float]) -> list[float]:
    """The depths, or so many of them evenly spread from start to end.

    Raises:
        DataError: no depths, or fewer than two to spread.
    """
    if not isinstance(depths, int):
        if not depths:
            raise DataError("at least one depth is needed, from 0 to 1")
        return list(depths)
    if depths < 2:
        raise DataError(f"depths must be 2 or more to be spread from start to end, or a list of depths, not {depths}")
    return [i / (depths - 1) for i in range(depths)]


class Writer:
    """A text that grows, and remembers where its pieces are.

    Attributes:
        evidence: what has to be read to know the answers.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self.evidence: list[Span] = []

    def add(self, text: str) -> None:
        """Add a piece that is of no interest."""
        self._parts.append(text)
        self._length += len(text)

    def __len__(self) -> int:
        return self._length

    def add_evidence(self, text: str, answer: int = -1) -> None:
        """Add a piece that has to be read, for the answer with this index."""
        self.evidence.append(Span(self._length, self._length + len(text), answer))
        self.add(text)

    def add_pieces(self, hay: Sequence[str], needles: Sequence[tuple[float, str, int | None]], separator: str) -> None:
        """Add a long text with needles in it.

        Args:
            hay: its pieces: lines, sentences or documents.
            needles: depth, text and answer index of each, -1 for a step to an answer, None for one of no interest.
                At depth 0 a needle comes before the first piece, at depth 1 after the last.
            separator: what comes between pieces.
        """
        waiting = sorted(needles, key=lambda needle: needle[0])
        first = True
        for at in range(len(hay) + 1):
            while waiting and round(waiting[0][0] * len(hay)) <= at:
                _, text, answer = waiting.pop(0)
                self.add("" if first else separator)
                first = False
                if answer is None:
                    self.add(text)
                else:
                    self.add_evidence(text, answer)
            if at < len(hay):
                self.add(hay[at] if first else separator + hay[at])
                first = False

    def text(self) -> str:
        """All pieces, joined."""
        return "".join(self._parts)


@dataclass(frozen=True)
class Draft:
    """A sample before its tokens are counted; see `Sample` for the fields."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    evidence: Sequence[Span]
    depths: tuple[float, ...] = field(default=())

    def spans(self) -> tuple[Span, ...]:
        """Every place in the evidence for an answer where an answer is written as words of its own."""
        patterns = [re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)") for answer in self.answers]
        found = {
            Span(*match.span(), i)
            for piece in self.evidence
            if piece.answer >= 0
            for i, pattern in enumerate(patterns)
            for match in pattern.finditer(self.context, piece.start, piece.end)
        }
        return tuple(sorted(found))


Drafter = Callable[[int, Place, str], Draft]
"""Makes one sample from the units of haystack wanted, a place and a seed; the needles are the same at every size."""


def check_request(length: int, count: int, depth: float | None, reserve: int) -> None:
    """Refuse numbers that no task can do anything with.

    Raises:
        DataError: `length` or `count` below 1, `depth` outside [0, 1] or `reserve` below 0.
    """
    for name, value, least in (("length", length, 1), ("count", count, 1), ("reserve", reserve, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name} must be a whole number of {least} or more, not {value!r}")
    if depth is not None and not 0 <= depth <= 1:
        raise DataError(f"depth must be from 0, the start, to 1, the end, or None for all depths, not {depth!r}")


def fill(
    task: str,
    draft: Drafter,
    tokenizer: Any,
    *,
    length: int,
    places: Sequence[Place],
    seed: int,
    reserve: int,
    fewest: int,
    most: int | None,
    tokens_to_generate: int,
    metric: str,
) -> list[Sample]:
    """One sample per place, each with as many units as fit.

    Args:
        task: its name.
        draft: makes a sample of any size.
        tokenizer: of the model that will read the samples.
        length: tokens allowed, generated ones included.
        places: one per sample.
        seed: decides everything else.
        reserve: tokens kept free, such as for a chat template.
        fewest: smallest size that makes sense.
        most: largest size there is material for; None for no limit.
        tokens_to_generate: tokens that the answer may take.
        metric: name of the metric.

    Raises:
        DataError: the smallest sample is too long; the message says what would be enough.
    """
    room = length - tokens_to_generate - reserve
    seeds = [f"{task}/{seed}/{i}" for i in range(len(places))]

    def tokens(made: Draft) -> int:
        return count_tokens(tokenizer, made.context, made.question, made.answer_prefix)

    smallest = [tokens(draft(fewest, place, key)) for place, key in zip(places, seeds, strict=True)]
    if max(smallest) > room:
        kept = f", {reserve} kept free" if reserve else ""
        raise DataError(
            f"{task} needs a length of {max(smallest) + tokens_to_generate + reserve} tokens or more with this "
            f"tokenizer ({tokens_to_generate} to generate{kept}), not {length}"
        )
    samples = []
    guess = 4 * fewest
    for i, (place, key) in enumerate(zip(places, seeds, strict=True)):

        def measure(size: int, place: Place = place, key: str = key) -> int:
            return tokens(draft(size, place, key))

        guess = _largest(measure, room, (fewest, smallest[i]), most, guess)
        made = draft(guess, place, key)
        samples.append(
            Sample(
                task=task,
                index=i,
                seed=seed,
                length=length,
                tokens=tokens(made),
                tokens_to_generate=tokens_to_generate,
                context=made.context,
                question=made.question,
                answer_prefix=made.answer_prefix,
                answers=made.answers,
                metric=metric,
                depths=made.depths,
                evidence=tuple(sorted(made.evidence)),
                spans=made.spans(),
            )
        )
    return samples


def _largest(measure: Callable[[int], int], room: int, smallest: tuple[int, int], most: int | None, guess: int) -> int:
    """The largest size that fits, found from what a unit takes on average, and by bisection where that misleads.

    Args:
        measure: tokens of a sample of some size.
        room: tokens that fit.
        smallest: a size that fits, and its tokens.
        most: largest size allowed; None for no limit.
        guess: where to begin.
    """
    low, high = smallest[0], None if most is None else most + 1
    size, tries = guess, 0
    while high is None or high - low > 1:
        size = max(low + 1, size if high is None else min(size, high - 1))
        tokens = measure(size)
        if tokens <= room:
            low = size
        else:
            high = size
        tries += 1
        if high is not None and tries > _TRIES:
            size = (low + high) // 2
            continue
        each = max((tokens - smallest[1]) / (size - smallest[0]), 0.01)
        size = min(size + math.floor((room - tokens) / each), 8 * size)
    return low
