"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): 503 questions about long texts, four choices each.

Prompts are those of THUDM/LongBench (MIT licence, see `longbench_prompts.json`). The published script draws answers
at temperature 0.1; it cuts prompts to 120 000 tokens. `profile="official"` asks and scores as it does; `"fixed"`, the
default, differs in these points:

| what | official | fixed |
|---|---|---|
| filling in a prompt | one field after the other, so "$Q$" or "$C_A$" inside the text is filled in too | all at once |
| truncation | see `encode_prompt` with `version=2` | never above the limit |
| finding the answer | "The correct answer is (A)", with or without brackets, exact capitals | also "the answer is: A", an answer that begins with its letter, or the only letter in brackets |
| empty answers | left out of the mean | wrong |
| accuracy | rounded to one decimal | not rounded |
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._fields import Fields
from ..errors import DataError, PolicyError
from .longbench import settings
from .longbench_scores import bootstrap_interval
from .metrics_text import check_profile
from .records import hub_rows, read_rows

__all__ = [
    "HUB",
    "LETTERS",
    "MAX_LENGTH",
    "MODES",
    "ChoiceQuestion",
    "ChoiceScore",
    "choice_prompt",
    "extract_answer",
    "load_questions",
    "parse_question",
    "read_questions",
    "score_questions",
]

HUB = "THUDM/LongBench-v2"
LETTERS = ("A", "B", "C", "D")
MAX_LENGTH = 120_000
"""Tokens of a prompt, as published; less for models with a smaller window."""
MODES: dict[str, int] = {"0shot": 128, "0shot_cot": 1024, "0shot_cot_ans": 128, "0shot_no_context": 128}
"""The prompts, and how many tokens to generate for each.

`0shot_cot` asks for reasoning, and `0shot_cot_ans`, a second call, for the answer after it, without the text.
`0shot_no_context` leaves the text out, to see what is known without it."""
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")

_FIELD = re.compile(r"\$(DOC|Q|C_A|C_B|C_C|C_D|COT)\$")
_OFFICIAL = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_STATED = re.compile(r"(?i:\banswer\s*(?:is|:)\s*:?\s*(?:choice|option)?)\s*[(\[{\"']*([A-D])(?![\w'])")
_FIRST = re.compile(r"[(\[]?([A-D])(?:[)\].:]|\s*$)")
_BRACKETS = re.compile(r"\(([A-D])\)")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with four choices about a long text.

    Attributes:
        id: the `_id` of the file.
        context: the text.
        question: what is asked.
        choices: the four, in the order of `LETTERS`.
        answer: the right letter.
        difficulty: `easy` or `hard`.
        length: of the text: `short`, `medium` or `long`.
        domain: what the text is about.
        sub_domain: the same more closely.
        where: file and record, for messages.
    """

    id: str
    context: str = field(repr=False)
    question: str
    choices: tuple[str, str, str, str]
    answer: str
    difficulty: str
    length: str
    domain: str = ""
    sub_domain: str = ""
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class ChoiceScore:
    """How many questions were answered right.

    Attributes:
        profile: `fixed` or `official`.
        accuracy: over all questions, from 0 to 100.
        interval: ends of its 95 % interval, from a bootstrap over questions; `None` for too few.
        groups: accuracy and number of questions for `easy`, `hard`, `short`, `medium`, `long`; `None` for none.
        questions: how many were counted.
        failed: those without any text: wrong in the fixed profile, not counted in the official one.
        unanswered: those whose text holds no answer.
        answers: the letter found, by id.
    """

    profile: str
    accuracy: float
    interval: tuple[float, float] | None
    groups: Mapping[str, tuple[float | None, int]]
    questions: int
    failed: int
    unanswered: int
    answers: Mapping[str, str | None] = field(repr=False)


def load_questions(
    data: str | Path | None = None, *, hub: str = HUB, split: str = "train", limit: int | None = None
) -> list[ChoiceQuestion]:
    """The questions, from local files if `data` is given, else from the hub, and from nowhere else.

    Raises:
        DataError: see `read_questions`; or the hub cannot be reached.
        KvsieveError: the hub is needed and `datasets` is not installed.
    """
    if data is not None:
        return read_questions(data, limit=limit)
    return _questions(((where, row) for _, where, row in hub_rows(hub, None, split=split, limit=limit)), limit)


def read_questions(path: str | Path, *, limit: int | None = None) -> list[ChoiceQuestion]:
    """Read questions from a file, or from all files of a folder, in the formats of `records.read_rows`.

    Raises:
        DataError: a file is missing, empty or malformed, a field is missing or wrong, or two questions have the same
            id. The message names file and record or line.
    """
    return _questions(((where, row) for _, where, row in read_rows(path)), limit)


def parse_question(row: Mapping[str, Any], *, where: str = "question") -> ChoiceQuestion:
    """One question, from the fields `_id`, `context`, `question`, `choice_A` to `choice_D`, `answer`, `difficulty`,
    `length`, and optionally `domain` and `sub_domain`.

    Raises:
        DataError: a field is missing or wrong.
    """
    fields = Fields(row, where)
    first, second, third, fourth = (fields.text(f"choice_{letter}") for letter in LETTERS)
    return ChoiceQuestion(
        id=fields.text("_id"),
        context=fields.text("context"),
        question=fields.text("question"),
        choices=(first, second, third, fourth),
        answer=fields.choice("answer", LETTERS),
        difficulty=fields.choice("difficulty", DIFFICULTIES),
        length=fields.choice("length", LENGTHS),
        domain=fields.words("domain"),
        sub_domain=fields.words("sub_domain"),
        where=where,
    )


def choice_prompt(
    question: ChoiceQuestion, mode: str = "0shot", *, reasoning: str | None = None, profile: str = "fixed"
) -> str:
    """The whole prompt of a question, neither truncated nor wrapped; all v2 prompts are wrapped for chat models.

    Args:
        question: the question.
        mode: one of `MODES`.
        reasoning: what the model generated for `0shot_cot`, for `0shot_cot_ans`.
        profile: `"fixed"` or `"official"`.

    Raises:
        PolicyError: an unknown mode or profile, or reasoning missing or not wanted.
    """
    check_profile(profile)
    if mode not in MODES:
        raise PolicyError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if (reasoning is not None) != (mode == "0shot_cot_ans"):
        raise PolicyError("reasoning belongs to mode 0shot_cot_ans, and to that alone")
    values = {"DOC": question.context.strip(), "Q": question.question.strip()}
    values |= {f"C_{letter}": choice.strip() for letter, choice in zip(LETTERS, question.choices, strict=True)}
    values["COT"] = reasoning or ""
    text = str(settings()["v2_prompts"][mode])
    if profile == "fixed":
        return _FIELD.sub(lambda match: values[match.group(1)], text)
    for name, value in values.items():
        text = text.replace(f"${name}$", value)
    return text


def extract_answer(text: str, *, profile: str = "fixed") -> str | None:
    """The letter a generated text answers with, or `None`.

    The first of the patterns in the table above that occurs decides, and of its matches the first.

    Raises:
        PolicyError: an unknown profile.
    """
    text = text.replace("*", "")
    for pattern in _OFFICIAL:
        match = pattern.search(text)
        if match:
            return match.group(1)
    if check_profile(profile) == "official":
        return None
    match = _STATED.search(text) or _FIRST.match(text.strip())
    if match:
        return match.group(1)
    found = set(_BRACKETS.findall(text))
    return found.pop() if len(found) == 1 else None


def score_questions(
    questions: Sequence[ChoiceQuestion],
    texts: Sequence[str | None],
    *,
    profile: str = "fixed",
    compensated: bool = False,
) -> ChoiceScore:
    """Accuracy over all questions, and by difficulty and length.

    Args:
        questions: at least one, each once.
        texts: what was generated for each, in the same order; `None` for a question that failed.
        profile: `"fixed"` or `"official"`.
        compensated: count a text without an answer as 0.25, what guessing would give, in place of 0.

    Raises:
        DataError: no questions, another number of texts, a question twice, or in the official profile no text at all.
        PolicyError: an unknown profile.
    """
    check_profile(profile)
    if len(questions) != len(texts):
        raise DataError(f"{len(questions)} questions, but {len(texts)} texts; give one per question")
    answers: dict[str, str | None] = {}
    counted: list[tuple[ChoiceQuestion, float]] = []
    failed = unanswered = 0
    for question, text in zip(questions, texts, strict=True):
        if question.id in answers:
            raise DataError(f"the question {question.id} occurs twice")
        answer = answers[question.id] = extract_answer(text or "", profile=profile)
        failed += not text
        unanswered += bool(text) and answer is None
        if profile == "official" and not text:
            continue
        guessed = 0.25 if compensated and text and answer is None else 0.0
        counted.append((question, 1.0 if answer == question.answer else guessed))
    if not counted:
        raise DataError("there is no question to score")

    def accuracy(group: str | None = None) -> tuple[float | None, int]:
        scores = [score for one, score in counted if group in (None, one.difficulty, one.length)]
        mean = 100 * sum(scores) / len(scores) if scores else None
        return mean if mean is None or profile == "fixed" else round(mean, 1), len(scores)

    return ChoiceScore(
        profile=profile,
        accuracy=accuracy()[0] or 0.0,
        interval=bootstrap_interval([score for _, score in counted]),
        groups={name: accuracy(name) for name in (*DIFFICULTIES, *LENGTHS)},
        questions=len(counted),
        failed=failed,
        unanswered=unanswered,
        answers=answers,
    )


def _questions(rows: Iterable[tuple[str, Mapping[str, Any]]], limit: int | None) -> list[ChoiceQuestion]:
    if limit is not None and limit < 1:
        raise DataError(f"limit must be 1 or more, not {limit}")
    questions: dict[str, ChoiceQuestion] = {}
    for where, row in rows:
        question = parse_question(row, where=where)
        if question.id in questions:
            raise DataError(f"{where}: the question {question.id} is there already ({questions[question.id].where})")
        questions[question.id] = question
        if len(questions) == limit:
            break
    return list(questions.values())
