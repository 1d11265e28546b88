"""The training mixture: prose, prose with facts to remember, tables, copying. Token space, deterministic.

Every piece of text is tokenized on its own at a word boundary, so the result equals tokenizing the whole.
Each token carries a loss weight: 0 where it cannot be predicted (the value in a statement), ``ANSWER``
where it can be predicted only by looking it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from wordlists import LINKS, NAMES, OPENINGS, WORDS

KINDS = ("prose", "facts", "table", "copy", "drill")
ANSWER = 2.0
FRAME = 0.5
SPARSE = 0.4
"""Share of the texts with facts that hold at most eight of them, however long: few, far apart, are hard to find."""
GOLDEN = 0.6180339887498949
Ints = NDArray[np.int64]


@dataclass
class Piece:
    """Tokens with a loss weight each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float = 1.0) -> Piece:
        self.ids.extend(int(i) for i in ids)
        self.weights.extend([weight] * len(ids))
        return self

    def join(self, other: Piece) -> Piece:
        self.ids.extend(other.ids)
        self.weights.extend(other.weights)
        return self

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Phrasing:
    """A way to state a fact: ``before KEY between VALUE after``; ``question`` may come before a query."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    question: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # text before and after the key


class TextStream:
    """A long token array; windows are taken so that they cover it evenly, without a random state."""

    def __init__(self, tokens: NDArray[np.uint16], turns: int = 0) -> None:
        self.tokens, self.turns = tokens, turns

    def window(self, length: int) -> Ints:
        self.turns += 1
        start = int((self.turns * GOLDEN % 1.0) * (len(self.tokens) - length))
        return self.tokens[start : start + length].astype(np.int64)


class Mixture:
    """Makes training examples. ``novels`` and ``documentation`` are token arrays."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        novels: NDArray[np.uint16],
        documentation: NDArray[np.uint16],
        seed: int = 0,
        documentation_share: float = 0.13,
        variety: float = 0.35,
        names: Sequence[str] = NAMES,
        words: Sequence[str] = WORDS,
    ) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.novels, self.documentation = TextStream(novels), TextStream(documentation)
        self.documentation_share, self.variety = documentation_share, variety
        self.rng = np.random.default_rng(seed)
        self.names = np.array([self.encode(f" {w}")[0] for w in names])
        self.words = np.array([self.encode(f" {w}")[0] for w in words])
        self.first_digits = np.array([self.encode(f" {d}")[0] for d in range(10)])
        self.digits = np.array([self.encode(str(d))[0] for d in range(10)])
        vocabulary = tokenizer.get_vocab()
        plain = sorted(i for t, i in vocabulary.items() if t[0] == "\u0120" and len(t) > 3 and t[1:].isalpha())
        self.any_words = np.array(plain)
        ends = [self.encode(mark)[-1] for mark in (".", '."', "!", "?", '?"', "\n\n")]
        self.is_sentence_end = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
        self.is_sentence_end[ends] = True
        self.line_break = self.encode("\n")
        self.plain, self.list_item, self.varied = self._phrasings()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _phrasings(self) -> tuple[list[Phrasing], Phrasing, list[Phrasing]]:
        def make(before: str, between: str, after: str, question: str = "") -> Phrasing:
            head, _, tail = question.partition(" KEY")
            asked = (tuple(self.encode(head)), tuple(self.encode(tail))) if question else None
            return Phrasing(*(tuple(self.encode(t)) for t in (before, between, after)), asked)

        plain = [
            make(" The code of", " is", ".", " What is the code of KEY?"),
            make(" The secret word for", " is", ".", " Tell me the secret word for KEY."),
            make(" Remember that", " has", ".", " What does KEY have?"),
        ]
        varied = [make(opening, link, ".") for opening in OPENINGS for link in LINKS]
        return plain, make("\n-", ":", ""), varied

    # -- drawing parts ---------------------------------------------------------------------------------

    def text(self, length: int) -> Ints:
        """A window of novel or documentation."""
        stream = self.documentation if self.rng.random() < self.documentation_share else self.novels
        return stream.window(length)

    def keys(self, count: int) -> list[int]:
        """Different names or words."""
        pool = self.names if self.rng.random() < 0.6 else self.words
        return [int(i) for i in self.rng.choice(pool, size=min(count, len(pool)), replace=False)]

    def value(self, kind: str) -> list[int]:
        """``word``: one word; ``pair``: two words; ``number``: three to five digits."""
        if kind == "number":
            return self.number(int(self.rng.integers(3, 6)))
        return [int(i) for i in self.rng.choice(self.words, size=2 if kind == "pair" else 1)]

    def number(self, length: int) -> list[int]:
        drawn = self.rng.integers(0, 10, size=length)
        return [int(self.first_digits[drawn[0]]), *(int(i) for i in self.digits[drawn[1:]])]

    def phrasing(self, allow_list: bool = False) -> Phrasing:
        """One of the plain phrasings, or with probability ``variety`` an unusual or a meaningless one."""
        draw = self.rng.random()
        if draw < self.variety / 2:
            return self.varied[int(self.rng.integers(len(self.varied)))]
        if draw < self.variety:
            odd = [int(i) for i in self.rng.choice(self.any_words, size=5)]
            before, between = odd[: self.rng.integers(1, 4)], odd[3 : 3 + self.rng.integers(1, 3)]
            return Phrasing(tuple(before), tuple(between), tuple(self.encode(".")))
        if allow_list and self.rng.random() < 0.4:
            return self.list_item
        return self.plain[int(self.rng.integers(len(self.plain)))]

    @staticmethod
    def statement(how: Phrasing, key: int, value: Sequence[int]) -> Piece:
        """A fact; its key and value cannot be predicted and carry no loss."""
        return Piece().add(how.before).add([key], 0).add(how.between).add(value, 0).add(how.after)

    @staticmethod
    def query(how: Phrasing, key: int, value: Sequence[int], ask: bool = False) -> Piece:
        """The fact again, its value now being the answer; with ``ask`` a question comes first."""
        piece = Piece()
        if ask and how.question is not None:
            piece.add(how.question[0], FRAME).add([key], 0).add(how.question[1], FRAME)
        return piece.add(how.before, FRAME).add([key], 0).add(how.between).add(value, ANSWER).add(how.after)

    # -- whole examples --------------------------------------------------------------------------------

    def prose(self, length: int) -> Piece:
        return Piece().add(self.text(length))

    def facts(self, length: int) -> Piece:
        """Prose with facts stated at sentence ends and asked for later, half of them at the very end."""
        rng, how = self.rng, self.phrasing()
        kind = str(rng.choice(["word", "number", "pair"], p=[0.55, 0.35, 0.1]))
        fewest, most = (1, 8) if rng.random() < SPARSE else (length // 128, length // 32 + 1)
        keys = self.keys(max(1 if most == 8 else 2, int(rng.integers(fewest, most + 1))))
        values = [self.value(kind) for _ in keys]
        statements = [self.statement(how, k, v) for k, v in zip(keys, values, strict=True)]
        room = int(length * 0.7) - sum(map(len, statements))
        queries: list[tuple[int, Piece]] = []
        for _ in range(2 * len(keys)):
            which = int(rng.integers(len(keys)))
            piece = self.query(how, keys[which], values[which], ask=bool(rng.random() < 0.4))
            if len(piece) > room:
                break
            room -= len(piece)
            queries.append((which, piece))
        inserted = sum(map(len, statements)) + sum(len(piece) for _, piece in queries)
        text = self.text(max(8, length - inserted))
        places = np.flatnonzero(self.is_sentence_end[text]) + 1
        if len(places) < 4:
            places = np.arange(1, len(text))
        stated_at = np.sort(rng.choice(places, size=len(keys)))
        events = [(int(p), 0, s) for p, s in zip(stated_at, statements, strict=True)]
        for which, piece in queries:
            later = places[places >= stated_at[which]]
            at_end = rng.random() < 0.5
            events.append((len(text) if at_end else int(rng.choice(later)), 1, piece))
        events.sort(key=lambda event: event[:2])
        result, done = Piece(), 0
        for place, _, piece in events:
            result.add(text[done:place]).join(piece)
            done = place
        return self.fit(result.add(text[done:]), length)

    def table(self, length: int) -> Piece:
        """A dense list of facts, sometimes a gap of prose, then every fact asked for in another order."""
        rng, result = self.rng, Piece()
        while len(result) < length:
            how = self.phrasing(allow_list=True)
            kind = str(rng.choice(["word", "number", "pair"], p=[0.55, 0.35, 0.1]))
            keys = self.keys(int(rng.integers(3, max(4, length // 24))))
            values = [self.value(kind) for _ in keys]
            for key, value in zip(keys, values, strict=True):
                result.join(self.statement(how, key, value))
            if rng.random() < 0.4:
                result.add(self.line_break).add(self.text(int(rng.integers(8, length // 3))))
            for which in rng.permutation(len(keys)):
                result.join(self.query(how, keys[which], values[which]))
            result.add(self.line_break)
        return self.fit(result, length)

    def copy(self, length: int) -> Piece:
        """A span of prose or of random words, a gap of prose, the span again."""
        rng, result = self.rng, Piece()
        while len(result) < length:
            size = int(rng.integers(8, max(12, length // 4)))
            is_prose = rng.random() < 0.5
            span = self.text(size) if is_prose else rng.choice(self.any_words, size=size)
            gap = self.text(int(rng.integers(0, length // 4)))
            result.add(span, 1.0 if is_prose else 0.0).add(gap)
            result.add(span[:2], 0).add(span[2:], ANSWER)
        return self.fit(result, length)

    def drill(self, length: int) -> Piece:
        """The densest lesson: one span, or shuffled pairs, over and over. Induction starts here."""
        rng, result = self.rng, Piece()
        if rng.random() < 0.5:
            size = int(rng.integers(6, max(8, length // 4)))
            span = rng.choice(self.any_words, size=size)
            while len(result) < length:
                known = ANSWER if len(result) else 0.0
                result.add(span[:1], 0).add(span[1:], known)
            return self.fit(result, length)
        count = int(rng.integers(3, max(4, length // 10)))
        pool = self.any_words if rng.random() < 0.5 else np.concatenate([self.names, self.words])
        count = min(count, len(pool) // 2)
        drawn = rng.choice(pool, size=2 * count, replace=False)
        frame = self.plain[int(rng.integers(len(self.plain)))]
        before = frame.before if rng.random() < 0.4 else ()
        between = frame.between if rng.random() < 0.7 else ()
        after = frame.after if rng.random() < 0.5 else ()
        while len(result) < length:
            known = ANSWER if len(result) else 0.0
            for which in rng.permutation(count):
                key, value = drawn[which], drawn[count + which]
                result.add(before, FRAME).add([key], 0).add(between, FRAME).add([value], known).add(after, FRAME)
        return self.fit(result, length)

    @staticmethod
    def fit(piece: Piece, length: int) -> Piece:
        """Cut to ``length``, or filled up with padding without loss."""
        missing = max(0, length - len(piece))
        return Piece(piece.ids[:length], piece.weights[:length]).add([0] * missing, 0)

    # -- batches ---------------------------------------------------------------------------------------

    def example(self, kind: str, length: int) -> Piece:
        makers = {"prose": self.prose, "facts": self.facts, "table": self.table}
        return {**makers, "copy": self.copy, "drill": self.drill}[kind](length)

    def batch(
        self, step: int, size: int, length: int, shares: Sequence[float]
    ) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Example kinds, tokens [size, length + 1] (BOS first) and loss weights; a function of the step.

        Only the place reached in the texts is carried from call to call; see :meth:`state`.
        """
        self.rng = np.random.default_rng((self.seed, step))
        kinds = self.rng.choice(len(KINDS), size=size, p=np.array(shares) / np.sum(shares))
        ids = np.zeros((size, length + 1), dtype=np.int64)
        weights = np.zeros((size, length + 1), dtype=np.float32)
        for row, kind in enumerate(kinds):
            piece = self.example(KINDS[kind], length)
            ids[row, 1:], weights[row, 1:] = piece.ids, piece.weights
        return kinds, ids, weights

    def state(self) -> tuple[int, int]:
        """Where the texts have been read to."""
        return self.novels.turns, self.documentation.turns

    def restore(self, state: Sequence[int]) -> None:
        self.novels.turns, self.documentation.turns = int(state[0]), int(state[1])
