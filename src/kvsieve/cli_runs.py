"""What the commands that read long texts have in common: flags, methods, the run, its results."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import few_threads, typed_flags
from .errors import PolicyError

if TYPE_CHECKING:
    from .tasks.contenders import Contender
    from .tasks.items import Item
    from .tasks.run import Run

__all__ = ["DEMO_POLICIES", "POLICIES", "load", "make_contenders", "make_run", "numbers", "perform_run", "wraps"]

POLICIES = "snapkv,streaming_llm,random"
"""The methods of a run that names none."""
DEMO_POLICIES = "snapkv,tova,h2o,streaming_llm,random"

Model = Annotated[str, typer.Option(help="Bundled model, folder, or Hub id.")]
Policies = Annotated[str | None, typer.Option(help="Methods with commas, or all. The full cache always runs.")]
Budget = Annotated[
    str | None,
    typer.Option(help="What is kept: 0.25 (share), 1024 (tokens), 512MiB (bytes); several with commas."),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", help="METHOD.NAME=VALUE, such as snapkv.window_size=16; repeatable.")
]
Agnostic = Annotated[
    bool,
    typer.Option(
        "--query-agnostic/--query-aware", help="Evict before the question is seen, or with it. [default: aware]"
    ),
]
ChunkSize = Annotated[int, typer.Option(help="Tokens per forward pass while a prompt is read.")]
Positions = Annotated[str, typer.Option(help="original, or slot to stream past the trained length.")]
Traces = Annotated[int, typer.Option(help="Samples of each task and length whose kept positions are recorded.")]
Pictures = Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw what the extra `plot` is for.")]
Chat = Annotated[str, typer.Option(help="Use the tokenizer's chat template: auto, yes or no.")]
Output = Annotated[str, typer.Option(help="Folder for results.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Seed = Annotated[int, typer.Option(help="Seed of samples and of methods that draw numbers.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: a GPU if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def make_contenders(policies: str, budgets: str, options: Sequence[str] | None, model: str) -> list[Contender]:
    """The methods of a run from what was typed."""
    from .tasks.contenders import contenders, parse_amount, parse_options

    names = [name for name in policies.split(",") if name.strip()]
    amounts = [parse_amount(text) for text in budgets.split(",") if text.strip()]
    return contenders(names, amounts, parse_options(options or []), model)


def perform_run(run: Run, folder: Path, resume: bool, earlier: Path | None = None, pictures: bool = True) -> None:
    """Do the work, write and show the results; exit code 1 if a sample failed. `earlier`: where the file of the earlier
    LongBench script goes, if it is wanted."""
    from .report.long_results import LongWatcher, show_results, write_results
    from .report.terminal import make_console
    from .tasks.run import perform

    console = make_console()
    try:
        with LongWatcher(console) as watcher:
            moved = perform(run, folder, resume=resume, watcher=watcher)
    except KeyboardInterrupt:
        typer.secho("stopped; the same command with --resume goes on from here", fg="yellow", err=True)
        raise typer.Exit(130) from None
    if moved is not None:
        console.print(f"earlier results moved to {moved}", markup=False)
    files, summary = write_results(folder, earlier, pictures=pictures)
    show_results(console, summary, files)
    if summary["failures"]:
        raise typer.Exit(1)


def make_run(
    ctx: typer.Context,
    kind: str,
    model: Any,
    tokenizer: Any,
    name: str,
    items: list[Item],
    methods: list[Contender],
    **settings: Any,
) -> Run:
    """A run, with the line that asks for it; `settings` as in `Run`."""
    from .tasks.run import Run

    flags: list[str] = []
    for key, text in typed_flags(ctx).items():
        value = ctx.params[key]
        if isinstance(value, (list, tuple)):
            flags += [f"--{key.replace('_', '-')}={one}" for one in value]
        elif key not in ("output", "resume", "pictures", "debug"):
            flags.append(text)
    command = shlex.join(["kvsieve", str(ctx.info_name), *flags])
    return Run(kind, model, tokenizer, name, methods, items, command=command, **settings)


def load(model: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from ._identity import find_device, load_model

    loaded, tokenizer = load_model(model, find_device(device), dtype)
    few_threads(loaded)
    return loaded, tokenizer


def numbers(text: str, flag: str) -> list[int]:
    """Whole numbers with commas, as typed for `flag`."""
    parts = [part.strip().replace("_", "") for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise PolicyError(f"--{flag} must be whole numbers with commas, such as 1024,2048, not {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def wraps(chat: str, tokenizer: Any) -> bool:
    """Whether prompts go into the tokenizer's chat template."""
    if chat not in ("auto", "yes", "no"):
        raise PolicyError(f"--chat must be auto, yes or no, not {chat!r}")
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat == "yes" and not has:
        raise PolicyError("--chat yes: this tokenizer has no chat template")
    return has and chat != "no"
