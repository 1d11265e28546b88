"""Samples for the demos: what the bundled model can do, so that what a method costs can be seen offline."""

from __future__ import annotations

from typing import Any

from . import needle
from .records import Sample
from .ruler_sample import Sample as Procedural

__all__ = ["DEMO_TASKS", "facts", "longbench_samples"]

DEMO_TASKS = ("triviaqa", "trec")
"""LongBench tasks whose prompts and metrics the demo's samples have: F1 of words, classification."""
FACTS = 16
"""Facts in a text; one of them is asked for. Each new one is read with an eye on those before it, so that methods
which count attention have something to go by."""


def facts(tokenizer: Any, length: int, count: int, *, values: str = "word", seed: int = 42) -> list[Procedural]:
    """Sixteen facts in prose, one of which is asked for; see `needle.generate`."""
    return needle.generate(tokenizer, length, count, needles=FACTS, seed=seed, values=values)


def longbench_samples(task: str, tokenizer: Any, count: int, *, length: int = 1024, seed: int = 42) -> list[Sample]:
    """Made-up samples in LongBench's format, for a name of `DEMO_TASKS`.

    The texts are those of `facts`; the question is LongBench's `input`, and the context ends before it.
    """
    made = facts(tokenizer, length, count, seed=seed + DEMO_TASKS.index(task))
    classes = needle.listed("words") if task == "trec" else ()
    return [
        Sample(
            id=f"demo-{i}",
            dataset=task,
            context=one.context,
            input=one.question + one.answer_prefix,
            answers=one.answers,
            classes=classes,
            length=len(one.context.split()),
            language="en",
            where=f"demo sample {i} of {task}",
        )
        for i, one in enumerate(made)
    ]
