"""What needles are hidden in: repeated sentences, or sentences of real texts; and the words of word lists."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import cache
from itertools import islice

from ..errors import DataError
from ..text.data import python_reference
from ._words import ADJECTIVES, NOUNS, invented_words

__all__ = ["NOISE", "Texts", "sentences"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The line that haystacks of noise repeat."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_LOWER = re.compile(r"\b[a-z]{4,12}\b")
_FEWEST_WORDS = 8
_LETTERS = 0.93


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space inside them made single spaces."""
    return [sentence for sentence in _SENTENCE_END.split(" ".join(text.split())) if sentence]


class Texts:
    """Prose to hide needles in.

    Args:
        texts: the texts, used in their order and from the start again when they run out; by default the prose
            paragraphs of the Python language reference that comes with this interpreter: some 24,000 words without
            code, tables or headings, which the bundled mini-lm never saw.

    Raises:
        DataError: there is no text, or this Python comes without its reference.
    """

    def __init__(self, texts: Iterable[str] | None = None) -> None:
        if isinstance(texts, str):
            raise DataError("texts must be a list of texts, not one text; put it into a list")
        self.sentences = list(_reference()) if texts is None else [s for text in texts for s in sentences(text)]
        if not self.sentences:
            raise DataError("texts holds no words; give at least one text, or None for the Python language reference")
        self._vocabulary: list[str] | None = None
        self._words = [len(sentence.split()) for sentence in self.sentences]

    @property
    def starts(self) -> int:
        """Sentences that a haystack can start with."""
        return len(self.sentences)

    def take(self, start: int, words: int) -> list[str]:
        """The sentences from number `start` on, `words` words in all; the last one may be cut."""
        taken = []
        at = start
        while words > 0:
            sentence, size = self.sentences[at], self._words[at]
            taken.append(sentence if size <= words else " ".join(sentence.split()[:words]))
            words -= size
            at = (at + 1) % len(self.sentences)
        return taken

    def words(self, count: int, rng: random.Random) -> list[str]:
        """`count` different words in random order; when real ones run out, invented ones follow them.

        A longer list begins like a shorter one from the same random state.
        """
        if self._vocabulary is None:
            listed = {word for sentence in self.sentences for word in _LOWER.findall(sentence)}
            self._vocabulary = sorted(listed.union(ADJECTIVES, NOUNS))
        words = list(self._vocabulary)
        rng.shuffle(words)
        known = set(words)
        invented = (word for word in invented_words(rng) if word not in known)
        return [*words[:count], *islice(invented, max(0, count - len(words)))]


@cache
def _reference() -> tuple[str, ...]:
    """Sentences of the Python language reference, from paragraphs that are prose."""
    found = []
    for document in python_reference(min_chars=1):
        for paragraph in re.split(r"\n\s*\n", document.text):
            plain = " ".join(paragraph.split())
            letters = sum(character.isalpha() or character in " ,.'" for character in plain)
            if (
                plain[:1].isupper()
                and plain.endswith(".")
                and len(plain.split()) >= _FEWEST_WORDS
                and letters >= _LETTERS * len(plain)
            ):
                found += sentences(plain)
    return tuple(found)
