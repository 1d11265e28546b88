"""A model reads a text within a cache budget and answers: one item, one cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache import SieveCache
from ..errors import DataError, PolicyError, ScoreError
from ..trace import Recorder, Trace, held_by
from ..triggers import OnRequest
from .items import Item, Span

__all__ = ["Answer", "Survival", "answer", "survival"]


@dataclass(frozen=True)
class Survival:
    """How much of the answer was in the cache when it was asked for.

    Attributes:
        share: of all heads of all layers, those that held the whole answer (some place of the text that says it).
        by_layer: the same for each layer.
    """

    share: float
    by_layer: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        text: what was generated, special tokens left out.
        tokens: how many tokens that took, the end included.
        report: `SieveCache.report()` when the answer was asked for.
        tokens_kept: tokens that a head held then, on average.
        kept_share: of the tokens read until then, those that a head held, on average.
        survival: of the answer; None where it cannot be located.
        trace: what was held after every forward pass, if it was recorded.
    """

    text: str
    tokens: int
    report: dict[str, Any]
    tokens_kept: float
    kept_share: float
    survival: Survival | None
    trace: Trace | None


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    cache: SieveCache,
    item: Item,
    *,
    aware: bool = True,
    chunk_size: int = 512,
    record: bool = False,
) -> Answer:
    """Read an item and answer it greedily.

    A policy made with `when="request"` evicts once: after the prompt when the method may know the question (`aware`),
    else before the question is seen. In the first case the last token of the prompt is then taken back and read again,
    so that the first token of the answer already pays for what was evicted, as it would not with a prompt read in one
    go. A model with layers that kvsieve does not manage cannot take back a token: there the eviction comes one token
    earlier.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        cache: for this model, without tokens.
        item: what to read.
        aware: whether the method sees the question before it evicts.
        chunk_size: tokens per forward pass.
        record: keep a trace.

    Raises:
        DataError: the item has no question of its own and `aware` is false, or is too short.
        PolicyError: `chunk_size` is not positive.
        ScoreError: the model's output is not a number.
    """
    if chunk_size < 1:
        raise PolicyError(f"chunk_size must be 1 or more, not {chunk_size}")
    prompt = item.prompt
    if not aware and not (item.context and item.question):
        raise DataError(f"{item.id}: context and question cannot be told apart; use a query-aware run")
    if len(prompt) < 2:
        raise DataError(f"{item.id}: a prompt needs at least two tokens, this one has {len(prompt)}")
    recorder = Recorder(cache) if record else None
    device = next(model.parameters()).device
    takes = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def feed(ids: Sequence[int]) -> torch.Tensor:
        out = model(torch.tensor([ids], device=device), past_key_values=cache, use_cache=True, **options)
        if recorder is not None:
            recorder.step()
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def evict() -> None:
        if isinstance(cache.policy.trigger, OnRequest) and cache.policy.evicts:
            cache.evict()
            if recorder is not None:
                recorder.step()

    again = aware and len(cache.managed) == len(cache.layers)
    first = prompt if again else prompt[:-1] if aware else item.context
    for chunk in _chunks(first, chunk_size):
        feed(chunk)
    evict()
    if again:
        cache.take_back()
        first = prompt[:-1]
    rest = prompt[len(first) :]
    for chunk in _chunks(rest[:-1], chunk_size):
        feed(chunk)
    logits = feed(rest[-1:])
    report, asked = cache.report(), len(prompt)
    held = held_by(cache)
    generated = _generate(model, tokenizer, item, logits, feed)
    text = tokenizer.decode(generated, skip_special_tokens=True)
    found = survival(held, item.answers, item.every) if item.answers else None
    trace = None
    if recorder is not None:
        trace = recorder.trace(**_about(item, tokenizer, generated, asked, text))
    return Answer(
        text=text,
        tokens=len(generated),
        report=report,
        tokens_kept=float(held.sum(-1).mean()),
        kept_share=float(held.mean()),
        survival=found,
        trace=trace,
    )


def survival(held: NDArray[np.bool_], answers: Sequence[Span], every: bool) -> Survival:
    """How much of the answers a cache holds.

    A head holds an answer if it holds all tokens of some place that says it. Where any one answer will do, the one
    that most heads hold counts; where every answer is wanted, the mean over answers does.

    Args:
        held: `[L, Hkv, S]` bool, which tokens each head holds.
        answers: places of the answers.
        every: whether all answers are wanted.
    """
    known = sorted({which for *_, which in answers})
    tables = []
    for which in known:
        places = [held[..., low:high].all(-1) for low, high, one in answers if one == which]
        tables.append(np.logical_or.reduce(places).mean(-1))
    by_layer = np.mean(tables, axis=0) if every else tables[int(np.argmax([table.mean() for table in tables]))]
    return Survival(float(by_layer.mean()), tuple(float(share) for share in by_layer))


def _chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _generate(model: Any, tokenizer: Any, item: Item, logits: torch.Tensor, feed: Any) -> list[int]:
    ends = _ends(model, tokenizer)
    generated: list[int] = []
    for _ in range(item.max_new_tokens):
        if bool(torch.isnan(logits).any()):
            raise ScoreError("the model's output is not a number (NaN); try --dtype float32 or bfloat16")
        barred = [*item.stop_token_ids, *ends] if item.stop_token_ids and not generated else []
        if barred:  # a stop token ends an answer, it is not to be one
            logits = logits.index_fill(0, torch.tensor(barred, device=logits.device), -torch.inf)
        token = int(logits.argmax())
        generated.append(token)
        if token in ends or token in item.stop_token_ids:
            break
        if item.finished(tokenizer.decode(generated, skip_special_tokens=True)):
            break
        if len(generated) < item.max_new_tokens:
            logits = feed([token])
    return generated


def _ends(model: Any, tokenizer: Any) -> set[int]:
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= set(ids) if isinstance(ids, (list, tuple)) else set() if ids is None else {ids}
    return found


def _about(item: Item, tokenizer: Any, generated: Sequence[int], asked: int, text: str) -> dict[str, Any]:
    """What a trace says of the text, the answer behind it included."""
    whole, offsets = item.text, [list(pair) for pair in item.offsets]
    for token in generated[:-1]:
        piece = tokenizer.decode([token])
        offsets.append([len(whole), len(whole) + len(piece)])
        whole += piece
    return {
        "id": item.id,
        "task": item.task,
        "text": whole,
        "offsets": offsets,
        "question": len(item.context) if item.question else None,
        "asked": asked,
        "evidence": [list(span[:2]) for span in item.evidence],
        "answers": [list(span[:2]) for span in item.answers],
        "expected": list(item.expected),
        "answer": text,
    }
