"""The samples of `kvsieve ruler`: RULER's tasks and needles by name, for every length, as items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from . import demo, needle, ruler
from .items import Item, procedural_item
from .longbench_encoding import in_chat
from .ruler_niah import Niah
from .ruler_sample import Sample

__all__ = ["NEEDLES", "demo_items", "read_prose", "read_text", "ruler_items", "task_names"]

NEEDLES = ("needle", "needle_number", "kamradt")
"""Beside RULER's own tasks: a fact with a word or a number, in a form that mini-lm can read, and Kamradt's needle."""


def task_names(text: str) -> list[str]:
    """Names with commas; `all` stands for RULER's thirteen.

    Raises:
        DataError: an unknown name, or none.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    names = [one for name in asked for one in (ruler.list_tasks() if name == "all" else [name])]
    for name in names:
        if name not in NEEDLES and name not in ruler.TASKS:
            raise DataError(f"there is no task {name!r}; there are: {', '.join([*ruler.TASKS, *NEEDLES])}")
    if not names:
        raise DataError("no task was named")
    return list(dict.fromkeys(names))


def ruler_items(
    names: Sequence[str],
    tokenizer: Any,
    lengths: Sequence[int],
    count: int,
    *,
    depths: int | None = None,
    needles: int = 1,
    seed: int = 42,
    chat: bool = False,
    texts: list[str] | None = None,
    questions: str | None = None,
) -> tuple[list[Item], dict[str, str]]:
    """Items, and the metric of each task.

    Args:
        names: from `task_names`.
        tokenizer: a fast tokenizer.
        lengths: tokens of prompt and answer together.
        count: samples for each task and length, or for each cell of a grid.
        depths: make a grid of so many depths.
        needles: facts in a text, for `needle` and `needle_number`.
        seed: decides everything.
        chat: put prompts into the tokenizer's chat template.
        texts: prose for the tasks that read prose.
        questions: file for `qa_1` and `qa_2`.

    Raises:
        DataError, KvsieveError: see `ruler.generate` and `procedural_item`.
    """
    reserve = _template_tokens(tokenizer) if chat else 0
    samples: list[Sample] = []
    for name in names:
        common: dict[str, Any] = {"seed": seed, "reserve": reserve, "texts": texts}
        if name == "kamradt":
            samples += needle.kamradt(
                tokenizer, lengths, 11 if depths is None else depths, texts=texts, reserve=reserve
            )
        elif name in NEEDLES:
            common |= {"needles": needles, "values": "number" if name == "needle_number" else "word"}
            if depths is not None:
                samples += needle.grid(tokenizer, lengths, depths, count, **common)
            else:
                samples += [one for n in lengths for one in needle.generate(tokenizer, n, count, **common)]
        else:
            common |= {"texts": texts if _reads_prose(name) else None, "questions": _questions(name, questions)}
            if depths is not None:
                samples += ruler.grid(name, tokenizer, lengths, depths, count, **common)
            else:
                samples += [one for n in lengths for one in ruler.generate(name, tokenizer, n, count, **common)]
    return [procedural_item(one, tokenizer, chat=chat) for one in samples], {one.task: one.metric for one in samples}


def demo_items(tokenizer: Any, lengths: Sequence[int], count: int, seed: int) -> tuple[list[Item], dict[str, str]]:
    """The same for the demo: see `demo.facts`."""
    samples = [one for length in lengths for one in demo.facts(tokenizer, length, count, seed=seed)]
    return [procedural_item(one, tokenizer) for one in samples], {one.task: one.metric for one in samples}


def read_prose(path: str) -> list[str]:
    """A text file, or all `.txt` files of a folder.

    Raises:
        DataError: there are none.
    """
    place = Path(path)
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path}: no such file, or a folder without .txt files")
    return [read_text(file) for file in files]


def read_text(file: str | Path) -> str:
    """A text file.

    Raises:
        DataError: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _reads_prose(name: str) -> bool:
    kind = ruler.TASKS[name]
    return name == "cwe" or (isinstance(kind, Niah) and kind.type_haystack == "essay")


def _questions(name: str, path: str | None) -> str | None:
    return path if name.startswith("qa_") else None


def _template_tokens(tokenizer: Any) -> int:
    return len(tokenizer(in_chat(tokenizer, "x"), add_special_tokens=False)["input_ids"])
