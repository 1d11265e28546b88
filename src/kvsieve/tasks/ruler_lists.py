"""Tasks over a whole text, as RULER has them: chains of variables, common words, frequent coded words."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import DataError
from .ruler_fill import Draft, Drafter, Place, Writer
from .ruler_text import NOISE, Texts

__all__ = ["CommonWords", "FrequentWords", "VariableTracking"]

_SHORT = 4096
"""Below this length, word lists repeat their words less often."""


def _below(name: str, value: float, least: float) -> None:
    if value < least:
        raise DataError(f"{name} must be {least} or more, not {value}")


@dataclass(frozen=True)
class VariableTracking:
    """Which variables got a value, directly or from one another? An example with its answer comes first.

    The assignments stand in their order, in lines of noise. Defaults as published.

    Attributes:
        num_chains: chains of assignments, each from its own value; one is asked for.
        num_hops: variables of a chain after its first.
        example_lines: lines of noise in the example.
        tokens_to_generate: tokens that the answer may take.
    """

    metric: ClassVar[str] = "string_match_all"
    has_depth: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2404.06654"

    INSTRUCTION: ClassVar[str] = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    QUESTION: ClassVar[str] = "\nQuestion: Find all variables that are assigned the value {query} in the text above."
    # "assgined" is how the benchmark spells it.
    PREFIX: ClassVar[str] = (
        " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined "
        "the value {query}, they are: "
    )

    num_chains: int = 1
    num_hops: int = 4
    example_lines: int = 10
    tokens_to_generate: int = 30

    def __post_init__(self) -> None:
        _below("num_chains", self.num_chains, 1)
        _below("num_hops", self.num_hops, 1)
        _below("example_lines", self.example_lines, 0)

    @property
    def fewest(self) -> int:
        """Fewest lines of noise."""
        return self.num_hops + 1

    def draft(self, texts: Texts | None, length: int) -> Drafter:
        """What makes a sample with any number of noise lines; the arguments are not used."""

        def make(size: int, place: Place, seed: str) -> Draft:
            rng = random.Random(seed)
            writer = Writer()
            question, prefix, names = self._write(writer, rng, 3, self.example_lines, Place(rng.random()))
            writer.add(f"{question}{prefix}{' '.join(names)}\n")
            writer.evidence.clear()
            question, prefix, names = self._write(writer, rng, 5, size, place)
            return Draft(writer.text(), question, prefix, names, writer.evidence, place.depths(len(names)))

        return make

    def _write(
        self, writer: Writer, rng: random.Random, letters: int, lines: int, place: Place
    ) -> tuple[str, str, tuple[str, ...]]:
        """Write a text; returns its question, the beginning of the answer, and the answers."""
        links = self.num_hops + 1
        names = _different(rng, string.ascii_uppercase, letters, links * self.num_chains)
        values = rng.sample(range(10_000, 99_999), self.num_chains)
        needles: list[tuple[float, str, int | None]] = []
        for chain in range(self.num_chains):
            depths = place.depths(links) if chain == 0 else sorted(rng.random() for _ in range(links))
            of_chain = names[chain * links : (chain + 1) * links]
            for i, depth in enumerate(depths):
                text = f"VAR {of_chain[i]} = VAR {of_chain[i - 1]} " if i else f"VAR {of_chain[0]} = {values[chain]}"
                needles.append((depth, text, None if chain else i))
        writer.add(self.INSTRUCTION)
        writer.add_pieces([NOISE] * lines, needles, "\n")
        query, count = values[0], links
        return (
            self.QUESTION.format(query=query),
            self.PREFIX.format(query=query, count=count),
            tuple(names[:links]),
        )


@dataclass(frozen=True)
class CommonWords:
    """Which words occur most often in a numbered list? An example with its answer comes first.

    Defaults as published. Answers are all over the list, so there is no depth.

    Attributes:
        freq_cw: how often each common word occurs; 6 in texts below 4,096 tokens.
        freq_ucw: how often each other word occurs; 1 in texts below 4,096 tokens.
        num_cw: common words.
        tokens_to_generate: tokens that the answer may take.
    """

    metric: ClassVar[str] = "string_match_all"
    has_depth: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2404.06654"

    INSTRUCTION: ClassVar[str] = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    QUESTION: ClassVar[str] = "\nQuestion: What are the {num_cw} most common words in the above list?"
    PREFIX: ClassVar[str] = " Answer: The top {num_cw} words that appear most often in the list are:"

    freq_cw: int = 30
    freq_ucw: int = 3
    num_cw: int = 10
    tokens_to_generate: int = 120

    def __post_init__(self) -> None:
        _below("freq_ucw", self.freq_ucw, 1)
        _below("num_cw", self.num_cw, 1)
        _below("freq_cw", self.freq_cw, self.freq_ucw + 1)

    @property
    def fewest(self) -> int:
        """Fewest words that are not common."""
        return 1

    def draft(self, texts: Texts | None, length: int) -> Drafter:
        """What makes a sample with any number of words that are not common.

        Args:
            texts: where words come from, after a fixed list.
            length: tokens allowed, which decide how often words occur.
        """
        assert texts is not None
        short = length < _SHORT
        often, seldom = (6, 1) if short else (self.freq_cw, self.freq_ucw)
        example = (10, 3, 1) if short else (30, 10, 3)

        def make(size: int, place: Place, seed: str) -> Draft:
            rng = random.Random(seed)
            words = texts.words(2 * self.num_cw + size + example[0], rng)
            common, shown, rest = words[: self.num_cw], words[self.num_cw : 2 * self.num_cw], words[2 * self.num_cw :]
            writer = Writer()
            question, prefix = (text.format(num_cw=self.num_cw) for text in (self.QUESTION, self.PREFIX))
            self._write(writer, rng, shown, rest[: example[0]], *example[1:])
            listed = " ".join(f"{i}. {word}" for i, word in enumerate(shown, 1))
            writer.add(f"{question}{prefix} {listed}\n")
            writer.evidence.clear()
            self._write(writer, rng, common, rest[example[0] :], often, seldom)
            return Draft(writer.text(), question, prefix, tuple(common), writer.evidence)

        return make

    def _write(
        self, writer: Writer, rng: random.Random, common: Sequence[str], rest: Sequence[str], often: int, seldom: int
    ) -> None:
        entries = [(word, i) for i, word in enumerate(common)] * often + [(word, -1) for word in rest] * seldom
        rng.shuffle(entries)
        writer.add(self.INSTRUCTION)
        for number, (word, answer) in enumerate(entries, 1):
            writer.add(f"{number}. " if number == 1 else f" {number}. ")
            if answer < 0:
                writer.add(word)
            else:
                writer.add_evidence(word, answer)


@dataclass(frozen=True)
class FrequentWords:
    """Which three made-up words occur most often, apart from the dots?

    The word of rank k occurs `N * k ** -alpha / zeta(alpha)` times among `N`, rounded down; rank 1 is "...".
    Defaults as published. Answers are all over the text, so there is no depth.

    Attributes:
        alpha: how fast frequencies fall with rank; above 1, at most 4.
        coded_wordlen: letters of a word.
        tokens_to_generate: tokens that the answer may take.
    """

    metric: ClassVar[str] = "string_match_all"
    has_depth: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2404.06654"

    INSTRUCTION: ClassVar[str] = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    QUESTION: ClassVar[str] = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    PREFIX: ClassVar[str] = " Answer: According to the coded text above, the three most frequently appeared words are:"

    alpha: float = 2.0
    coded_wordlen: int = 6
    tokens_to_generate: int = 50

    def __post_init__(self) -> None:
        if not 1 < self.alpha <= 4:
            raise DataError(f"alpha must be above 1 and at most 4, not {self.alpha}")
        _below("coded_wordlen", self.coded_wordlen, 4)

    @property
    def fewest(self) -> int:
        """Fewest words in all, so that the fourth coded word is rarer than the third."""
        size = 10
        while True:
            count = self._counts(size, 5)
            if count[3] > count[4] and count[1] > count[2] > count[3]:
                return size
            size += 1

    def _counts(self, size: int, ranks: int) -> list[int]:
        shares = size / _zeta(self.alpha)
        return [int(shares * rank**-self.alpha) for rank in range(1, ranks + 1)]

    def draft(self, texts: Texts | None, length: int) -> Drafter:
        """What makes a sample of any number of words.

        Args:
            texts: not used; words are made up.
            length: tokens allowed, which decide how many different words there are.
        """
        ranks = max(5, (length - self.tokens_to_generate) // 50)

        def make(size: int, place: Place, seed: str) -> Draft:
            rng = random.Random(seed)
            words = ["...", *_different(rng, string.ascii_lowercase, self.coded_wordlen, ranks - 1)]
            counts = self._counts(size, ranks)
            text = [rank for rank, count in enumerate(counts) for _ in range(count)]
            rng.shuffle(text)
            writer = Writer()
            writer.add(self.INSTRUCTION)
            for at, rank in enumerate(text):
                writer.add(" " if at else "")
                if 1 <= rank <= 3:
                    writer.add_evidence(words[rank], rank - 1)
                else:
                    writer.add(words[rank])
            return Draft(writer.text(), self.QUESTION, self.PREFIX, tuple(words[1:4]), writer.evidence)

        return make


def _zeta(alpha: float) -> float:
    """The sum of k ** -alpha over all k from 1 on: a hundred terms, and an integral with its corrections."""
    terms = 100
    head = sum(k**-alpha for k in range(1, terms))
    return head + terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12


def _different(rng: random.Random, letters: str, length: int, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)
