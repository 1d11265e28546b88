"""A run: every method on every item, one row each on disk before the next begins, and a summary made from the rows.

What a folder holds:

| file | what |
|---|---|
| `run.json` | what was asked: command, model, versions, hardware, methods, items |
| `samples.jsonl` | a row per method and item; the same for the same run, whenever it was interrupted |
| `timings.jsonl` | seconds per row, which are never the same |
| `traces/METHOD/ITEM.npz` | what the cache held after every forward pass, of some items |
| `summary.json`, `summary.md`, `summary.csv` | results |
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._identity import digest, identity_of, surrogate_fingerprint
from .._rowlog import RowLog, jsonable, read_json, read_rows, write_text
from ..cache import SieveCache
from ..errors import DataError, PolicyError
from ..hf import text_config
from ..triggers import OnRequest
from .contenders import FULL, Contender
from .items import Item
from .reader import Answer, answer

__all__ = ["FORMAT", "ROWS", "RUN", "SUMMARY", "Run", "load_run", "missing", "perform", "trace_path"]

FORMAT = 1
RUN, ROWS, TIMES, SUMMARY, TRACES = "run.json", "samples.jsonl", "timings.jsonl", "summary.json", "traces"
OTHERS = (RUN, TIMES, SUMMARY, "summary.md", "summary.csv", "report.html", "pictures", TRACES)


@dataclass
class Run:
    """Everything a run needs, in memory.

    Attributes:
        kind: `"ruler"`, `"longbench"` or `"visualize"`.
        model: in evaluation mode.
        tokenizer: its tokenizer.
        model_name: as the user gave it.
        contenders: the methods, the full cache first.
        items: what is read, in this order.
        metrics: the metric of each task.
        command: the line that asks for the same run.
        seed: of methods that draw numbers, and of intervals.
        aware: whether methods see the question before they evict.
        chunk_size: tokens per forward pass.
        positions: see `SieveCache`.
        traced: items of each task and length, from the first, whose traces are kept.
        about: further settings that numbers depend on.
        notes: for the reader of the results.
    """

    kind: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    model_name: str
    contenders: list[Contender]
    items: list[Item]
    metrics: dict[str, str]
    command: str
    seed: int = 42
    aware: bool = True
    chunk_size: int = 512
    positions: str = "original"
    traced: int = 1
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("there is nothing to read: no samples")
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise DataError(
                    f"two samples have the id {item.id!r}; ids must differ, or --resume could not tell them"
                )
            seen.add(item.id)
        device = next(self.model.parameters()).device
        self.identity = identity_of(self.model, str(device), ("tasks/",))
        if self.chunk_size < 1 or self.traced < 0:
            raise PolicyError(
                f"chunk_size must be 1 or more and traces 0 or more, not {self.chunk_size} and {self.traced}"
            )
        if self.positions not in ("original", "slot"):
            raise PolicyError(f"positions must be original or slot, not {self.positions!r}")
        labels = [contender.label for contender in self.contenders]
        if len(set(labels)) < len(labels):
            raise PolicyError(f"two methods have the same name and budget: {', '.join(labels)}")
        self._surrogates = {one.label: _fingerprint(one) for one in self.contenders}
        for contender in self.contenders:
            SieveCache(self.model, contender.policy(self.seed, ""), self.positions)
        self._check_length()

    def key(self, contender: Contender, item: Item) -> str:
        """A hash of all that a row depends on."""
        options = {key: str(value) for key, value in contender.options.items()}
        policy = [contender.label, contender.name, str(contender.budget), options, self._surrogates[contender.label]]
        how = [self.seed, self.aware, self.chunk_size, self.positions]
        what = [item.id, item.context, item.question, item.max_new_tokens, item.expected, item.scoring]
        return digest([self.identity, policy, how, what])

    def recorded(self) -> set[str]:
        """Ids of the items whose traces are kept."""
        counts: dict[Any, int] = {}
        chosen = set()
        for item in self.items:
            group = (item.task, item.length if self.kind != "longbench" else None)
            counts[group] = counts.get(group, 0) + 1
            if counts[group] <= self.traced:
                chosen.add(item.id)
        return chosen

    def describe(self) -> dict[str, Any]:
        """The run as JSON: with the rows it is all that a summary needs, without model or data."""
        tasks = {item.task: 0 for item in self.items}
        for item in self.items:
            tasks[item.task] += 1
        return {
            "format": FORMAT,
            "kind": self.kind,
            "run": {
                "command": self.command,
                "model": self.model_name,
                "dtype": self.identity["dtype"],
                "device": self.identity["device"],
                "weights_fingerprint": self.identity["weights"],
                "data_fingerprint": digest([[item.id, item.prompt, item.expected] for item in self.items]),
                "versions": {key: self.identity[key] for key in ("kvsieve", "torch", "transformers")}
                | {"python": platform.python_version()},
                "hardware": {
                    "device": self.identity["device"],
                    "cpus": os.cpu_count(),
                    "threads": torch.get_num_threads(),
                    "machine": platform.machine(),
                },
                "seed": self.seed,
                "mode": "query-aware" if self.aware else "query-agnostic",
                "chunk_size": self.chunk_size,
                "positions": self.positions,
                **self.about,
            },
            "tasks": [{"name": name, "metric": self.metrics[name], "samples": n} for name, n in tasks.items()],
            "methods": [
                {
                    "label": one.label,
                    "name": one.name,
                    "budget": one.asked,
                    "steady": _steady(one, self.seed),
                    "options": {key: str(value) for key, value in one.options.items()},
                }
                for one in self.contenders
            ],
            "items": [
                {
                    "id": item.id,
                    "task": item.task,
                    "length": item.length,
                    "depth": item.depth,
                    "prompt_tokens": len(item.prompt),
                    "answerable": bool(item.answers),
                }
                for item in self.items
            ],
            "keys": [[self.key(one, item) for item in self.items] for one in self.contenders],
            "notes": self.notes,
        }

    def _check_length(self) -> None:
        longest = max(len(item.prompt) + item.max_new_tokens for item in self.items)
        window = getattr(text_config(self.model), "max_position_embeddings", None)
        if window is not None and longest > window and self.positions == "original":
            self.notes.append(
                f"The longest prompt and its answer take {longest:,} tokens, but {self.model_name} was made for "
                f"{window:,}: scores beyond that say nothing about eviction."
            )


class Watcher:
    """Told about progress; does nothing."""

    def begin(self, run: Run, total: int, finished: int) -> None:
        """Before the first row."""

    def started(self, label: str) -> None:
        """Before each row."""

    def done(self, row: dict[str, Any]) -> None:
        """After each row."""


def perform(run: Run, folder: Path, *, resume: bool = False, watcher: Watcher | None = None) -> Path | None:
    """Work through the rows that are not there yet.

    Args:
        run: what to do.
        folder: where files go. Without `resume` what an earlier run left there moves to `previous-1` and so on.
        resume: keep finished rows, by sample; failed ones are tried again.
        watcher: told about progress.

    Returns:
        Where an earlier run's files went, if there were any.

    Raises:
        KvsieveError: another process works in this folder, or it cannot be written.
    """
    watcher = watcher or Watcher()
    recorded, plan = run.recorded(), run.describe()
    with RowLog(folder / ROWS, resume, OTHERS) as log:
        if resume and (folder / RUN).is_file():
            _check_same(read_json(folder / RUN), plan, folder)
        write_text(folder / RUN, json.dumps(jsonable(plan), indent=1) + "\n")
        rows = read_rows([folder / ROWS])
        work = [
            (one, item, key)
            for one, keys in zip(run.contenders, plan["keys"], strict=True)
            for item, key in zip(run.items, keys, strict=True)
        ]
        todo = [piece for piece in work if rows.get(piece[2], {}).get("status") != "ok"]
        watcher.begin(run, len(work), len(work) - len(todo))
        with (folder / TIMES).open("a", encoding="utf-8") as times:
            for contender, item, key in todo:
                watcher.started(contender.label)
                start = time.perf_counter()
                keep = trace_path(folder, contender.label, item.id)
                traced = item.id in recorded and contender.name != FULL
                row = _row(run, contender, item, key, keep if traced else None)
                seconds = time.perf_counter() - start
                log.append(row)
                times.write(json.dumps({"key": key, "seconds": round(seconds, 4)}) + "\n")
                times.flush()
                watcher.done(row)
    return log.moved_to


def trace_path(folder: Path, label: str, item: str) -> Path:
    """Where the trace of a method on an item is kept."""
    return folder / TRACES / _file_name(label) / f"{_file_name(item)}.npz"


def load_run(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, float]]:
    """What a folder holds: `Run.describe()`, the rows by key, and seconds by key.

    Raises:
        DataError: there is no run, or one of another version.
    """
    plan = read_json(folder / RUN, "give the folder that `kvsieve longbench` or `kvsieve ruler` wrote")
    if not isinstance(plan, dict) or plan.get("format") != FORMAT or "keys" not in plan:
        raise DataError(f"{folder / RUN} was not written by this version of kvsieve")
    rows = read_rows([folder / ROWS] if (folder / ROWS).is_file() else [])
    seconds: dict[str, float] = {}
    if (folder / TIMES).is_file():
        for line in (folder / TIMES).read_text(encoding="utf-8").splitlines():
            try:
                one = json.loads(line)
                seconds[one["key"]] = float(one["seconds"])
            except (ValueError, KeyError, TypeError):  # half a line of a killed run
                continue
    return plan, rows, seconds


def missing(plan: dict[str, Any], rows: dict[str, dict[str, Any]]) -> int:
    """Rows that a run still owes; failed ones not counted."""
    return sum(key not in rows for keys in plan["keys"] for key in keys)


def _row(run: Run, contender: Contender, item: Item, key: str, keep: Path | None) -> dict[str, Any]:
    """One row. A failure is a row too: it must neither cost the others nor go missing."""
    row: dict[str, Any] = {"key": key, "method": contender.label, "id": item.id, "task": item.task}
    found: Answer | None = None
    try:
        policy = contender.policy(run.seed, item.id)
        cache = SieveCache(run.model, policy, run.positions)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(run.seed)
            found = answer(
                run.model, run.tokenizer, cache, item,
                aware=run.aware, chunk_size=run.chunk_size, record=keep is not None,
            )  # fmt: skip
        score = None if item.score is None else item.score(found.text)
        if keep is not None and found.trace is not None:
            about = {**found.trace.about, "method": contender.label, "budget": contender.asked, "score": score}
            guard = policy.protect
            about |= {"model": run.model_name, "sink_tokens": guard.sink, "recent_tokens": guard.recent}
            found.trace.with_about(about).save(keep)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        said = {} if found is None else {"text": found.text}
        return row | {"status": "failed", "error": what, "traceback": traceback.format_exc(), **said}
    report = found.report
    return row | {
        "status": "ok",
        "score": score,
        "text": found.text,
        "expected": list(item.expected),
        "prompt_tokens": len(item.prompt),
        "new_tokens": found.tokens,
        "kept_share": found.kept_share,
        "tokens_kept": found.tokens_kept,
        "bytes_held": report["bytes_held"],
        "bytes_full": report["bytes_full"],
        "evictions": report["evictions"],
        "unmanaged_layers": {str(index): kind for index, kind in report["unmanaged_layers"].items()},
        "survival": None if found.survival is None else found.survival.share,
        "survival_by_layer": None if found.survival is None else list(found.survival.by_layer),
    }


def _steady(contender: Contender, seed: int) -> bool:
    """Whether it evicts as it reads, and not once at the end."""
    policy = contender.policy(seed, "")
    return policy.evicts and not isinstance(policy.trigger, OnRequest)


def _fingerprint(contender: Contender) -> str:
    """Of the surrogate, which may be trained anew under the same name."""
    scorer = contender.options.get("scorer")
    return surrogate_fingerprint(scorer) if isinstance(scorer, str) else ""


_SAME = ("model", "weights_fingerprint", "dtype", "seed", "mode", "chunk_size", "positions", "profile")


def _check_same(stored: Any, plan: dict[str, Any], folder: Path) -> None:
    """More methods and more samples can be added to a run; other settings make another one of it."""
    before, now = stored.get("run", {}) if isinstance(stored, dict) else {}, plan["run"]
    for name in _SAME:
        if before.get(name) != now.get(name):
            raise DataError(
                f"{folder} holds a run with {name.replace('_', ' ')} {before.get(name)}, not {now.get(name)}; choose "
                "another folder, or leave out --resume to set that run aside"
            )


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.@+=-]+", "_", text).strip("._") or "item"
