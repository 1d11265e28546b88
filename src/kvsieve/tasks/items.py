"""What is read and asked, whatever the benchmark: token ids of context and question, and how an answer is scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import DataError, KvsieveError
from . import records, ruler_sample
from .longbench import LongBenchTask
from .longbench_encoding import Chat, EncodedPrompt, encode_prompt, in_chat
from .longbench_v2 import LETTERS, MODES, ChoiceQuestion, choice_prompt, extract_answer

__all__ = ["Item", "Span", "choice_item", "longbench_item", "plain_item", "procedural_item"]

Span = tuple[int, int, int]
"""First token, the one after the last, and which answer they say (-1: a step that only leads to one)."""

_LOCATABLE = ("qa_f1", "qa_f1_zh", "retrieval", "retrieval_zh", "classification")
_UNLOCATABLE = frozenset({"yes", "no", "true", "false", "unanswerable", "none"})
_SHORTEST, _MOST_PLACES = 3, 20


@dataclass(frozen=True)
class Item:
    """One text with one question, ready for a model.

    Attributes:
        id: no other item of a run has it.
        task: name of the task.
        context: token ids of what may be compressed before the question is known, special tokens included.
        question: token ids of the rest of the prompt; empty where the two cannot be told apart.
        max_new_tokens: to generate at most.
        score: of a generated text, in [0, 1]; None where nothing is asked.
        expected: right answers.
        text: what the ids were made from.
        offsets: characters of `text` that each token of context and question stands for; empty ranges for special
            tokens.
        evidence: where in the context stands what has to be known.
        answers: where in the context the answers stand; empty where that cannot be known.
        every: whether all answers are wanted, and not any one of them.
        length: tokens the sample was made for, or the length of the context as its file counts it.
        depth: where in the text the answer stands, from 0 to 1.
        stop_token_ids: tokens that end generation except as its first.
        finished: whether generation can end at this text.
        scoring: what `score` and `finished` depend on beside text and answers, as JSON can hold it.
    """

    id: str
    task: str
    context: tuple[int, ...] = field(repr=False)
    question: tuple[int, ...] = field(repr=False)
    max_new_tokens: int
    score: Callable[[str], float] | None = field(repr=False)
    expected: tuple[str, ...]
    text: str = field(repr=False)
    offsets: tuple[tuple[int, int], ...] = field(repr=False)
    evidence: tuple[Span, ...] = ()
    answers: tuple[Span, ...] = ()
    every: bool = False
    length: int | None = None
    depth: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    finished: Callable[[str], bool] = field(default=lambda text: False, repr=False)
    scoring: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def prompt(self) -> tuple[int, ...]:
        """All that is read before the answer."""
        return self.context + self.question


def procedural_item(sample: ruler_sample.Sample, tokenizer: Any, *, chat: bool = False) -> Item:
    """An item from a sample of `ruler` or `needle`.

    Args:
        sample: the sample.
        tokenizer: a fast tokenizer of transformers.
        chat: put context and question into the tokenizer's chat template; the answer prefix begins the model's turn.

    Raises:
        KvsieveError: the tokenizer is not fast, or has no chat template that shows what it is given.
    """
    head, tail, special = _frame(tokenizer, sample.prompt, chat)
    text = head + sample.prompt + tail + sample.answer_prefix
    ids, offsets = _encode(tokenizer, text, special)
    split = len(head) + len(sample.context)
    cut = next((i for i, (start, end) in enumerate(offsets) if end > max(start, split)), len(ids))
    places = partial(ruler_sample.token_spans, tokenizer, text, shift=len(head), add_special_tokens=special)
    return Item(
        id=sample.id,
        task=sample.task,
        context=ids[:cut],
        question=ids[cut:],
        max_new_tokens=sample.tokens_to_generate,
        score=sample.score,
        expected=sample.answers,
        text=text,
        offsets=offsets,
        evidence=_token_spans(places, sample.evidence),
        answers=_token_spans(places, sample.spans),
        every=sample.metric == "string_match_all",
        length=sample.length,
        depth=sample.depth,
    )


def longbench_item(
    task: LongBenchTask,
    sample: records.Sample,
    tokenizer: Any,
    max_length: int | None,
    *,
    chat: Chat = False,
    profile: str = "fixed",
    split: bool = True,
    max_new_tokens: int | None = None,
    stop: str | None = None,
) -> Item:
    """An item from a sample of LongBench.

    An answer is located where the task asks for words of the text and these stand in a few places of the context.

    Args:
        task: the task.
        sample: one of its samples.
        tokenizer: a fast tokenizer of transformers.
        max_length: most tokens of the prompt, see `encode_prompt`.
        chat: see `LongBenchTask.encode`.
        profile: `"fixed"` or `"official"`.
        split: tell the question from the context. A sample that comes with a complete prompt has no such seam.
        max_new_tokens: instead of the task's own.
        stop: text after whose first occurrence nothing counts.

    Raises:
        DataError: the prompt has no seam between context and question, or leaves no room.
        KvsieveError: the tokenizer is not fast.
    """
    encoded = task.encode(sample, tokenizer, max_length, chat=chat, profile=profile)
    offsets = _offsets(tokenizer, encoded)
    cut, where = len(encoded.ids), []
    try:
        seam = _seam(task, sample, encoded, profile)
    except DataError:
        if split:
            raise
    else:
        if split:
            cut = next((i for i, (start, end) in enumerate(offsets) if end > max(start, seam)), cut)
        if task.metric in _LOCATABLE:
            head = task.template(profile).partition("{context}")[0]
            begin = max(0, encoded.text.find(head)) + len(head)
            where = [(a + begin, b + begin, i) for a, b, i in _located(encoded.text[begin:seam], sample.answers)]
    answers = tuple(_to_tokens(offsets, where))
    return Item(
        id=f"{task.name}/{sample.id}",
        task=task.name,
        context=encoded.ids[:cut],
        question=encoded.ids[cut:],
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        score=lambda text: task.score(until(text, stop), sample, profile),
        expected=sample.answers,
        text=encoded.text,
        offsets=offsets,
        evidence=answers,
        answers=answers,
        length=sample.length,
        stop_token_ids=task.stop_token_ids(tokenizer, profile),
        scoring=(task.metric, profile, stop, sample.classes),
        finished=lambda text: (stop is not None and stop in text) or task.finished(text, profile),
    )


def choice_item(
    question: ChoiceQuestion,
    tokenizer: Any,
    max_length: int | None,
    *,
    chat: Chat = False,
    profile: str = "fixed",
    split: bool = True,
) -> Item:
    """An item from a question of LongBench v2, with the prompt `0shot`.

    Raises:
        DataError, KvsieveError: see `longbench_item`.
    """
    prompt = choice_prompt(question, "0shot", profile=profile)
    encoded = encode_prompt(prompt, tokenizer, max_length, chat=chat, profile=profile, version=2)
    offsets = _offsets(tokenizer, encoded)
    cut = len(encoded.ids)
    if split:
        tail = prompt[prompt.rindex(question.context) + len(question.context) :] if question.context else prompt
        seam = _last(encoded.text, tail, question.where or question.id)
        cut = next((i for i, (start, end) in enumerate(offsets) if end > max(start, seam)), cut)
    return Item(
        id=f"longbench_v2/{question.id}",
        task="longbench_v2",
        context=encoded.ids[:cut],
        question=encoded.ids[cut:],
        max_new_tokens=MODES["0shot"],
        score=lambda text: float(extract_answer(text, profile=profile) == question.answer),
        scoring=(profile, question.answer),
        expected=(f"{question.answer}: {question.choices[LETTERS.index(question.answer)]}",),
        text=encoded.text,
        offsets=offsets,
    )


def plain_item(name: str, text: str, tokenizer: Any, length: int) -> Item:
    """A text that is only read, up to `length` tokens.

    Raises:
        DataError: it has fewer than two tokens.
        KvsieveError: the tokenizer is not fast.
    """
    ids, offsets = _encode(tokenizer, text, True)
    if len(ids) < 2:
        raise DataError(f"{name} has too little text: {len(ids)} tokens")
    ids, offsets = ids[:length], offsets[:length]
    return Item(
        id=name,
        task="text",
        context=ids,
        question=(),
        max_new_tokens=0,
        score=None,
        expected=(),
        text=text[: max(end for _, end in offsets)],
        offsets=offsets,
    )


def until(text: str, stop: str | None) -> str:
    """The text up to `stop`, without it."""
    return text if stop is None else text.split(stop)[0]


def _frame(tokenizer: Any, prompt: str, chat: bool) -> tuple[str, str, bool]:
    """What a chat template puts before and behind a prompt, and whether special tokens are still to be added."""
    if not chat:
        return "", "", True
    whole = in_chat(tokenizer, prompt)
    head, found, tail = whole.partition(prompt)
    if not found:
        raise KvsieveError(
            f"the chat template of {type(tokenizer).__name__} changes what it is given; leave the template out"
        )
    return head, tail, not (tokenizer.bos_token and whole.startswith(tokenizer.bos_token))


def _encode(tokenizer: Any, text: str, special: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    if not getattr(tokenizer, "is_fast", False):
        raise KvsieveError(
            f"{type(tokenizer).__name__} does not know which characters its tokens stand for; load a fast tokenizer"
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return tuple(encoded["input_ids"]), tuple((int(a), int(b)) for a, b in encoded["offset_mapping"])


def _offsets(tokenizer: Any, encoded: EncodedPrompt) -> tuple[tuple[int, int], ...]:
    for special in (True, False):
        ids, offsets = _encode(tokenizer, encoded.text, special)
        if ids == encoded.ids:
            return offsets
    raise KvsieveError(f"{type(tokenizer).__name__} encodes the same text in two ways; it cannot be used here")


def _token_spans(places: Callable[..., list[range]], spans: Sequence[ruler_sample.Span]) -> tuple[Span, ...]:
    return tuple(
        (found.start, found.stop, span.answer) for found, span in zip(places(spans), spans, strict=True)
    )  # fmt: skip


def _to_tokens(offsets: Sequence[tuple[int, int]], where: Sequence[Span]) -> Iterator[Span]:
    """Spans of characters as spans of tokens; each token that holds one of its characters counts."""
    for low, high, answer in where:
        held = [i for i, (start, end) in enumerate(offsets) if end > start and start < high and end > low]
        if held:
            yield held[0], held[-1] + 1, answer


def _located(text: str, answers: Sequence[str]) -> list[Span]:
    located: list[Span] = []
    for i, answer in enumerate(answers):
        answer = answer.strip()
        if len(answer) < _SHORTEST or answer.lower() in _UNLOCATABLE:
            continue
        # where words are not written apart, no seam between them can be asked for
        apart = r"\w" if answer.isascii() else r"\d"
        before, after = (
            f"(?{how}{apart})" if answer.isascii() or end.isdigit() else ""
            for how, end in (("<!", answer[0]), ("!", answer[-1]))
        )
        pattern = before + re.escape(answer) + after
        places = [found.span() for found in re.finditer(pattern, text, re.IGNORECASE)]
        if 0 < len(places) <= _MOST_PLACES:
            located += [(low, high, i) for low, high in places]
    return located


def _seam(task: LongBenchTask, sample: records.Sample, encoded: EncodedPrompt, profile: str) -> int:
    """The character where the question begins: what the template has behind the context."""
    where = sample.where or sample.id
    if sample.prompt is not None:
        raise DataError(
            f"{where}: comes with a complete prompt, so that context and question cannot be told apart; use a "
            "query-aware run"
        )
    tail = task.template(profile).partition("{context}")[2]
    filled = tail.replace("{input}", sample.input)
    return _last(encoded.text, filled if profile == "official" else filled.rstrip(" "), where)


def _last(text: str, tail: str, where: str) -> int:
    place = text.rfind(tail) if tail.strip() else -1
    if place < 0:
        raise DataError(
            f"{where}: the question was cut when the prompt was truncated, so that it cannot be kept apart; give a "
            "larger max_length, or use a query-aware run"
        )
    return place
