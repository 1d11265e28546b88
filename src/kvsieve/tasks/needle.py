"""A fact hidden in prose and asked for at the end, in words that the bundled mini-lm can read; and Kamradt's needle.

Statements and queries have the form that mini-lm was trained on, with its names and words, so that a model of four
million parameters finds them again and a cache that loses them shows it. Every name and word is one token of mini-lm.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from ..errors import DataError
from ..zoo import path
from .ruler_fill import Draft, Place, Writer, check_request, evenly, fill, spread
from .ruler_sample import Sample
from .ruler_text import Texts

__all__ = ["PHRASINGS", "VALUES", "generate", "grid", "kamradt", "listed"]

PHRASINGS = {
    "code": ("The code of {key} is {value}.", "What is the code of {key}?"),
    "secret": ("The secret word for {key} is {value}.", "Tell me the secret word for {key}."),
    "has": ("Remember that {key} has {value}.", "What does {key} have?"),
}
"""How a fact is stated, and the question for it. The answer begins as the statement does."""
VALUES = ("word", "number")
"""What a key can have: a word, or a number of four digits."""

_KAMRADT = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
_KAMRADT_QUESTION = "What is the best thing to do in San Francisco?"
_KAMRADT_PREFIX = "The best thing to do in San Francisco is"
_KAMRADT_ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
_FEWEST_WORDS = 8
_TOKENS = 8


@cache
def listed(name: str) -> tuple[str, ...]:
    """The names or words that mini-lm was trained on, `"names"` or `"words"`."""
    return tuple(json.loads((path("mini-lm") / "words.json").read_text(encoding="utf-8"))[name])


def generate(
    tokenizer: Any,
    length: int,
    count: int,
    *,
    needles: int = 1,
    seed: int = 42,
    depth: float | None = None,
    values: str = "word",
    phrasing: str | None = None,
    ask: bool = True,
    texts: Iterable[str] | None = None,
    reserve: int = 0,
) -> list[Sample]:
    """Facts in prose, one of which is asked for; right if the first word of the answer is its value.

    Args:
        tokenizer: of the model that will read the samples, with the interface of transformers.
        length: tokens of prompt, answer prefix and generated answer together, at most.
        count: samples to make.
        needles: facts in a text, about different people. They have different values and the same wording.
        seed: decides everything.
        depth: put the fact that is asked for here, from 0 to 1; by default depths are spread evenly over the samples.
            The other facts stand anywhere.
        values: a name in `VALUES`.
        phrasing: a name in `PHRASINGS`; by default every sample draws one.
        ask: put the question before the beginning of the answer. Without, the text simply begins the answer.
        texts: the prose; by default that of the Python language reference, which mini-lm never saw.
        reserve: tokens to keep free.

    Returns:
        `count` samples of the task `"needle_<values>_<needles>"`.

    Raises:
        DataError: a value outside its range, a length that is too short, or no prose.
    """
    check_request(length, count, depth, reserve)
    places = spread(count, depth, f"needle/{seed}")
    return _fill(tokenizer, length, places, needles, seed, values, phrasing, ask, Texts(texts), reserve)


def grid(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: int | Sequence[float] = 11,
    per_cell: int = 1,
    *,
    needles: int = 1,
    seed: int = 42,
    values: str = "word",
    phrasing: str | None = None,
    ask: bool = True,
    texts: Iterable[str] | None = None,
    reserve: int = 0,
) -> list[Sample]:
    """`per_cell` samples for every length and depth, lengths outermost; see `generate` for the rest.

    Args:
        tokenizer: of the model that will read the samples.
        lengths: tokens of prompt, answer prefix and generated answer together.
        depths: the depths, from 0 to 1, or how many of them, evenly spread.
        per_cell: samples for each pair.
        needles, seed, values, phrasing, ask, texts, reserve: see `generate`.

    Raises:
        DataError: as `generate`; or no lengths, no depths or fewer than two to spread.
    """
    if not lengths:
        raise DataError("a grid needs at least one length")
    where = evenly(depths)
    prose = Texts(texts)
    samples = []
    for length in lengths:
        for depth in where:
            check_request(length, per_cell, depth, reserve)
        places = [Place(depth, given=True) for depth in where for _ in range(per_cell)]
        samples += _fill(tokenizer, length, places, needles, seed, values, phrasing, ask, prose, reserve)
    return samples


def _fill(
    tokenizer: Any,
    length: int,
    places: Sequence[Place],
    needles: int,
    seed: int,
    values: str,
    phrasing: str | None,
    ask: bool,
    texts: Texts,
    reserve: int,
) -> list[Sample]:
    names, words = listed("names"), listed("words")
    if not 1 <= needles <= len(names):
        raise DataError(f"needles must be from 1 to {len(names)}, not {needles}")
    if values not in VALUES:
        raise DataError(f"values must be one of {', '.join(VALUES)}, not {values!r}")
    if phrasing is not None and phrasing not in PHRASINGS:
        raise DataError(f"phrasing must be one of {', '.join(PHRASINGS)}, or None for any, not {phrasing!r}")

    def draft(size: int, place: Place, key: str) -> Draft:
        rng = random.Random(key)
        statement, question = PHRASINGS[phrasing or rng.choice(sorted(PHRASINGS))]
        people = rng.sample(names, needles)
        pool = words if values == "word" else [str(number) for number in range(1000, 10_000)]
        known = rng.sample(pool, needles)
        depths = (place.depth, *(rng.random() for _ in people[1:]))
        told: list[tuple[float, str, int | None]] = [
            (where, statement.format(key=who, value=what), None if i else 0)
            for i, (where, who, what) in enumerate(zip(depths, people, known, strict=True))
        ]
        writer = Writer()
        writer.add_pieces(texts.take(rng.randrange(texts.starts), size), told, " ")
        return Draft(
            context=writer.text(),
            question=" " + question.format(key=people[0]) if ask else "",
            answer_prefix=" " + statement.partition(" {value}")[0].format(key=people[0]),
            answers=(known[0],),
            evidence=writer.evidence,
            depths=(place.depth,),
        )

    return fill(
        f"needle_{values}_{needles}",
        draft,
        tokenizer,
        length=length,
        places=places,
        seed=seed,
        reserve=reserve,
        fewest=_FEWEST_WORDS,
        most=None,
        tokens_to_generate=_TOKENS,
        metric="first_word",
    )


def kamradt(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: int | Sequence[float] = 11,
    *,
    needles: Sequence[str] = (_KAMRADT,),
    question: str = _KAMRADT_QUESTION,
    answer_prefix: str = _KAMRADT_PREFIX,
    answer: str = _KAMRADT_ANSWER,
    texts: Iterable[str] | None = None,
    reserve: int = 0,
    tokens_to_generate: int = 64,
) -> list[Sample]:
    """The needle in a haystack of G. Kamradt: one sentence in essays, one sample for every length and depth.

    The needle comes after the last sentence that ends within the given part of the text; at depth 1 it is appended.
    Several needles start at the depth and follow at equal distances up to the end. The original asks another model
    for a verdict; here the score is the share of the different words of the answer that are found in the prediction.

    Args:
        tokenizer: of the model that will read the samples.
        lengths: tokens of prompt, answer prefix and generated answer together, at most.
        depths: the depths, from 0 to 1, or how many of them, evenly spread.
        needles: the sentences to hide.
        question: what is asked about them.
        answer_prefix: how the answer begins; may be empty.
        answer: what is to be said.
        texts: the essays, put in alphabetical order of their text, so that they do not depend on the order in which
            files are found; by default the prose of the Python language reference.
        reserve: tokens to keep free.
        tokens_to_generate: tokens that the answer may take.

    Returns:
        Samples of the task `"needle_kamradt"`, lengths outermost.

    Raises:
        DataError: no lengths, depths, needles or answer, a value outside its range, or a length that is too short.
    """
    if not lengths or not needles or not answer.strip():
        raise DataError("at least one length, one needle and an answer are needed")
    if isinstance(texts, str):
        raise DataError("texts must be a list of texts, not one text; put it into a list")
    if tokens_to_generate < 1:
        raise DataError(f"tokens_to_generate must be 1 or more, not {tokens_to_generate}")
    prose = Texts(None if texts is None else sorted(texts))
    where = evenly(depths)

    def draft(size: int, place: Place, key: str) -> Draft:
        hay = prose.take(0, size)
        ends = list(accumulate(len(sentence.split()) for sentence in hay))
        found = place.depths(len(needles))
        told: list[tuple[float, str, int | None]] = []
        for depth, needle in zip(found, needles, strict=True):
            before = len(hay) if depth == 1 else bisect_right(ends, int(size * depth))
            told.append((before / len(hay), needle, 0))
        writer = Writer()
        writer.add_pieces(hay, told, " ")
        return Draft(
            context=writer.text(),
            question=f"\n\n{question}",
            answer_prefix=f" {answer_prefix}" if answer_prefix else "",
            answers=(answer,),
            evidence=writer.evidence,
            depths=found,
        )

    samples = []
    for length in lengths:
        for depth in where:
            check_request(length, 1, depth, reserve)
        samples += fill(
            "needle_kamradt",
            draft,
            tokenizer,
            length=length,
            places=[Place(depth, given=True) for depth in where],
            seed=0,
            reserve=reserve,
            fewest=_FEWEST_WORDS,
            most=None,
            tokens_to_generate=tokens_to_generate,
            metric="word_recall",
        )
    return samples
