"""`kvsieve ruler`: what was hidden in long texts, found again within a budget, compared with the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Output,
    Pictures,
    Policies,
    Positions,
    Resume,
    Seed,
    Traces,
    load,
    make_contenders,
    make_run,
    numbers,
    perform_run,
    wraps,
)
from .errors import PolicyError

__all__ = ["ruler"]

_SAMPLES = 24


def ruler(
    ctx: typer.Context,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="RULER's tasks with commas (all: the 13 of them), needle, needle_number (facts that mini-lm can find) "
            "or kamradt. [default: needle for mini-lm, else niah_single_1]"
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together; several with commas.")] = "1024",
    samples: Annotated[
        int | None,
        typer.Option(help="For each task and length [default: 24]; with --grid, for each cell [default: 1]."),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="The answer at every depth for every length.")] = False,
    depths: Annotated[int, typer.Option(help="How many depths a grid has.")] = 11,
    needles: Annotated[int, typer.Option(help="needle: facts in a text, one of which is asked for.")] = 1,
    texts: Annotated[str | None, typer.Option(help="Prose for the haystack: a .txt file or a folder of them.")] = None,
    questions: Annotated[str | None, typer.Option(help="qa_1, qa_2: file in SQuAD's or HotpotQA's format.")] = None,
    model: Model = "mini-lm",
    policy: Policies = None,
    budget: Budget = None,
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
    output: Output = "./ruler_results",
    resume: Resume = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Sixteen facts in 1,024 tokens, a quarter kept, in two minutes.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Find what was hidden in a long text: RULER's tasks and needles, made offline, under eviction."""
    from .tasks.ruler_items import demo_items, read_prose, ruler_items, task_names

    if demo and (tasks or grid or needles != 1):
        raise PolicyError("--demo has its own samples; leave --tasks, --grid and --needles out")
    wanted = numbers(lengths, "lengths")
    names = task_names(tasks or ("needle" if model == "mini-lm" else "niah_single_1"))
    methods = make_contenders(policy or (DEMO_POLICIES if demo else POLICIES), budget or "0.25", option, model)
    prose = None if texts is None else read_prose(texts)
    loaded, tokenizer = load(model, device, dtype)
    wrap, count = wraps(chat, tokenizer) and not demo, samples
    if count is None:
        count = 1 if grid else _SAMPLES
    if demo:
        items, metrics = demo_items(tokenizer, wanted, count, seed)
    else:
        items, metrics = ruler_items(
            names,
            tokenizer,
            wanted,
            count,
            depths=depths if grid else None,
            needles=needles,
            seed=seed,
            chat=wrap,
            texts=prose,
            questions=questions,
        )
    run = make_run(
        ctx,
        "ruler",
        loaded,
        tokenizer,
        model,
        items,
        methods,
        metrics=metrics,
        seed=seed,
        aware=not query_agnostic,
        chunk_size=chunk_size,
        positions=positions,
        traced=traces,
        about={"lengths": wanted, "samples_per_group": count, "chat": wrap, "grid": grid},
    )
    if demo:
        run.notes.append("A text holds sixteen facts about different people; one of them is asked for at the end.")
    perform_run(run, Path(output), resume, pictures=pictures)
