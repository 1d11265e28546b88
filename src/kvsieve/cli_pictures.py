"""`kvsieve visualize`, `kvsieve diff` and `kvsieve report`: what was kept, and how runs differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_runs import (
    Budget,
    ChunkSize,
    Debug,
    Device,
    Dtype,
    Model,
    Options,
    Output,
    Pictures,
    Positions,
    Seed,
    load,
    make_contenders,
    make_run,
)
from .errors import DataError, KvsieveError

__all__ = ["diff", "report", "visualize"]

_METHODS = "sink_recent_uniform,streaming_llm,snapkv,h2o"
_OPTIONS = (
    "sink_recent_uniform.sink_tokens=16",
    "sink_recent_uniform.recent_tokens=96",
    "sink_recent_uniform.block_size=16",
)
"""Of the default methods: sinks and recent tokens that leave room for a middle within the default budget."""


def visualize(
    ctx: typer.Context,
    model: Model = "mini-lm",
    policy: Annotated[str | None, typer.Option(help=f"Methods with commas. [default: {_METHODS}]")] = None,
    budget: Budget = None,
    option: Options = None,
    text: Annotated[
        str | None, typer.Option(help="Text file to read. [default: prose with sixteen facts, one asked for]")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens to read, at most.")] = 1024,
    chunk_size: ChunkSize = 64,
    positions: Positions = "original",
    seed: Seed = 42,
    device: Device = None,
    dtype: Dtype = None,
    output: Output = "./visualize_results",
    debug: Debug = False,
) -> None:
    """Let a model read a text and draw what its cache kept: strip, page, pictures."""
    from .report.long_results import PAGE, LongWatcher, load_traces, write_results
    from .report.strip import strip
    from .report.terminal import make_console
    from .tasks.items import plain_item
    from .tasks.ruler_items import demo_items, read_text
    from .tasks.run import load_run, perform

    words = read_text(text) if text is not None else None
    given = list(option or [])
    if policy is None:
        given = [*_OPTIONS, *given]
    # tokens, and not a share of them, are kept at every step: a share would be cut once, when all has been read
    methods = make_contenders(policy or _METHODS, budget or "256", given, model)
    loaded, tokenizer = load(model, device, dtype)
    if words is None:
        items, metrics = demo_items(tokenizer, [length], 1, seed)
    else:
        items, metrics = [plain_item(Path(str(text)).name, words, tokenizer, length)], {"text": "none"}
    run = make_run(
        ctx,
        "visualize",
        loaded,
        tokenizer,
        model,
        items,
        methods,
        metrics=metrics,
        seed=seed,
        chunk_size=chunk_size,
        positions=positions,
    )
    console, folder = make_console(), Path(output)
    with LongWatcher(console) as watcher:
        moved = perform(run, folder, watcher=watcher)
    if moved is not None:
        console.print(f"earlier results moved to {moved}", markup=False)
    files, summary = write_results(folder)
    for trace in load_traces(folder, load_run(folder)[0]):
        console.print()
        console.print(strip(trace, width=min(console.width, 120) - 12))
    for one in summary["failures"]:
        console.print(f"failed: {one['method']} on {one['id']}: {one['error']}", style="red", markup=False)
    console.print(f"\nOpen {folder / PAGE}; {len(files)} files in {folder}", markup=False)
    if summary["failures"]:
        raise typer.Exit(1)


def diff(
    a: Annotated[str, typer.Argument(help="summary.json of a run, its folder, or a file of the earlier script.")],
    b: Annotated[str, typer.Argument(help="What it is compared with.")],
    plot: Annotated[bool, typer.Option("--plot", help="Draw it as well.")] = False,
    output: Annotated[str, typer.Option(help="File for --plot: .png or .svg.")] = "./diff.png",
    debug: Debug = False,
) -> None:
    """Compare two runs sample by sample."""
    from .report.diff import compare_runs, diff_markdown, load_summary

    try:
        found = compare_runs(load_summary(a), load_summary(b))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{a} or {b} is no file of results as kvsieve writes them ({error!r})") from error
    typer.echo(f"A: {a}\nB: {b}\n")
    typer.echo(diff_markdown(found), nl=False)
    if plot:
        from .report.picture_diff import diff_figure
        from .report.pictures import save
        from .report.plots import has_matplotlib

        if not has_matplotlib():
            raise KvsieveError("--plot needs matplotlib: pip install 'kvsieve[plot]'")
        typer.echo(f"\nPicture: {save(diff_figure(found), Path(output))}")


def report(
    folder: Annotated[str, typer.Argument(help="Folder of a run of longbench, ruler or visualize.")],
    pictures: Pictures = True,
    debug: Debug = False,
) -> None:
    """Make tables, pictures and page of a run again from its rows; no model is loaded."""
    from .report.long_results import show_results, write_results
    from .report.terminal import make_console

    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder")
    files, summary = write_results(Path(folder), pictures=pictures)
    show_results(make_console(), summary, files)
    if summary["failures"]:
        raise typer.Exit(1)
