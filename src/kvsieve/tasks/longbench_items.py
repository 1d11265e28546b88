"""The samples of `kvsieve longbench`: tasks by name, from files or the hub, as items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import KvsieveError, PolicyError
from ..hf import text_config
from .demo import DEMO_TASKS, longbench_samples
from .items import Item, choice_item, longbench_item
from .longbench import EXTENDED_TASKS, TASKS, get_task
from .longbench_v2 import MODES, load_questions
from .records import load_samples

__all__ = ["V2", "check_words", "longbench_items", "metrics", "read_demo", "read_tasks", "task_names"]

V2 = "v2"
"""The name under which LongBench v2 is asked for."""
_GROUPS = {
    "all": list(TASKS),
    "en": [name for name, task in TASKS.items() if task.language != "zh"],
    "e": [f"{name}_e" for name in EXTENDED_TASKS],
}
DEMO_TOKENS, DEMO_STOP = 8, "."


def task_names(text: str) -> list[str]:
    """Names with commas; `all`, `en` and `e` stand for groups, `v2` for LongBench v2.

    Raises:
        PolicyError: an unknown name.
    """
    asked = [part.strip() for part in text.split(",") if part.strip()]
    names = list(dict.fromkeys(name for part in asked for name in _GROUPS.get(part, [part])))
    if not names:
        raise PolicyError("no task was named; give names with commas, or all, en, e, v2")
    for name in names:
        if name != V2:
            get_task(name)
    return names


def check_words(names: Sequence[str], profile: str) -> None:
    """Raise where an official score needs jieba to cut Chinese into words and it is not there.

    Raises:
        KvsieveError: so it is.
    """
    needs = [name for name in names if name != V2 and get_task(name).metric in ("qa_f1_zh", "rouge_zh")]
    if needs and profile == "official" and find_spec("jieba") is None:
        raise KvsieveError(
            f"official scores of {', '.join(needs)} need jieba: pip install jieba, or leave these tasks out, or use "
            "--profile fixed, which cuts Chinese into characters"
        )


def read_tasks(names: Sequence[str], data: str | None, limit: int | None) -> dict[str, list[Any]]:
    """The samples of each task.

    Raises:
        DataError, KvsieveError: see `load_samples`.
    """
    return {
        name: list(load_questions(data, limit=limit)) if name == V2 else list(load_samples(name, data, limit=limit))
        for name in names
    }


def read_demo(tokenizer: Any, count: int, seed: int) -> dict[str, list[Any]]:
    """Made-up samples for the demo's tasks."""
    return {name: list(longbench_samples(name, tokenizer, count, seed=seed)) for name in DEMO_TASKS}


def longbench_items(
    samples: Mapping[str, Sequence[Any]],
    model: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    chat: bool = False,
    profile: str = "fixed",
    split: bool = False,
    demo: bool = False,
) -> list[Item]:
    """Items of all tasks.

    Args:
        samples: by task.
        model: its window decides how long a prompt may be, unless `max_length` does.
        tokenizer: a fast tokenizer.
        max_length: tokens of a prompt.
        chat: use the chat template where LongBench does.
        profile: `"fixed"` or `"official"`.
        split: keep question and context apart, for runs that evict before the question is seen.
        demo: an answer ends at its first full stop.

    Raises:
        DataError, KvsieveError: see `longbench_item`.
    """
    items: list[Item] = []
    for name, found in samples.items():
        if name == V2:
            room = max_length or _room(model, MODES["0shot"])
            items += [choice_item(one, tokenizer, room, chat=chat, profile=profile, split=split) for one in found]
            continue
        task = get_task(name)
        room = max_length or _room(model, task.max_new_tokens)
        more: dict[str, Any] = {"max_new_tokens": DEMO_TOKENS, "stop": DEMO_STOP} if demo else {}
        items += [
            longbench_item(task, one, tokenizer, room, chat=chat, profile=profile, split=split, **more) for one in found
        ]
    return items


def metrics(names: Sequence[str]) -> dict[str, str]:
    """The metric of each task, under the names that items have."""
    return {
        "longbench_v2" if name == V2 else name: "accuracy" if name == V2 else get_task(name).metric for name in names
    }


def _room(model: Any, new: int) -> int | None:
    window = getattr(text_config(model), "max_position_embeddings", None)
    return None if window is None else max(1, int(window) - new)
