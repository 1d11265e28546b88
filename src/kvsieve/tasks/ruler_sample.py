"""One sample of a procedural long-context task: its parts, where its answers stand, and how a prediction is scored."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import DataError, KvsieveError

__all__ = [
    "METRICS",
    "Sample",
    "Span",
    "count_tokens",
    "digest",
    "first_word",
    "string_match_all",
    "string_match_part",
    "token_spans",
    "word_recall",
]

_CONTROL = re.compile(r"[\x00-\x1f]")
_WORD = re.compile(r"\w+")


class Span(NamedTuple):
    """A piece of a sample's context.

    Attributes:
        start: its first character.
        end: the character after its last.
        answer: index of the answer that it holds; -1 for a step that only leads to an answer.
    """

    start: int
    end: int
    answer: int


@dataclass(frozen=True)
class Sample:
    """One text with a question about it.

    The model reads `context`, then `question`, then (after the opening of its own turn, if it is a chat model)
    `answer_prefix`. `context` does not say what will be asked, so a cache can be compressed after it and before the
    question is seen.

    Attributes:
        task: name of the task.
        index: which sample of its set this is, from 0.
        seed: seed of the set.
        length: tokens that were allowed, generated ones included.
        tokens: tokens of context, question and answer prefix, with the tokenizer's special tokens.
        tokens_to_generate: tokens to generate at most.
        context: instruction and long text.
        question: what follows it.
        answer_prefix: how the answer begins.
        answers: the right answers: all of them are wanted, or any of them, as the metric says.
        metric: a name in `METRICS`.
        depths: where the answer-bearing pieces were put, 0 at the start of the long text and 1 at its end, one for
            each piece in the order of the text; empty where a task has its answers everywhere.
        evidence: what has to be read to know the answer (sentences, list entries), in the order of the text.
        spans: every place within the evidence where an answer is written, in the order of the text. Empty if the
            answer is not in the text (yes or no).
    """

    task: str
    index: int
    seed: int
    length: int
    tokens: int
    tokens_to_generate: int
    context: str = field(repr=False)
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    metric: str
    depths: tuple[float, ...]
    evidence: tuple[Span, ...] = field(repr=False)
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def id(self) -> str:
        """A name that no other sample of the same task, length and seed has."""
        return f"{self.task}-{self.length}-{self.seed}-{self.index}"

    @property
    def prompt(self) -> str:
        """Context and question, without the answer prefix."""
        return self.context + self.question

    @property
    def text(self) -> str:
        """All that the model reads before it generates."""
        return self.prompt + self.answer_prefix

    @property
    def depth(self) -> float | None:
        """Where the first answer-bearing piece was put, from 0 to 1; None where answers are everywhere."""
        return self.depths[0] if self.depths else None

    def score(self, prediction: str) -> float:
        """From 0, wrong, to 1, right, by the metric of the task."""
        return METRICS[self.metric](prediction, self.answers)


def token_spans(
    tokenizer: Any, text: str, spans: Iterable[Span], *, shift: int = 0, add_special_tokens: bool = True
) -> list[range]:
    """Token positions that cover each span.

    A token counts as soon as one of its characters lies in the span, so the tokens hold all of the span and at most
    the rest of the tokens at both ends (a space before, a full stop after).

    Args:
        tokenizer: a fast tokenizer of transformers, as only those know which characters a token stands for.
        text: what is tokenized: the context, or everything that contains it.
        spans: in characters of the context.
        shift: characters before the context in `text`, such as the opening of a chat template.
        add_special_tokens: as in the call that makes the input of the model.

    Returns:
        One range of token positions per span.

    Raises:
        KvsieveError: this is no fast tokenizer.
        DataError: a span lies outside the text, or no token covers it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise KvsieveError(
            f"{type(tokenizer).__name__} does not know which characters its tokens stand for; load a fast tokenizer"
        )
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    # Special tokens stand for no characters, wherever their offsets point.
    held = [(start, end, at) for at, (start, end) in enumerate(encoded["offset_mapping"]) if end > start]
    starts, ends = [start for start, _, _ in held], [end for _, end, _ in held]
    found = []
    for span in spans:
        low, high = span.start + shift, span.end + shift
        if not 0 <= low < high <= len(text):
            raise DataError(f"the span from {low} to {high} is not within the text of {len(text)} characters")
        first, last = bisect_right(ends, low), bisect_left(starts, high) - 1
        if first > last:
            raise DataError(f"no token covers the characters from {low} to {high}")
        found.append(range(held[first][2], held[last][2] + 1))
    return found


def count_tokens(tokenizer: Any, *parts: str) -> int:
    """Tokens of the parts, read as one text or one after the other, whichever is more; special tokens included."""
    joined = len(tokenizer("".join(parts), verbose=False)["input_ids"])
    apart = len(tokenizer(parts[0], verbose=False)["input_ids"])
    for part in parts[1:]:
        apart += len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
    return max(joined, apart)


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of texts and answers, as hex digits.

    The same seed gives the same samples only with the same tokenizer, the same texts and, where no texts are given,
    the same Python version; equal digests show that two runs read the same.
    """
    total = hashlib.sha256()
    for sample in samples:
        for part in (sample.context, sample.question, sample.answer_prefix, *sample.answers):
            total.update(part.encode() + b"\0")
        total.update(b"\1")
    return total.hexdigest()


def _cleaned(prediction: str, answers: Sequence[str]) -> str:
    if not answers:
        raise DataError("there are no answers to compare with; give at least one")
    return _CONTROL.sub("\n", prediction.strip()).strip().lower()


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, in [0, 1].

    White space around the prediction is dropped, control characters become line breaks, capitals do not matter. An
    answer counts wherever it occurs, inside a longer word too. Source: RULER (arXiv 2404.06654).

    Raises:
        DataError: there are no answers.
    """
    said = _cleaned(prediction, answers)
    return sum(answer.lower() in said for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if any of the answers occurs in the prediction, else 0.0; texts are compared as in `string_match_all`.

    Source: RULER (arXiv 2404.06654), for its questions about documents.

    Raises:
        DataError: there are no answers.
    """
    said = _cleaned(prediction, answers)
    return float(any(answer.lower() in said for answer in answers))


def first_word(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the first run of letters and digits in the prediction is one of the answers, else 0.0.

    Raises:
        DataError: there are no answers.
    """
    _cleaned(prediction, answers)
    word = _WORD.search(prediction)
    return float(word is not None and word.group() in answers)


def word_recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of the different words of an answer that the prediction holds, in [0, 1]; the best over the answers.

    Words are runs of letters and digits without capitals; order and repetition do not matter.

    Raises:
        DataError: there are no answers, or one without a word.
    """
    said = set(_WORD.findall(_cleaned(prediction, answers)))
    wanted = [set(_WORD.findall(answer.lower())) for answer in answers]
    if not all(wanted):
        raise DataError(f"an answer without a word cannot be looked for: {list(answers)!r}")
    return max(len(words & said) / len(words) for words in wanted)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "first_word": first_word,
    "word_recall": word_recall,
}
"""What a sample's `metric` names: a function of a prediction and the answers."""
