"""`kvsieve geometry`: streaming reconstruction under a memory budget, from a folder of pictures or rendered scenes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import few_threads, typed_flags
from .errors import BudgetError, DataError, PolicyError

if TYPE_CHECKING:
    from rich.console import Console

    from .geometry import STream3R
    from .geometry.run import Progress
    from .geometry.runs import Run

__all__ = ["DEMO", "geometry"]

DEMO: dict[str, Any] = {
    "compare": "full,window,recent,random,frame_attention,evict3r,frame_attention(ratio=0.3)",
    "budget_ratio": "0.5,0.2",
    "frames": 24,
    "scenes": 4,
}
"""What `--demo` changes; flags that are typed win."""
_FIRST_SCENE = 1000
"""Held-out scenes that the demo skips: the training recipe watches its progress on the first ones."""


def geometry(
    ctx: typer.Context,
    images: Annotated[str | None, typer.Option(help="Folder with the frames, in the order of their names.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Rendered scenes with known depth and cameras, many policies, two budgets.")
    ] = False,
    model: Annotated[str, typer.Option(help="Bundled model, folder, or Hub id.")] = "mini-stream3r",
    mode: Annotated[
        str, typer.Option(help="causal: all earlier frames in view; window: the first and five.")
    ] = "causal",
    policy: Annotated[
        str | None, typer.Option(help="What evicts: evict3r, frame_attention, recent, random, or a method's name.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Kept: tokens per layer (4096), share of the past (0.5) or bytes (2GiB).")
    ] = None,
    budget_ratio: Annotated[
        str | None, typer.Option(help="Kept: share of the whole stream, the same tokens for all runs. [default: 0.5]")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="Length of the stream that shares refer to. [default: the number of images]")
    ] = None,
    eviction_ratio: Annotated[
        float | None, typer.Option(help="frame_attention: share removed after every frame, instead of a budget.")
    ] = None,
    importance_aggregation: Annotated[str, typer.Option(help="frame_attention: sum, mean or max.")] = "sum",
    temp: Annotated[float, typer.Option(help="evict3r: temperature of the layers' shares.")] = 0.5,
    fidelity: Annotated[
        str, typer.Option(help="evict3r: guaranteed, or reference (the published arithmetic, defects included).")
    ] = "guaranteed",
    compare: Annotated[
        str | None,
        typer.Option(help="Several runs with commas: full, window, recent, random, evict3r, ... at equal memory."),
    ] = None,
    reference: Annotated[bool, typer.Option(help="Also run the full cache, to measure against.")] = True,
    output: Annotated[str, typer.Option(help="Folder for results.")] = "./geometry_results",
    preprocess: Annotated[str, typer.Option(help="crop or pad pictures to the model's size.")] = "crop",
    frames: Annotated[int | None, typer.Option(help="Frames, at most. [demo: 24]")] = None,
    scenes: Annotated[int | None, typer.Option(help="Scenes of the demo. [default: 4]")] = None,
    skip_track_head: Annotated[
        bool, typer.Option("--skip-track-head", help="Leave out the point tracker of VGGT and StreamVGGT checkpoints.")
    ] = False,
    save_points: Annotated[bool, typer.Option(help="Write point clouds as PLY and GLB.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of random eviction, samples, intervals and the demo's scenes.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: a GPU if there is one]")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Reconstruct a scene from a stream of images within a memory budget, and measure what that costs."""
    typed = typed_flags(ctx)
    if demo == (images is not None):
        raise PolicyError("give one of --images FOLDER and --demo")
    if compare is not None and (policy is not None or "mode" in typed):
        raise PolicyError("--policy and --mode are for a single run; name the runs with --compare, window among them")
    if scenes is not None and not demo:
        raise PolicyError("--scenes is for --demo; a folder is one scene")
    if demo:
        if not {"policy", "mode", "eviction_ratio"} & set(typed):
            compare = compare or DEMO["compare"]
        if budget is None:
            budget_ratio = budget_ratio or DEMO["budget_ratio"]
        frames, scenes = frames or DEMO["frames"], scenes or DEMO["scenes"]
    names = _names(compare, policy, mode, eviction_ratio, bool(budget or budget_ratio))
    budgets, ratios = _budgets(budget), _ratios(budget_ratio)

    from .geometry.run import run_geometry
    from .geometry.runs import Asked, plan_runs
    from .report.plots import has_matplotlib
    from .report.terminal import make_console

    loaded = _load(model, device, skip_track_head)
    few_threads(loaded)
    sequences, count = _frames(images, loaded, preprocess, frames, scenes, seed)
    asked = Asked(
        tokens_per_frame=loaded.tokens_per_frame(*_size(sequences)),
        num_frames=num_frames or count,
        budget_ratios=ratios,
        budgets=budgets,
        mode=mode,
        eviction_ratio=eviction_ratio if compare is None else None,  # there it is a run of its own name
        importance_aggregation=importance_aggregation,
        temp=temp,
        fidelity=fidelity,
        seed=seed,
    )
    runs = plan_runs([*(["full"] if reference and "full" not in names else []), *names], asked)
    console = make_console()
    console.print(_heading(runs, sequences, count, model), markup=False)
    bar, progress = _progress(console)
    with bar:
        result = run_geometry(
            sequences,
            loaded,
            runs,
            output,
            model_name=model,
            seed=seed,
            save_points=save_points,
            save_plots=has_matplotlib(),
            command=shlex.join(["kvsieve", "geometry", *typed.values()]),
            progress=progress,
        )
    _show(console, result, output, has_matplotlib())
    if any(row["status"] != "ok" for row in result["runs"]):
        raise typer.Exit(1)


# ---- from flags to values


def _names(compare: str | None, policy: str | None, mode: str, eviction_ratio: float | None, budget: bool) -> list[str]:
    """What to run."""
    if compare is not None:
        names = [name.strip() for name in compare.split(",")]
        if eviction_ratio is not None:
            names.append(f"frame_attention(ratio={eviction_ratio:g})")
        return names
    if policy is None:
        plain = "window" if mode == "window" else "full"
        policy = "frame_attention" if eviction_ratio is not None else "evict3r" if budget else plain
        if policy == "full" and mode != "causal":
            raise PolicyError(f"a stream cannot run in mode {mode!r}; it must be one of causal, window")
    elif eviction_ratio is not None and policy != "frame_attention":
        raise PolicyError(f"--eviction-ratio is for frame_attention; {policy} takes --budget or --budget-ratio")
    if eviction_ratio is not None and budget:
        raise PolicyError("--eviction-ratio removes a share of every frame; give no --budget or --budget-ratio with it")
    return [policy]


def _budgets(text: str | None) -> tuple[int | float | str, ...]:
    """`4096`, `0.5`, `2GiB`, or several with commas."""
    found: list[int | float | str] = []
    for part in (part.strip() for part in text.split(",")) if text is not None else ():
        try:
            found.append(int(part) if part.lstrip("+-").isdigit() else float(part))
        except ValueError:
            found.append(part)
    return tuple(found)


def _ratios(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise BudgetError(f"--budget-ratio {text}: a share of the stream such as 0.5, or several with commas") from None


def _load(name: str, device: str | None, skip_track_head: bool) -> STream3R:
    from . import zoo
    from ._identity import find_device
    from .geometry import STream3R

    where = find_device(device)
    if name in zoo.list_models():
        if name not in zoo.list_models("geometry"):
            known = ", ".join(zoo.list_models("geometry"))
            raise PolicyError(f"{name} is a model of text; reconstruction needs {known}, a folder or a Hub id")
        loaded: STream3R = zoo.load(name, device=where)
        return loaded
    return STream3R.from_pretrained(name, device=where, skip_track_head=skip_track_head)


def _frames(
    folder: str | None, model: STream3R, preprocess: str, frames: int | None, scenes: int | None, seed: int
) -> tuple[Any, int]:
    """The sequences, and how many frames each has."""
    for flag, number in (("--frames", frames), ("--scenes", scenes)):
        if number is not None and number < 1:
            raise DataError(f"{flag} must be 1 or more, not {number}")
    if folder is not None:
        from .geometry.frames import open_images

        found = open_images(folder, model, preprocess, frames)
        return found, len(found)
    from .geometry.scenes import HELD_OUT, render_sequence

    assert frames is not None
    assert scenes is not None
    side, first = model.config["img_size"], HELD_OUT + _FIRST_SCENE * (1 + seed)
    return [render_sequence(first + i, frames, (side, side)) for i in range(scenes)], frames


def _size(sequences: Any) -> tuple[int, int]:
    """Height and width."""
    frame = sequences[0].images[0] if isinstance(sequences, list) else sequences[0]
    return frame.shape[-2], frame.shape[-1]


# ---- what is shown


def _heading(runs: Sequence[Run], sequences: Any, count: int, model: str) -> str:
    height, width = _size(sequences)
    many = f"{len(sequences)} scenes of {count}" if isinstance(sequences, list) else f"{count}"
    return f"{len(runs)} runs over {many} frames of {height}x{width} pixels, model {model}"


def _progress(console: Console) -> tuple[Any, Progress]:
    """A bar; where nobody watches, the name of each run."""
    if not console.is_terminal:
        return nullcontext(), _announce(console)
    from .report.terminal import make_bar

    bar = make_bar(console, 28)
    task = bar.add_task("starting", total=None)
    return bar, lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _announce(console: Console) -> Progress:
    """Every run once, then how far later scenes are."""
    seen: list[str] = []
    last = ""

    def tell(name: str, done: int, total: int) -> None:
        nonlocal last
        if name not in seen:
            seen.append(name)
            console.print(f"{name} ...", markup=False)
        elif name == seen[0] != last:
            console.print(f"{done - 1} of {total} frames done, next scene ...", markup=False)
        last = name

    return tell


def _show(console: Console, result: dict[str, Any], output: str, plots: bool) -> None:
    from .geometry.outputs import HOW_TO_READ, terminal_table

    console.print(terminal_table(result, console.width))
    console.print(HOW_TO_READ, markup=False)
    for note in result["notes"]:
        console.print(f"- {note}", markup=False)
    for row in result["runs"]:
        if row["status"] != "ok":
            console.print(f"{row['name']} failed: {row['error']}", style="red", markup=False)
    if not plots:
        console.print("no plots: matplotlib is not installed (pip install 'kvsieve[geometry]')", markup=False)
    console.print(f"Results in {output}", markup=False)
