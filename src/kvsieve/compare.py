"""`compare_compression_methods`: what each method costs on real text, with one call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._compare.cells import FORMAT, PLAN, CellLog, read_rows
from ._compare.settings import Settings
from ._compare.summary import missing_cells, summarise
from ._compare.watcher import Watcher
from ._rowlog import jsonable, read_json, write_text
from .errors import DataError
from .report.plots import has_matplotlib, quality_against_memory
from .report.tables import to_csv, to_markdown

if TYPE_CHECKING:
    import torch

__all__ = ["compare_compression_methods", "merge_results"]


def compare_compression_methods(
    data_path: str | None = None,
    model_name: str = "mini-lm",
    compression_ratio: float = 0.5,
    threshold: float | str = -7.0,
    kvzap_scorer_model: str | None = None,
    max_samples: int | None = None,
    chunk_size: int = 1,
    device: str | None = None,
    output_dir: str = "./comparison_results",
    methods: str | Sequence[str] | None = None,
    sliding_window_size: int = 128,
    n_sink: int = 4,
    n_future_positions: int = 512,
    use_covariance: bool = True,
    use_vnorm: bool = True,
    max_length: int = 8192,
    seed: int = 42,
    dtype: str | torch.dtype | None = None,
    include_observed_attention: bool = True,
    num_gpus: int = 1,
    shard: str | None = None,
    resume: bool = False,
    text_field: str | None = None,
    protect_recent: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the perplexity of texts under several eviction methods, and the cache that each really held.

    Every finished (method, text) is on disk before the next begins; `resume=True` goes on after an interruption and
    ends with the same numbers. Nothing is written before all arguments, the model and the data have been checked.

    Args:
        data_path: JSONL file with one text per line; by default the Python language reference.
        model_name: a bundled model, a folder, or a Hub id of a causal language model.
        compression_ratio: share that ratio methods **remove**, in [0, 1), held at every step of the text.
        threshold: score below which kvzap evicts what leaves its window; `"match"` looks for the threshold that
            removes as much as `compression_ratio`.
        kvzap_scorer_model: folder or Hub id of kvzap's surrogate; the bundled one for a bundled model.
        max_samples: use no more texts than this.
        chunk_size: tokens per forward pass. 1 is exact, and done in one pass where that gives the same numbers.
        device: such as `"cpu"` or `"cuda:1"`; a GPU if there is one by default.
        output_dir: folder for results. Without `resume` and `shard` what an earlier run left there moves to
            `previous-1` and so on within it.
        methods: names, or one string with commas; `"all"` for every registered method; by default `baseline`, `kvzap`,
            `random`, `streaming_llm`, `expected_attention`, `observed_attention`. The baseline always runs.
        sliding_window_size: last tokens that kvzap never evicts.
        n_sink: first tokens that no method evicts, `random` included, so that all choose among the same tokens.
        n_future_positions, use_covariance, use_vnorm: see `expected_attention`.
        max_length: tokens per text; lowered to what the model was made for.
        seed: for methods that draw numbers (each text has its own, derived from it) and for intervals.
        dtype: `"float32"`, `"bfloat16"`, ...; by default float32 for bundled models, else as stored.
        include_observed_attention: leave it out of the default methods and of `"all"` if false.
        num_gpus: worker processes, one per GPU.
        shard: `"i/n"`: do every n-th cell, beginning with the i-th (from 0). Results are written once all shards'
            rows lie in `output_dir`.
        resume: keep rows that are there and do the rest; failed cells are tried again.
        text_field: field of the JSONL records that holds the text.
        protect_recent: last tokens that no ratio method evicts; 0 leaves it to each method.
        quiet: print nothing.

    Returns:
        The content of `comparison_summary.json`, with that of `detailed_results.json` under `"detailed"`, the files
        written under `"files"`, and the number of cells still to be done by other shards under `"missing_cells"`
        (where that is not 0 there are no results yet). A method with a failed cell has `"status": "failed"`.

    Raises:
        KvsieveError: a value outside its range, data or a model that cannot be used, a method that does not fit.
    """
    settings = Settings(
        data_path=None if data_path is None else str(data_path),
        model_name=str(model_name),
        compression_ratio=compression_ratio,
        threshold=threshold,
        kvzap_scorer_model=None if kvzap_scorer_model is None else str(kvzap_scorer_model),
        max_samples=max_samples,
        chunk_size=chunk_size,
        device=None if device is None else str(device),
        output_dir=str(output_dir),
        methods=_names(methods),
        sliding_window_size=sliding_window_size,
        n_sink=n_sink,
        n_future_positions=n_future_positions,
        use_covariance=use_covariance,
        use_vnorm=use_vnorm,
        max_length=max_length,
        seed=seed,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        include_observed_attention=include_observed_attention,
        num_gpus=num_gpus,
        shard=shard,
        resume=resume,
        text_field=text_field,
        protect_recent=protect_recent,
    )
    # Torch is imported after the values have been checked, so that a slip of the keyboard is answered at once.
    from ._compare.plan import describe, prepare
    from ._compare.run import devices_for, run

    devices = devices_for(settings)
    folder = Path(settings.output_dir)
    plan = prepare(settings, devices[0] if devices else None)
    about = describe(plan)
    with CellLog(folder, settings.part, resume) as log:
        write_text(folder / PLAN, _json(about))
        if quiet:
            run(plan, log, devices, Watcher())
        else:
            _run_visibly(plan, log, devices)
    return _finish(folder, about, quiet)


def merge_results(output_dir: str = "./comparison_results", quiet: bool = False) -> dict[str, Any]:
    """Make the result files from the rows in `output_dir`, once all shards are there. No model is loaded.

    Returns:
        As `compare_compression_methods`.

    Raises:
        DataError: there is no plan, or cells are missing.
    """
    folder = Path(output_dir)
    about = read_json(folder / PLAN, "run `kvsieve compare` with this output folder first")
    if about.get("format") != FORMAT:
        raise DataError(f"{folder / PLAN} has format {about.get('format')!r}; this version reads {FORMAT}")
    result = _finish(folder, about, quiet)
    if result["missing_cells"]:
        raise DataError(
            f"{result['missing_cells']} of {len(about['cells'])} cells are missing in {folder}; run the remaining "
            "shards with the same settings first"
        )
    return result


def _names(methods: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if methods is None:
        return None
    return tuple(methods.split(",")) if isinstance(methods, str) else tuple(methods)


def _json(value: Any) -> str:
    return json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n"


def _run_visibly(plan: Any, log: CellLog, devices: list[str]) -> None:
    from ._compare.run import run
    from .report.terminal import TerminalWatcher, make_console

    console = make_console()
    if log.moved_to is not None:
        console.print(f"earlier results moved to {log.moved_to}", markup=False)
    with TerminalWatcher(console) as watcher:
        run(plan, log, devices, watcher)


def _finish(folder: Path, about: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Write the result files if every cell has a row."""
    rows = read_rows(folder)
    missing = missing_cells(about, rows)
    files: list[Path] = []
    summary: dict[str, Any] = {"baseline_perplexity": None, "results": [], "notes": about["notes"], "run": about["run"]}
    detailed: dict[str, Any] = {}
    messages = []
    if missing:
        messages.append(f"{missing} of {len(about['cells'])} cells are left to other shards; no results written yet")
    else:
        detailed, summary = summarise(about, rows)
        contents = {
            "detailed_results.json": _json(detailed),
            "comparison_summary.json": _json(summary),
            "comparison.csv": to_csv(jsonable(summary)),
            "comparison.md": to_markdown(summary),
        }
        for name, content in contents.items():
            write_text(folder / name, content)
            files.append(folder / name)
        if has_matplotlib():
            write_text(folder / "comparison.png", quality_against_memory(summary))
            files.append(folder / "comparison.png")
        else:
            messages.append("no plot: matplotlib is not installed (pip install 'kvsieve[plot]')")
        messages.append(f"Results: {', '.join(file.name for file in files)} in {folder}")
    if not quiet:
        _show(summary, messages)
    return summary | {"detailed": detailed, "files": [str(file) for file in files], "missing_cells": missing}


def _show(summary: dict[str, Any], messages: list[str]) -> None:
    from .report.terminal import make_console, print_summary

    console = make_console()
    if summary["results"]:
        print_summary(console, summary)
    for message in messages:
        console.print(message, markup=False)
