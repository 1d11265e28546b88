"""Questions of a file in the format of SQuAD or HotpotQA."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .ruler_qa import Passage, Question, QuestionSource
from .ruler_sample import Span

__all__ = ["FileDocuments", "read_questions"]

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")


class FileDocuments(QuestionSource):
    """Questions of a file, each among the other documents of the file.

    Args:
        questions: the questions; the documents near to each come before all others.
        documents: all documents of the file.

    Attributes:
        hops: most documents that a question needs.
    """

    def __init__(self, questions: list[Question], documents: list[str]) -> None:
        self.questions, self._documents = questions, documents
        self.hops = max(len(question.gold) for question in questions)

    def question(self, index: int, rng: random.Random) -> Question:
        """Question `index` of the file, from the start again after the last."""
        return self.questions[index % len(self.questions)]

    def others(self, question: Question, rng: random.Random) -> Iterator[str]:
        """The documents that belong to the question in random order, then all others in random order."""
        seen = {passage.text for passage in question.gold}
        for texts in (question.near, self._documents):
            for text in rng.sample(texts, len(texts)):
                if text not in seen:
                    seen.add(text)
                    yield text

    def most(self) -> int | None:
        """What is left of the file beside the documents of a question."""
        return max(1, len(self._documents) - self.hops)


def read_questions(path: str | Path) -> FileDocuments:
    """Read a file in the format of SQuAD (1.1 or 2.0) or HotpotQA; which of them is seen from the file.

    Questions without an answer in their document are left out. In a SQuAD file the paragraphs of the same article come
    first among the other documents, in a HotpotQA file those that the question brings along.

    Raises:
        DataError: the file is missing, not JSON, in neither format, or has no question that can be used.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a JSON file in the format of SQuAD or HotpotQA")
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON in UTF-8 ({error})") from None
    try:
        if isinstance(data, Mapping) and "data" in data:
            source = _squad(data["data"])
        elif isinstance(data, list):
            source = _hotpot(data)
        else:
            raise DataError(f"{file} is in the format of neither SQuAD (a field data) nor HotpotQA (a list)")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: a question or document is malformed ({type(error).__name__}: {error})") from None
    if source is None:
        raise DataError(f"{file} has no question with an answer")
    return source


def _squad(articles: list[Any]) -> FileDocuments | None:
    questions: list[Question] = []
    documents: dict[str, None] = {}
    for article in articles:
        texts = list(dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"]))
        documents.update(dict.fromkeys(texts))
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            for asked in paragraph["qas"]:
                given = {str(a["text"]): int(a["answer_start"]) for a in asked.get("answers", ()) if a["text"].strip()}
                if asked.get("is_impossible") or not given:
                    continue
                found = {
                    Span(*_sentence_at(text, at, at + len(answer)), i) for i, (answer, at) in enumerate(given.items())
                }
                gold = (Passage(text, tuple(sorted(found))),)
                questions.append(Question(str(asked["id"]), asked["question"], tuple(given), gold, tuple(texts)))
    return FileDocuments(questions, list(documents)) if questions else None


def _hotpot(records: list[Any]) -> FileDocuments | None:
    questions: list[Question] = []
    documents: dict[str, None] = {}
    for record in records:
        own = {title: (title, [str(line) for line in lines]) for title, lines in record["context"]}
        texts = {title: f"{title}\n{''.join(lines)}" for title, lines in own.values()}
        documents.update(dict.fromkeys(texts.values()))
        answer = str(record["answer"]).strip()
        # Whether it is "yes" is not written in a document.
        said = None if answer.lower() in ("yes", "no") else re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
        facts: dict[str, list[int]] = {}
        for title, number in record["supporting_facts"]:
            # A few facts of the published files point past the end of their document.
            if title in own and number < len(own[title][1]):
                facts.setdefault(title, []).append(number)
        if not answer or not facts:
            continue
        gold = []
        for title, numbers in facts.items():
            lines = own[title][1]
            spans = []
            for number in sorted(set(numbers)):
                start = len(title) + 1 + sum(map(len, lines[:number]))
                line = lines[number]
                start += len(line) - len(line.lstrip())
                spans.append(Span(start, start + len(line.strip()), 0 if said and said.search(line) else -1))
            gold.append(Passage(texts[title], tuple(span for span in spans if span.end > span.start)))
        near = tuple(texts.values())
        questions.append(Question(str(record["_id"]), record["question"], (answer,), tuple(gold), near))
    return FileDocuments(questions, list(documents)) if questions else None


def _sentence_at(text: str, start: int, end: int) -> tuple[int, int]:
    """First character and end of the sentence, or sentences, that the characters from `start` to `end` stand in."""
    breaks = [match.span() for match in _SENTENCE_END.finditer(text)]
    first = max((after for _, after in breaks if after <= start), default=0)
    last = min((after for _, after in breaks if after >= end), default=len(text))
    return first, first + len(text[first:last].rstrip())
