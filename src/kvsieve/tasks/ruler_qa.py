"""Questions about one or two of many documents, in RULER's form: invented ones, or those of a file."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from ..errors import DataError
from ._words import FIRST_NAMES, GOODS, PROFESSIONS, invented_words
from .ruler_fill import Draft, Drafter, Place, Writer
from .ruler_sample import Span

__all__ = ["HOPS", "InventedDocuments", "Passage", "Question", "QuestionAnswering", "QuestionSource"]

HOPS = (1, 2)
"""Documents that a question may need."""


@dataclass(frozen=True)
class Passage:
    """A document.

    Attributes:
        text: what it says.
        evidence: first character and end of what has to be read in it to answer, and the index of the answer there,
            -1 for a step to it.
    """

    text: str
    evidence: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question, and the documents that answer it.

    Attributes:
        id: a name.
        text: the question.
        answers: any of these is right.
        gold: the documents with the evidence.
        near: documents that are to come before others, as they are about the same things.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[Passage, ...]
    near: tuple[str, ...] = ()


class QuestionSource(ABC):
    """Questions, and documents to hide their answers among."""

    @abstractmethod
    def question(self, index: int, rng: random.Random) -> Question:
        """The question of sample `index`."""

    @abstractmethod
    def others(self, question: Question, rng: random.Random) -> Iterator[str]:
        """Documents that do not answer the question, those nearest to it first."""

    def most(self) -> int | None:
        """Most documents besides those with the evidence; None for no limit."""
        return None


@dataclass(frozen=True)
class QuestionAnswering:
    """A question about documents; any right answer that occurs in the prediction counts.

    The original shuffles every sample of a size in the same way, so that the document with the answer always stands
    in the same place. Here its place is spread over the samples like every other depth.

    Attributes:
        hops: documents that a question needs: 1 (in the place of SQuAD) or 2 (in the place of HotpotQA).
        tokens_to_generate: tokens that the answer may take.
    """

    metric: ClassVar[str] = "string_match_part"
    has_depth: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 2404.06654; the invented documents are kvsieve's own"

    INSTRUCTION: ClassVar[str] = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nThe following are given documents.\n\n"
    )
    QUESTION: ClassVar[str] = (
        "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
        "words.\n\nQuestion: {query}"
    )
    PREFIX: ClassVar[str] = " Answer:"

    hops: int = 1
    tokens_to_generate: int = 32

    def __post_init__(self) -> None:
        if self.hops not in HOPS:
            raise DataError(f"hops must be 1 or 2, not {self.hops!r}")

    @property
    def fewest(self) -> int:
        """Fewest documents besides those with the evidence."""
        return 1

    def draft(self, source: QuestionSource) -> Drafter:
        """What makes a sample with any number of documents.

        Args:
            source: questions and documents.
        """

        def make(size: int, place: Place, seed: str) -> Draft:
            rng = random.Random(seed)
            question = source.question(int(seed.rsplit("/", 1)[1]), rng)
            gold = rng.sample(question.gold, len(question.gold))
            others = list(islice(source.others(question, rng), size))
            rng.shuffle(others)
            depths = place.depths(len(gold))
            documents: list[Passage] = [Passage(text) for text in others]
            for count, (depth, passage) in enumerate(zip(depths, gold, strict=True)):
                documents.insert(round(depth * len(others)) + count, passage)
            writer = Writer()
            writer.add(self.INSTRUCTION)
            evidence = []
            for number, document in enumerate(documents, 1):
                writer.add(f"Document {number}:\n" if number == 1 else f"\n\nDocument {number}:\n")
                at = len(writer)
                evidence += [Span(at + start, at + end, answer) for start, end, answer in document.evidence]
                writer.add(document.text)
            asked = self.QUESTION.format(query=question.text)
            return Draft(writer.text(), asked, self.PREFIX, question.answers, evidence, depths)

        return make


@dataclass(frozen=True)
class _Fact:
    """Something told of a town.

    Attributes:
        told: the sentence; `{town}` and `{value}` are filled in.
        asked: the question; `{town}` is filled in with a name or a description.
    """

    told: str
    asked: str


_FACTS = {
    "river": _Fact("It lies on the banks of the river {value}.", "On the banks of which river does {town} lie?"),
    "founder": _Fact("The first houses were built by {value}.", "Who built the first houses of {town}?"),
    "year": _Fact("Its charter dates from the year {value}.", "From which year does the charter of {town} date?"),
    "goods": _Fact(
        "Most families have made {value} for as long as anyone remembers.",
        "What have most families of {town} made for as long as anyone remembers?",
    ),
    "height": _Fact(
        "From the market it is a climb of {value} metres to the old fort.",
        "How many metres is the climb from the market of {town} to the old fort?",
    ),
    "hero": _Fact("A statue at the station shows {value}.", "Whom does the statue at the station of {town} show?"),
    "number": _Fact(
        "At the last count it had {value} inhabitants.", "How many inhabitants did {town} have at the last count?"
    ),
}


class InventedDocuments(QuestionSource):
    """Questions about invented towns and the people born there. Neither SQuAD nor HotpotQA: harder to guess.

    Every document tells the same kinds of things about another town or person, in a different order, so the answer
    can only be found in the right one. With two hops, one document says where a person was born, another tells of
    that town, and the question names the person only.

    Args:
        hops: documents that a question needs, 1 or 2.
    """

    def __init__(self, hops: int) -> None:
        self.hops = hops

    def question(self, index: int, rng: random.Random) -> Question:
        """A new question; any index will do."""
        names = _Names(rng)
        asked = rng.choice(sorted(_FACTS))
        town = names.place()
        text, where, value = self._town(rng, names, town, asked)
        gold = [Passage(text, (Span(*where, 0),))]
        query = _FACTS[asked].asked.format(town=town)
        if self.hops == 2:
            person = names.person()
            text, where = self._person(rng, person, town)
            gold.append(Passage(text, (Span(*where, -1),)))
            query = _FACTS[asked].asked.format(town=f"the town where {person} was born")
        return Question(f"invented-{index}", query, (value,), tuple(gold))

    def others(self, question: Question, rng: random.Random) -> Iterator[str]:
        """Documents about other towns and, with two hops, about people, without end."""
        names = _Names(rng, known=" ".join(passage.text for passage in question.gold))
        while True:
            if self.hops == 2 and rng.random() < 0.5:
                yield self._person(rng, names.person(), names.place())[0]
            else:
                yield self._town(rng, names, names.place(), "river")[0]

    def _town(self, rng: random.Random, names: _Names, town: str, asked: str) -> tuple[str, tuple[int, int], str]:
        """A document about a town, where in it the fact `asked` is told, and the value of that fact."""
        values = {
            "river": names.place(),
            "founder": names.person(),
            "year": str(rng.randint(1100, 1890)),
            "goods": rng.choice(GOODS),
            "height": str(rng.randint(101, 989)),
            "hero": names.person(),
            "number": str(rng.randint(10_000, 99_999)),
        }
        told = {name: _FACTS[name].told.format(value=value) for name, value in values.items()}
        order = rng.sample(sorted(told), len(told))
        opening = rng.choice(
            (f"{town} is a quiet town.", f"{town} is a small town in the hills.", f"Few travellers stop in {town}.")
        )
        heading = f"{town}\n" if self.hops == 2 else ""
        text = f"{heading}{opening} {' '.join(told[name] for name in order)}"
        at = text.index(told[asked])
        return text, (at, at + len(told[asked])), values[asked]

    @staticmethod
    def _person(rng: random.Random, person: str, town: str) -> tuple[str, tuple[int, int]]:
        """A document about a person, and where in it the place of birth is told."""
        work, hobby = rng.sample(PROFESSIONS, 2)
        born, married = rng.randint(1700, 1890), rng.randint(20, 45)
        birth = f"The place of birth was {town}, as the parish register shows."
        rest = [
            f"The year of birth is given as {born}.",
            f"Marriage followed at the age of {married}.",
            f"Friends remembered a talent that would have suited a {hobby}.",
        ]
        rng.shuffle(rest)
        rest.insert(rng.randrange(len(rest) + 1), birth)
        text = f"{person}\n{person} worked as a {work}. {' '.join(rest)}"
        at = text.index(birth)
        return text, (at, at + len(birth))


class _Names:
    """Invented names that are all different from one another and from those of a text."""

    def __init__(self, rng: random.Random, known: str = "") -> None:
        self._rng = rng
        self._words = (word.capitalize() for word in invented_words(rng) if word.capitalize() not in known)

    def place(self) -> str:
        return next(self._words)

    def person(self) -> str:
        return f"{self._rng.choice(FIRST_NAMES)} {next(self._words)}"
