"""The thirteen RULER tasks, made on this machine: no downloads, sized to a tokenizer, spread over depth.

Templates, parameters and scoring are the published ones (Hsieh et al., RULER, arXiv 2404.06654). What differs, since
texts that have to be fetched and fixed random states are avoided:

* prose is the caller's, or that of the Python language reference, from a different sentence on in every sample;
* words come from lists of this package, then from the prose, then they are invented;
* `qa_1` and `qa_2` ask about invented documents, unless a file in the format of SQuAD or HotpotQA is given;
* what answers a question stands at depths that are spread evenly over the samples, never at one place in all of
  them, and its place is recorded;
* every sample is as long as its steps allow: one line, one word of prose, one list word or one document.

So numbers are comparable between methods and models measured here, not with published tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .ruler_fill import Drafter, Place, check_request, evenly, fill, spread
from .ruler_lists import CommonWords, FrequentWords, VariableTracking
from .ruler_niah import Niah
from .ruler_qa import InventedDocuments, QuestionAnswering, QuestionSource
from .ruler_qa_files import read_questions
from .ruler_sample import Sample, Span, digest, string_match_all, string_match_part, token_spans
from .ruler_text import Texts

__all__ = [
    "TASKS",
    "Sample",
    "Span",
    "Task",
    "digest",
    "generate",
    "get_task",
    "grid",
    "list_tasks",
    "read_questions",
    "string_match_all",
    "string_match_part",
    "token_spans",
]

Task = Niah | VariableTracking | CommonWords | FrequentWords | QuestionAnswering

TASKS: Mapping[str, Task] = {
    "niah_single_1": Niah(type_haystack="noise", type_needle_k="words", type_needle_v="numbers"),
    "niah_single_2": Niah(type_haystack="essay", type_needle_k="words", type_needle_v="numbers"),
    "niah_single_3": Niah(type_haystack="essay", type_needle_k="words", type_needle_v="uuids"),
    "niah_multikey_1": Niah(type_haystack="essay", type_needle_k="words", type_needle_v="numbers", num_needle_k=4),
    "niah_multikey_2": Niah(type_haystack="needle", type_needle_k="words", type_needle_v="numbers"),
    "niah_multikey_3": Niah(type_haystack="needle", type_needle_k="uuids", type_needle_v="uuids"),
    "niah_multivalue": Niah(type_haystack="essay", type_needle_k="words", type_needle_v="numbers", num_needle_v=4),
    "niah_multiquery": Niah(type_haystack="essay", type_needle_k="words", type_needle_v="numbers", num_needle_q=4),
    "vt": VariableTracking(num_chains=1, num_hops=4),
    "cwe": CommonWords(freq_cw=30, freq_ucw=3, num_cw=10),
    "fwe": FrequentWords(alpha=2.0),
    "qa_1": QuestionAnswering(hops=1),
    "qa_2": QuestionAnswering(hops=2),
}
"""The parameters of every task; names and values as published."""


def list_tasks() -> list[str]:
    """Names of the tasks, in the published order."""
    return list(TASKS)


def get_task(task: str, **changes: Any) -> Task:
    """The parameters of a task.

    Args:
        task: a name of `list_tasks()`.
        changes: parameters to set otherwise.

    Raises:
        DataError: there is no such task or parameter, or a value is outside its range.
    """
    if task not in TASKS:
        raise DataError(f"there is no RULER task {task!r}; there are: {', '.join(TASKS)}")
    known = TASKS[task]
    parameters = [field.name for field in fields(known)]
    for name in changes:
        if name not in parameters:
            raise DataError(f"{task} has no parameter {name!r}; it has: {', '.join(parameters)}")
    return replace(known, **changes)


def generate(
    task: str,
    tokenizer: Any,
    length: int,
    count: int,
    *,
    seed: int = 42,
    depth: float | None = None,
    texts: Iterable[str] | None = None,
    questions: str | Path | QuestionSource | None = None,
    reserve: int = 0,
    **changes: Any,
) -> list[Sample]:
    """Make samples of a task.

    Args:
        task: a name of `list_tasks()`.
        tokenizer: of the model that will read the samples, with the interface of transformers.
        length: tokens of prompt, answer prefix and generated answer together, at most.
        count: samples to make.
        seed: decides everything. Every sample has a random state of its own, but depths are spread over `count`
            samples, so a set is no part of a larger one.
        depth: put the (first) answer-bearing piece here, from 0 to 1, and further ones at equal distances up to the
            end. By default depths are spread evenly over the samples, each of several pieces in its own part of the
            text.
        texts: prose for essays, and words for `cwe`; by default that of the Python language reference.
        questions: for `qa_1` and `qa_2`: a file in the format of SQuAD or HotpotQA, or what `read_questions` made of
            one; by default invented documents.
        reserve: tokens to keep free, such as those of a chat template.
        changes: parameters of the task to set otherwise than in `TASKS`.

    Returns:
        `count` samples.

    Raises:
        DataError: an unknown task or parameter, a depth for a task without one, a length that is too short (the
            message says what would be enough), or material that cannot be used.
    """
    kind = get_task(task, **changes)
    check_request(length, count, depth, reserve)
    if depth is not None:
        _check_depth(task, kind)
    places = spread(count, depth, f"{task}/{seed}")
    return _fill(task, kind, tokenizer, length, places, seed, texts, questions, reserve)


def grid(
    task: str,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: int | Sequence[float] = 11,
    per_cell: int = 1,
    *,
    seed: int = 42,
    texts: Iterable[str] | None = None,
    questions: str | Path | QuestionSource | None = None,
    reserve: int = 0,
    **changes: Any,
) -> list[Sample]:
    """`per_cell` samples for every length and depth, lengths outermost; see `generate` for the rest.

    Args:
        task: a name of `list_tasks()`.
        tokenizer: of the model that will read the samples.
        lengths: tokens of prompt, answer prefix and generated answer together.
        depths: the depths, from 0 to 1, or how many of them, evenly spread.
        per_cell: samples for each pair.
        seed, texts, questions, reserve, changes: see `generate`.

    Raises:
        DataError: as `generate`; or no lengths, no depths or fewer than two to spread.
    """
    if not lengths:
        raise DataError("a grid needs at least one length")
    kind, where = get_task(task, **changes), evenly(depths)
    _check_depth(task, kind)
    samples = []
    for length in lengths:
        for depth in where:
            check_request(length, per_cell, depth, reserve)
        places = [Place(depth, given=True) for depth in where for _ in range(per_cell)]
        samples += _fill(task, kind, tokenizer, length, places, seed, texts, questions, reserve)
    return samples


def _check_depth(task: str, kind: Task) -> None:
    if not kind.has_depth:
        raise DataError(f"{task} has its answers everywhere in the text and so no depth; leave depth out")


def _fill(
    task: str,
    kind: Task,
    tokenizer: Any,
    length: int,
    places: Sequence[Place],
    seed: int,
    texts: Iterable[str] | None,
    questions: str | Path | QuestionSource | None,
    reserve: int,
) -> list[Sample]:
    draft, most = _drafter(task, kind, length, texts, questions)
    return fill(
        task,
        draft,
        tokenizer,
        length=length,
        places=places,
        seed=seed,
        reserve=reserve,
        fewest=kind.fewest,
        most=most,
        tokens_to_generate=kind.tokens_to_generate,
        metric=kind.metric,
    )


def _drafter(
    task: str,
    kind: Task,
    length: int,
    texts: Iterable[str] | None,
    questions: str | Path | QuestionSource | None,
) -> tuple[Drafter, int | None]:
    """What makes samples of a task, and the largest size there is material for."""
    if isinstance(kind, QuestionAnswering):
        if questions is None:
            questions = InventedDocuments(kind.hops)
        source = questions if isinstance(questions, QuestionSource) else read_questions(questions)
        return kind.draft(source), source.most()
    if questions is not None:
        raise DataError(f"{task} asks no questions about documents; leave questions out")
    needs_prose = isinstance(kind, CommonWords) or (isinstance(kind, Niah) and kind.type_haystack == "essay")
    return kind.draft(Texts(texts) if needs_prose else None, length), None
