"""`kvsieve dialogue`: a model watches videos and speaks, under one or several context strategies."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import few_threads, typed_flags
from .errors import DataError, PolicyError

if TYPE_CHECKING:
    from .dialogue.records import VideoRecord
    from .dialogue.runner import VLMStreamRunner
    from .dialogue.vlm import VisionLanguageModel

__all__ = ["ALL", "DEMO", "dialogue"]

ALL = ("none", "drop_all", "drop_middle", "summarize_and_drop")
"""What `--strategy all` runs."""
DEMO: dict[str, Any] = {
    "strategy": "full,none,drop_all,drop_middle,drop_middle+original,drop_middle+naive,summarize_and_drop,h2o,snapkv",
    "videos": 4,
    "max_seq_len": 192,
    "reserved_seq_len": 24,
    "last_keep_len": 48,
    "summary_max_length": 40,
    "max_new_tokens": 16,
    "window": 0.5,
    "similarity": "exact",
}
"""What `--demo` sets; flags that are typed win."""
_STEPS, _GAP = (8, 10), (24, 40)
"""Parts of the demo's tasks, and frames from one step to the next: three times what the cache may hold, and more."""
_COMMON = ("max_seq_len", "reserved_seq_len", "last_keep_len", "positions", "initial")
_RUNNER = (
    "max_new_tokens", "temperature", "top_p", "do_sample", "not_talk_threshold", "speak", "use_gt_substeps",
    "transition_detection_prompt", "dialogue_generation_prompt", "use_kv_cache", "use_knowledge", "split_images", "fps",
    "seed",
)  # fmt: skip


def dialogue(
    ctx: typer.Context,
    data: Annotated[
        str | None, typer.Option(help="Records: a .json or .jsonl file, or a folder of such files.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Held-out assembly videos with the bundled model, every kind of strategy.")
    ] = False,
    model: Annotated[str, typer.Option(help="Bundled model, folder, or Hub id.")] = "mini-vlm",
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Strategies with commas: none, drop_all, drop_middle, summarize_and_drop (all: these four), full, "
            "h2o, snapkv and every other method; +original or +naive behind a name sets its positions. "
            "[default: drop_middle]"
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file with options of runner and strategies; flags that are typed win.")
    ] = None,
    output: Annotated[str, typer.Option(help="Folder for results.")] = "./dialogue_results",
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens that the cache never exceeds. [default: 4096]")
    ] = None,
    reserved_seq_len: Annotated[
        int | None, typer.Option(help="Of them, tokens kept free for a reply. [default: 128]")
    ] = None,
    last_keep_len: Annotated[
        int | None, typer.Option(help="Recent tokens that a reduction keeps. [default: 512]")
    ] = None,
    summary_max_length: Annotated[
        int | None, typer.Option(help="summarize_and_drop: most tokens of a summary. [default: 512]")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a line. [default: 100]")] = None,
    not_talk_threshold: Annotated[
        float | None, typer.Option(help="Silence from this probability on. [default: 0.5]")
    ] = None,
    speak: Annotated[
        str | None, typer.Option(help="model: it decides at every frame; transitions: where a step begins.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Seconds that a line may be early or late, or the name of a data set. [default: auto]"),
    ] = None,
    similarity: Annotated[str | None, typer.Option(help="token_f1, exact, or one that is registered.")] = None,
    videos: Annotated[int | None, typer.Option(help="Videos, at most. [demo: 4]")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of records that do not say.")] = None,
    frames_root: Annotated[str | None, typer.Option(help="Folder that paths of frames start from.")] = None,
    seed: Annotated[int, typer.Option(help="Of the demo's videos, of random eviction and of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Begin anew where other results lie.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Let a model watch videos and speak within a context budget, and measure what each strategy costs."""
    if demo == (data is not None):
        raise PolicyError("give one of --data FILE and --demo")
    typed = typed_flags(ctx)
    flags = {
        "max_seq_len": max_seq_len, "reserved_seq_len": reserved_seq_len, "last_keep_len": last_keep_len,
        "summary_max_length": summary_max_length, "max_new_tokens": max_new_tokens, "speak": speak,
        "not_talk_threshold": not_talk_threshold, "fps": fps, "strategy": strategy, "window": window,
        "similarity": similarity, "videos": videos,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    options: dict[str, Any] = {**(DEMO if demo else {}), **_read(config), **given}
    names = _names(options.pop("strategy", "drop_middle"))

    from .dialogue.run import HOW_TO_READ, failures, run_dialogue, terminal_table
    from .report.plots import has_matplotlib
    from .report.terminal import make_bar, make_console

    unread: list[str] = []
    records = _demo(options["videos"], seed) if demo else _records(str(data), frames_root, options, unread)
    scoring = {"window": _seconds(options.pop("window", "auto")), "similarity": options.pop("similarity", "token_f1")}
    vlm = _load(model, device, dtype, bool(options.get("split_images", False)))
    runners = [_runner(vlm, name, {"seed": seed, **options}) for name in names]
    console = make_console()
    frames = "" if not demo else f", {sum(len(record.frames) for record in records)} frames"
    console.print(f"{len(runners)} strategies, {len(records)} videos{frames}, model {model}", markup=False)
    bar = make_bar(console, 36)
    task = bar.add_task("starting", total=len(runners) * len(records))
    before = ""

    def watch(label: str, key: str, done: int, total: int) -> None:
        nonlocal before
        if label != before and not console.is_terminal:
            console.print(f"{label} ...", markup=False)
        before = label
        place = [runner.strategy.label for runner in _in_order(runners)].index(label)
        bar.update(task, description=f"{label} {key}"[:36], completed=place * total + done)

    if console.is_terminal:
        bar.start()
    try:
        result = run_dialogue(
            runners,
            records,
            output,
            **scoring,
            overwrite=overwrite,
            plots=has_matplotlib(),
            command=shlex.join(["kvsieve", "dialogue", *typed.values()]),
            unread=unread,
            watch=watch,
        )
    finally:
        bar.stop()
    console.print(terminal_table(result))
    console.print(HOW_TO_READ, markup=False)
    for text in failures(result):
        console.print(text, style="red", markup=False)
    if not has_matplotlib():
        console.print("no timeline.png: matplotlib is not installed (pip install 'kvsieve[plot]')", markup=False)
    console.print(f"Results in {output}; open {Path(output) / 'timeline.html'} in a browser", markup=False)
    if failures(result):
        raise typer.Exit(1)


def _in_order(runners: list[VLMStreamRunner]) -> list[VLMStreamRunner]:
    """The order in which they run: the baseline first."""
    return sorted(runners, key=lambda runner: runner.strategy.label != "full")


def _names(text: Any) -> list[str]:
    parts = [str(part).strip() for part in (text if isinstance(text, (list, tuple)) else str(text).split(","))]
    names = [name for part in parts for name in (ALL if part == "all" else (part,))]
    return list(dict.fromkeys(names))


def _read(file: str | None) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        DataError: it is missing, or no mapping.
    """
    if file is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--config {file}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise DataError(f"--config {file} is not YAML: {error}") from None
    if not isinstance(found, Mapping):
        raise DataError(f"--config {file} must hold options by name, not {type(found).__name__}")
    known = {*_COMMON, *_RUNNER, "strategy", "strategies", "summary_max_length", "window", "similarity", "videos"}
    unknown = sorted(set(map(str, found)) - known)
    if unknown:
        raise PolicyError(
            f"--config {file} has an unknown option {unknown[0]!r}; it may have: {', '.join(sorted(known))}"
        )
    return dict(found)


def _runner(vlm: VisionLanguageModel, name: str, options: Mapping[str, Any]) -> VLMStreamRunner:
    """A runner for one strategy, from the options of all of them and its own."""
    from .dialogue.runner import VLMStreamRunner

    kind, _, positions = name.partition("+")
    chosen = {key: options[key] for key in _COMMON if key in options}
    if kind == "summarize_and_drop" and "summary_max_length" in options:
        chosen["summary_max_length"] = options["summary_max_length"]
    own = (options.get("strategies") or {}).get(name, {})
    if not isinstance(own, Mapping):
        raise PolicyError(f"the options of {name} must be given by name, not as {own!r}")
    chosen |= {"positions": positions} if positions else {}
    return VLMStreamRunner(
        vlm,
        context_strategy_type=kind,
        context_strategy_config={**chosen, **own},
        **{key: options[key] for key in _RUNNER if key in options and key != "split_images"},
    )


def _load(name: str, device: str, dtype: str | None, split_images: bool) -> VisionLanguageModel:
    from .dialogue.vlm import VisionLanguageModel, dtype_of

    vlm = VisionLanguageModel.load(name, device, dtype_of(dtype), split_images=split_images)
    few_threads(vlm.model)
    return vlm


def _records(data: str, root: str | None, options: Mapping[str, Any], unread: list[str]) -> list[VideoRecord]:
    """The records that can be read; what is wrong with the others goes into `unread`."""
    from .dialogue.records import read_records

    limit = options.get("videos")
    if limit is not None and limit < 1:
        raise DataError(f"--videos must be 1 or more, not {limit}")
    found = read_records(
        data, frames_root=root, fps=options.get("fps"), on_error=lambda error: unread.append(str(error))
    )
    if not found:
        raise DataError(unread[0] if unread else f"{data} has no records")
    return found[:limit]


def _demo(count: int, seed: int) -> list[VideoRecord]:
    """Videos that no training has seen."""
    from .dialogue.assembly import HELD_OUT, AssemblyVideo
    from .dialogue.records import parse_record

    if count < 1:
        raise DataError(f"--videos must be 1 or more, not {count}")
    low, high = _STEPS
    made = [
        AssemblyVideo(HELD_OUT + 1000 * (seed + 1) + i, steps=low + i % (high - low + 1), gap=_GAP)
        for i in range(count)
    ]
    return [parse_record(video.record()) for video in made]


def _seconds(text: Any) -> Any:
    """`2.5`, or `-1,3` for early and late, or a name."""
    try:
        parts = [float(part) for part in str(text).split(",")]
    except ValueError:
        return text
    return parts[0] if len(parts) == 1 else parts
