"""The command line. Heavy imports happen inside the commands, so that `--help` and `--version` answer at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from . import __version__
from .cli_dialogue import dialogue
from .cli_geometry import geometry
from .cli_longbench import longbench
from .cli_pictures import diff, report, visualize
from .cli_ruler import ruler
from .cli_stream import stream
from .errors import KvsieveError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Keep transformer key-value caches within a memory budget, and measure what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # users of earlier scripts type --max_length
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the `kvsieve` command."""
    app()


def _clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """One red line and exit code 2 for what kvsieve refuses on purpose; `--debug` lets the traceback through."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KvsieveError as error:
            if kwargs.get("debug"):
                raise
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None

    return run


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvsieve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@_clear_errors
def compare(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="Bundled model, folder, or Hub id.")] = "mini-lm",
    data: Annotated[
        str | None, typer.Option(help="JSONL file, one text per line. [default: the Python language reference]")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names with commas, or all. [default: baseline,kvzap,random,streaming_llm,expected_attention,"
            "observed_attention]"
        ),
    ] = None,
    compression_ratio: Annotated[float, typer.Option(help="Share that ratio methods remove, in [0, 1).")] = 0.5,
    threshold: Annotated[
        str, typer.Option(help="Score below which kvzap evicts; 'match' finds the one that removes as much.")
    ] = "-7.0",
    sliding_window_size: Annotated[int, typer.Option(help="Last tokens that kvzap never evicts.")] = 128,
    n_sink: Annotated[int, typer.Option(help="First tokens that no method evicts.")] = 4,
    protect_recent: Annotated[int, typer.Option(help="Last tokens that no ratio method evicts.")] = 0,
    n_future_positions: Annotated[int, typer.Option(help="expected_attention: how far ahead it looks.")] = 512,
    use_covariance: Annotated[bool, typer.Option(help="expected_attention: second-order term.")] = True,
    use_vnorm: Annotated[bool, typer.Option(help="expected_attention: multiply by value norms.")] = True,
    kvzap_scorer_model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of kvzap's surrogate. [default: the bundled one]")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per text, at most.")] = 8192,
    max_samples: Annotated[int | None, typer.Option(help="Texts, at most.")] = None,
    chunk_size: Annotated[int, typer.Option(help="Tokens per forward pass; 1 is exact.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything that draws numbers.")] = 42,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: a GPU if there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    output_dir: Annotated[str, typer.Option(help="Folder for results.")] = "./comparison_results",
    include_observed_attention: Annotated[bool, typer.Option(help="Have it among the default methods.")] = True,
    num_gpus: Annotated[int, typer.Option(help="Worker processes, one per GPU.")] = 1,
    shard: Annotated[str | None, typer.Option(help="i/n: do the i-th of n parts, i from 0.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    text_field: Annotated[str | None, typer.Option(help="JSONL field with the text. [default: found]")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Bundled model, real text, many methods at equal memory, in two minutes.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Only put the shards in --output-dir together; loads no model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity and memory of eviction methods on text."""
    from .compare import compare_compression_methods, merge_results

    if merge:
        _finish(merge_results(output_dir))
        return
    options: dict[str, Any] = {
        "data_path": data,
        "model_name": model,
        "compression_ratio": compression_ratio,
        "threshold": _threshold(threshold),
        "kvzap_scorer_model": kvzap_scorer_model,
        "max_samples": max_samples,
        "chunk_size": chunk_size,
        "device": device,
        "output_dir": output_dir,
        "methods": methods,
        "sliding_window_size": sliding_window_size,
        "n_sink": n_sink,
        "n_future_positions": n_future_positions,
        "use_covariance": use_covariance,
        "use_vnorm": use_vnorm,
        "max_length": max_length,
        "seed": seed,
        "dtype": dtype,
        "include_observed_attention": include_observed_attention,
        "num_gpus": num_gpus,
        "shard": shard,
        "resume": resume,
        "text_field": text_field,
        "protect_recent": protect_recent,
    }
    if demo:
        options |= {key: value for key, value in DEMO.items() if not _typed(ctx, key)}
    try:
        result = compare_compression_methods(**options)
    except KeyboardInterrupt:
        typer.secho("stopped; the same command with --resume goes on from here", fg="yellow", err=True)
        raise typer.Exit(130) from None
    _finish(result)


DEMO: dict[str, Any] = {
    "methods": "baseline,streaming_llm,snapkv,h2o,tova,observed_attention,expected_attention,kvzap,keydiff,"
    "knorm,random",
    "threshold": "match",
    "max_samples": 6,
    "max_length": 1024,
}
"""What `--demo` changes; flags that are typed win."""


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _finish(result: dict[str, Any]) -> None:
    """Exit code 1 if a cell failed."""
    if any(entry["status"] != "ok" for entry in result["results"]):
        raise typer.Exit(1)


@app.command("train-kvzap")
@_clear_errors
def train_kvzap(
    model: Annotated[str, typer.Option(help="Bundled model, folder, or Hub id.")] = "mini-lm",
    data: Annotated[
        str | None, typer.Option(help="JSONL file, one text per line. [default: docstrings of the standard library]")
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder for the surrogate.")] = "./kvzap",
    kind: Annotated[str, typer.Option(help="mlp or linear.")] = "mlp",
    hidden_dim: Annotated[int, typer.Option(help="Units of the mlp's hidden layer.")] = 512,
    epochs: Annotated[int, typer.Option(help="Passes over the tokens, for the mlp.")] = 15,
    lr: Annotated[float, typer.Option(help="Learning rate of the mlp.")] = 5e-3,
    window_tokens: Annotated[int, typer.Option(help="Tokens per sample, at most.")] = 1024,
    tokens_per_text: Annotated[int, typer.Option(help="Tokens to learn from, per sample.")] = 500,
    max_texts: Annotated[int, typer.Option(help="Samples, at most.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of draws and first weights.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: a GPU if there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    text_field: Annotated[str | None, typer.Option(help="JSONL field with the text. [default: found]")] = None,
    debug: Debug = False,
) -> None:
    """Train the surrogate that the kvzap method needs, for any model."""
    from ._identity import find_device, load_model
    from .text.data import read_jsonl
    from .text.train_kvzap import standard_library_docstrings
    from .text.train_kvzap import train_kvzap as train

    documents = read_jsonl(data, text_field) if data else standard_library_docstrings()
    loaded, tokenizer = load_model(model, find_device(device), dtype)
    record = train(
        loaded,
        tokenizer,
        [document.text for document in documents],
        output_dir,
        kind=kind,
        hidden_dim=hidden_dim,
        epochs=epochs,
        lr=lr,
        window_tokens=window_tokens,
        tokens_per_text=tokens_per_text,
        max_texts=max_texts,
        seed=seed,
    )
    measured = ", ".join(f"{name} {value:.3f}" for name, value in record["held_out"].items())
    typer.echo(f"Surrogate written to {output_dir}. On held-out tokens: {measured}")
    typer.echo(f"Share of tokens below a score: {record['score_quantiles']}")
    typer.echo(f"Use it with: kvsieve compare --model {model} --kvzap-scorer-model {output_dir} --threshold match")


for _command in (longbench, ruler, visualize, diff, report, stream, geometry, dialogue):
    app.command()(_clear_errors(_command))


@app.command()
@_clear_errors
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    debug: Debug = False,
) -> None:
    """List all methods with their hyper-parameters and sources."""
    from .report.methods import KINDS, methods_markdown, methods_table
    from .report.terminal import make_console

    if markdown:
        typer.echo(methods_markdown(), nl=False)
        return
    console = make_console()
    console.print(methods_table())
    console.print(KINDS, markup=False)


if __name__ == "__main__":
    main()
