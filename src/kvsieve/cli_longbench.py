"""`kvsieve longbench`: LongBench within a budget, compared with the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_runs import (
    DEMO_POLICIES,
    POLICIES,
    Agnostic,
    Budget,
    Chat,
    ChunkSize,
    Debug,
    Device,
    Dtype,
    Model,
    Options,
    Pictures,
    Policies,
    Positions,
    Resume,
    Seed,
    Traces,
    load,
    make_contenders,
    make_run,
    perform_run,
    wraps,
)
from .errors import PolicyError

if TYPE_CHECKING:
    from .tasks.contenders import Contender

__all__ = ["longbench"]

_STRATEGIES = ("none", "sink_recent", "sink_recent_uniform", "uniform")
"""What `--strategy` takes: the words of an earlier script."""
_DEMO_SAMPLES = 12


def longbench(
    ctx: typer.Context,
    dataset: Annotated[
        str | None,
        typer.Option(help="Tasks with commas; all (21), en, e (LongBench-E) or v2. [default: qasper]"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="JSONL, JSON or parquet file, or a folder with one for each task. [default: Hub]")
    ] = None,
    num_examples: Annotated[int | None, typer.Option(help="Samples of each task, at most.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt; longer ones lose their middle. [default: what fits]")
    ] = None,
    profile: Annotated[str, typer.Option(help="fixed, or official to reproduce the published scripts.")] = "fixed",
    model: Model = "mini-lm",
    policy: Policies = None,
    budget: Budget = None,
    strategy: Annotated[
        str | None, typer.Option(help="In place of --policy: sink_recent, sink_recent_uniform (uniform) or none.")
    ] = None,
    sink_tokens: Annotated[int, typer.Option(help="--strategy: first tokens that stay.")] = 256,
    recent_tokens: Annotated[int, typer.Option(help="--strategy: last tokens that stay.")] = 1024,
    middle_budget: Annotated[int, typer.Option(help="--strategy: tokens that stay in between.")] = 2816,
    resample: Annotated[
        str, typer.Option(help="--strategy: history (even over the text), or slots as the earlier script did.")
    ] = "history",
    option: Options = None,
    query_agnostic: Agnostic = False,
    chunk_size: ChunkSize = 512,
    positions: Positions = "original",
    chat: Chat = "auto",
    traces: Traces = 1,
    pictures: Pictures = True,
    seed: Seed = 42,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[
        str, typer.Option(help="Folder for results; NAME.json also writes the earlier script's file.")
    ] = "./longbench_results",
    resume: Resume = False,
    demo_mode: Annotated[
        bool, typer.Option("--demo_mode", "--demo", help="Made-up samples that mini-lm can do, in two minutes.")
    ] = False,
    debug: Debug = False,
) -> None:
    """LongBench under eviction: all 21 tasks and v2, with the published prompts and metrics."""
    from .tasks.longbench_items import check_words, longbench_items, metrics, read_demo, read_tasks, task_names
    from .tasks.metrics_text import check_profile

    check_profile(profile)
    if demo_mode and (data or dataset):
        raise PolicyError("--demo_mode has its own samples; leave --data and --dataset out")
    methods = _strategy(strategy, policy or budget or option, sink_tokens, recent_tokens, middle_budget, resample)
    if methods is None:
        names = policy or (DEMO_POLICIES if demo_mode else POLICIES)
        methods = make_contenders(names, budget or "0.25", option, model)
    # samples come before the model, so that a missing file is said at once
    wanted = [] if demo_mode else task_names("qasper" if dataset is None else dataset)
    check_words(wanted, profile)
    read = read_tasks(wanted, data, num_examples)
    loaded, tokenizer = load(model, device, dtype)
    if demo_mode:
        read = read_demo(tokenizer, _DEMO_SAMPLES if num_examples is None else num_examples, seed)
    wrap = wraps(chat, tokenizer) and not demo_mode
    items = longbench_items(
        read,
        loaded,
        tokenizer,
        max_length=max_length,
        chat=wrap,
        profile=profile,
        split=query_agnostic,
        demo=demo_mode,
    )
    about: dict[str, Any] = {"profile": profile, "max_length": max_length, "chat": wrap}
    if strategy:
        about["strategy"] = {
            "strategy": strategy,
            "sink_tokens": sink_tokens,
            "recent_tokens": recent_tokens,
            "middle_budget": middle_budget,
        }
    run = make_run(
        ctx,
        "longbench",
        loaded,
        tokenizer,
        model,
        items,
        methods,
        metrics=metrics(list(read)),
        seed=seed,
        aware=not query_agnostic,
        chunk_size=chunk_size,
        positions=positions,
        traced=traces,
        about=about,
    )
    if demo_mode:
        run.notes.append(
            "Demo samples are made up (sixteen facts in prose, one of them asked for) and answers end at their first "
            "full stop: these scores do not compare with published ones."
        )
    file = Path(output)
    named = file.suffix == ".json"
    perform_run(run, file.with_suffix("") if named else file, resume, file if named else None, pictures)


def _strategy(
    strategy: str | None,
    other: object,
    sink: int,
    recent: int,
    middle: int,
    resample: str,
) -> list[Contender] | None:
    """The flags of the earlier script as methods."""
    from .tasks.contenders import FULL, contenders

    if strategy is None:
        return None
    if other:
        raise PolicyError("give --strategy with its token numbers, or --policy with --budget and --option, not both")
    if strategy not in _STRATEGIES:
        raise PolicyError(f"--strategy must be one of {', '.join(_STRATEGIES)}, not {strategy!r}")
    for flag, value in (("sink_tokens", sink), ("recent_tokens", recent), ("middle_budget", middle)):
        if value < 0:
            raise PolicyError(f"--{flag} must be 0 or more, not {value}")
    if strategy == "none":
        return contenders([FULL], [])
    name = "sink_recent" if strategy == "sink_recent" else "sink_recent_uniform"
    given: dict[str, Any] = {"sink_tokens": sink, "recent_tokens": recent}
    amount = sink + recent
    if name == "sink_recent_uniform":
        given["resample"] = resample
        amount += middle
    return contenders([name], [amount], {name: given})
