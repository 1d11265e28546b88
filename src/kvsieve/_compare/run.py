"""Doing the work: cells one after another, or on several devices at once."""

from __future__ import annotations

import math
import multiprocessing
import queue
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import KvsieveError, PolicyError, ScoreError
from .cells import CellLog, read_rows
from .plan import Cell, Plan, prepare
from .settings import Settings
from .watcher import Watcher

__all__ = ["devices_for", "run"]


def devices_for(settings: Settings) -> list[str]:
    """One device per worker; empty for a run in this process.

    Raises:
        PolicyError: more GPUs asked for than there are, or `device` names one as well.
    """
    if settings.num_gpus == 1:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.device not in (None, "cuda"):
        raise PolicyError(f"num_gpus={settings.num_gpus} uses GPUs 0 to {settings.num_gpus - 1}; leave device out")
    if settings.num_gpus > count:
        raise PolicyError(
            f"num_gpus={settings.num_gpus}, but this machine has {count} usable GPUs; on a machine without GPUs leave "
            "num_gpus at 1, or split the work by hand with --shard i/n"
        )
    return [f"cuda:{i}" for i in range(settings.num_gpus)]


def run(plan: Plan, log: CellLog, devices: Sequence[str], watcher: Watcher) -> None:
    """Work through this shard's cells that have no result yet, and append a row for each.

    Args:
        plan: the model, the texts and the methods.
        log: where rows go.
        devices: one worker process for each; none to work in this process.
        watcher: told about progress.

    Raises:
        KvsieveError: a worker died. Rows so far are on disk.
    """
    index, count = log.part
    rows = read_rows(log.folder)
    mine = [cell for i, cell in enumerate(plan.cells()) if i % count == index]
    todo = [cell for cell in mine if rows.get(cell.key, {}).get("status") != "ok"]
    watcher.begin(plan, len(mine), len(mine) - len(todo))
    work = _elsewhere(plan, todo, devices, watcher) if devices and todo else _here(plan, todo, watcher)
    for row in work:
        log.append(row)
        watcher.done(row)


def _here(plan: Plan, cells: Sequence[Cell], watcher: Watcher) -> Iterator[dict[str, Any]]:
    for cell in cells:
        watcher.started(plan.methods[cell.method].label)
        yield _execute(plan, cell)


def _execute(plan: Plan, cell: Cell) -> dict[str, Any]:
    """One cell's row. A failure is a row too: it must not cost the other cells."""
    from ..text.likelihood import perplexity

    method, sample = plan.methods[cell.method], plan.samples[cell.sample]
    row: dict[str, Any] = {"key": cell.key, "method": method.label, "sample": sample.id}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(cell.seed)
            score = perplexity(plan.model, sample.tokens, method.policy(cell.seed), chunk_size=plan.settings.chunk_size)
        total = math.fsum(score.nll.tolist())
        if math.isnan(total):
            raise ScoreError("the model's output is not a number (NaN); try --dtype float32 or bfloat16")
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return row | {"status": "failed", "error": what, "traceback": traceback.format_exc()}
    return row | {
        "status": "ok",
        "nll": total,
        "tokens": score.tokens,
        "keys_seen": score.keys_seen,
        "keys_held": score.keys_held,
        "bytes_held": score.bytes_held,
        "bytes_full": score.bytes_full,
        "mean_visible_keys": score.mean_visible_keys,
        "mode": score.mode,
        "chunk_size": score.chunk_size,
        "seed": cell.seed,
        "seconds": score.seconds,
    }


# ---- worker processes


def _elsewhere(plan: Plan, cells: list[Cell], devices: Sequence[str], watcher: Watcher) -> Iterator[dict[str, Any]]:
    """Rows as worker processes finish them. Workers take cells from one queue and write no files."""
    spawn = multiprocessing.get_context("spawn")
    tasks: Any = spawn.Queue()
    results: Any = spawn.Queue()
    for cell in cells:
        tasks.put(cell)
    for _ in devices:
        tasks.put(None)
    settings = _settled(plan)
    plan.model = None  # its device is needed by a worker
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    workers = [spawn.Process(target=_worker, args=(settings, device, tasks, results)) for device in devices]
    try:
        for worker in workers:
            worker.start()
        left = len(cells)
        while left:
            message = _next(results, workers, devices)
            if isinstance(message, str):
                watcher.started(message)
            else:
                left -= 1
                yield message
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()


def _settled(plan: Plan) -> Settings:
    """Settings with the threshold that was found, so that workers do not look for it again."""
    found = [method.asked for method in plan.methods if method.kind == "threshold"]
    return replace(plan.settings, threshold=found[0]) if found and found[0] is not None else plan.settings


def _next(results: Any, workers: Sequence[Any], devices: Sequence[str]) -> Any:
    get: Callable[..., Any] = results.get
    while True:
        try:
            return get(timeout=1.0)
        except queue.Empty:
            for worker, device in zip(workers, devices, strict=True):
                if worker.exitcode:
                    raise KvsieveError(
                        f"the worker on {device} ended with exit code {worker.exitcode}; finished cells are kept, go "
                        "on with --resume"
                    ) from None


def _worker(settings: Settings, device: str, tasks: Any, results: Any) -> None:
    plan = prepare(settings, device)
    while (cell := tasks.get()) is not None:
        results.put(plan.methods[cell.method].label)
        results.put(_execute(plan, cell))
