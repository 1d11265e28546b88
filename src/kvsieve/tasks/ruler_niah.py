"""Needles in a haystack, as RULER has them: statements of a key's values, hidden in noise, in prose or among others."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import DataError
from ._words import keys
from .ruler_fill import Draft, Drafter, Place, Writer
from .ruler_text import NOISE, Texts

__all__ = ["Niah"]

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
INSTRUCTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
INSTRUCTION_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION_ONE = "\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
PREFIX_ONE = " The special magic {kind} for {query} mentioned in the provided text is"

_HAYSTACKS = ("noise", "essay", "needle")


@dataclass(frozen=True)
class Niah:
    """Parameters of a needle task; names and defaults as published.

    Attributes:
        type_haystack: `"noise"`: one line over and over; `"essay"`: prose; `"needle"`: needles with other keys.
        type_needle_k: what keys are: `"words"` (adjective-noun), `"numbers"` (7 digits) or `"uuids"`.
        type_needle_v: the same for values.
        num_needle_k: keys with needles, at least as many as are asked for.
        num_needle_v: values (needles) of each key.
        num_needle_q: keys asked for.
        tokens_to_generate: tokens that the answer may take.
    """

    metric: ClassVar[str] = "string_match_all"
    has_depth: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2404.06654"

    type_haystack: str = "noise"
    type_needle_k: str = "words"
    type_needle_v: str = "numbers"
    num_needle_k: int = 1
    num_needle_v: int = 1
    num_needle_q: int = 1
    tokens_to_generate: int = 128

    def __post_init__(self) -> None:
        if self.type_haystack not in _HAYSTACKS:
            raise DataError(f"type_haystack must be one of {', '.join(_HAYSTACKS)}, not {self.type_haystack!r}")
        for name in ("type_needle_k", "type_needle_v"):
            if getattr(self, name) not in _KINDS:
                raise DataError(f"{name} must be one of {', '.join(_KINDS)}, not {getattr(self, name)!r}")
        for name in ("num_needle_k", "num_needle_v", "num_needle_q"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be 1 or more, not {getattr(self, name)}")

    @property
    def fewest(self) -> int:
        """Smallest haystack: lines, needles, or words of prose."""
        return 20 if self.type_haystack == "essay" else 2

    def draft(self, texts: Texts | None, length: int) -> Drafter:
        """What makes a sample of any size.

        Args:
            texts: prose; needed for haystacks of essays only.
            length: not used; the needles are the same at every length.
        """

        def make(size: int, place: Place, seed: str) -> Draft:
            return self._draft(texts, size, place, random.Random(seed))

        return make

    def _draft(self, texts: Texts | None, size: int, place: Place, rng: random.Random) -> Draft:
        new_key, new_value = _KINDS[self.type_needle_k](rng), _KINDS[self.type_needle_v](rng)
        names = [next(new_key) for _ in range(max(self.num_needle_k, self.num_needle_q))]
        values = {name: [next(new_value) for _ in range(self.num_needle_v)] for name in names}
        asked = rng.sample(names, self.num_needle_q)
        answers = tuple(value for name in asked for value in values[name])

        def needle(key: str, value: str) -> str:
            return NEEDLE.format(kind=self.type_needle_v, key=key, value=value)

        wanted = [(needle(key, value), answers.index(value)) for key in asked for value in values[key]]
        rng.shuffle(wanted)
        depths = place.depths(len(wanted))
        needles: list[tuple[float, str, int | None]] = [
            (depth, text, answer) for depth, (text, answer) in zip(depths, wanted, strict=True)
        ]
        needles += [
            (rng.random(), needle(key, value), None) for key in names if key not in asked for value in values[key]
        ]
        if self.type_haystack == "noise":
            hay = [NOISE] * size
        elif self.type_haystack == "needle":
            hay = [needle(next(new_key), next(new_value)) for _ in range(size)]
        else:
            assert texts is not None
            hay = texts.take(rng.randrange(texts.starts), size)

        one = len(answers) == 1
        # Only the question and the instruction are singular; the needles never are.
        kind = self.type_needle_v[:-1] if one else self.type_needle_v
        writer = Writer()
        writer.add((INSTRUCTION_ONE if one else INSTRUCTION).format(kind=kind))
        writer.add_pieces(hay, needles, " " if self.type_haystack == "essay" else "\n")
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        return Draft(
            context=writer.text(),
            question=(QUESTION_ONE if one else QUESTION).format(kind=kind, query=query),
            answer_prefix=(PREFIX_ONE if one else PREFIX).format(kind=kind, query=query),
            answers=answers,
            evidence=writer.evidence,
            depths=depths,
        )


def _numbers(rng: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        number = str(rng.randint(1_000_000, 9_999_999))
        if number not in seen:
            seen.add(number)
            yield number


def _uuids(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


_KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {"words": keys, "numbers": _numbers, "uuids": _uuids}
