"""`run_geometry`: frames in, several ways of keeping the cache, and what each of them costs, with one call."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import BudgetError, DataError, PolicyError, ScoreError
from .model import STream3R
from .outputs import limits_of, markdown, write_cloud, write_depths, write_json, write_pictures
from .recording import Frames, Recording, look_alone, record
from .runs import Run, check_run
from .scenes import Sequence3D
from .scoring import Scores, against_full, against_truth, best_constant, depth_error, difference, means

__all__ = ["run_geometry"]

FULL = "full"
Progress = Callable[[str, int, int], None]
"""Called after every frame with the run's name, the frames done and the frames to do, over all runs."""


def run_geometry(
    sequences: Frames | Sequence3D | Sequence[Sequence3D],
    model: STream3R,
    runs: Sequence[Run],
    output_dir: str | os.PathLike[str] = "./geometry_results",
    *,
    model_name: str = "",
    seed: int = 0,
    save_points: bool = True,
    save_plots: bool = True,
    command: str = "",
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """Stream sequences through a model under several memory policies and measure each.

    Files of the first sequence go to `output_dir`: per run a folder with `depth_0000.png` and so on, `depth.npy`
    `[S, H, W]`, `points.ply` and `points.glb`; and pictures of all runs. The numbers, means over the sequences, are in
    `metrics.json` and `results.md`. Memory grows with the length of the stream by what the runs' caches hold, not by
    their predictions: depth is kept on disk, points are thinned.

    Args:
        sequences: one sequence of images `[S, 3, H, W]` in [0, 1] (a tensor, or what `frames.open_images` returns), or
            one or several with the truth, such as `render_sequence` makes them, all of one length and size.
        model: a model in evaluation mode.
        runs: what `runs.plan_runs` makes of names. With `full` among them the others are measured against it.
        output_dir: folder for results; made if it is not there.
        model_name, command: for the record.
        seed: of the thinning of points and of intervals.
        save_points: write the clouds.
        save_plots: write the pictures of all runs, which need matplotlib.
        progress: see `Progress`.

    Returns:
        The content of `metrics.json`, with the files written under `"files"`. A run that went out of memory, or whose
        budget turned out too small on the way, has `"status": "failed"` and no numbers.

    Raises:
        KvsieveError: no frames, sequences of different lengths, or a run that cannot work with this model.
    """
    scenes, truths = _scenes(sequences)
    count = len(scenes[0])
    size = scenes[0][0].shape[-2:]
    tokens = model.tokens_per_frame(*size)
    names = [run.name for run in runs]
    if not runs or len({run.folder for run in runs}) < len(runs):
        raise PolicyError(f"runs must have names of their own, which make different folders: {', '.join(names)}")
    for run in runs:
        check_run(run, model, tokens)
    ordered = sorted(runs, key=lambda run: run.name != FULL)
    folder = Path(output_dir)
    total, done = len(scenes) * len(runs) * count, 0
    shown: dict[str, Recording] = {}
    rows: dict[str, list[dict[str, Any]]] = {run.name: [] for run in ordered}
    errors: dict[str, str] = {}
    references: dict[str, list[Scores]] = {}
    for number, (frames, truth) in enumerate(zip(scenes, truths, strict=True)):
        full: Recording | None = None
        for index, run in enumerate(ordered):

            def tick(name: str = run.name) -> None:
                nonlocal done
                done += 1
                progress(name, done, total)

            if run.name not in errors:
                try:
                    out = record(model, run, frames, folder / run.folder if number == 0 else None, tick)
                except (BudgetError, PolicyError, ScoreError, torch.cuda.OutOfMemoryError) as error:
                    errors[run.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                else:
                    full = out if run.name == FULL else full
                    rows[run.name].append(_row(out, _scores(out, truth, full, seed)))
                    if number == 0:
                        shown[run.name] = out
            done = count * (number * len(runs) + index + 1)
            progress(run.name, done, total)
        if truth is not None:
            alone = depth_error(look_alone(model, frames), truth.depth)
            constant = depth_error(best_constant(truth.depth), truth.depth, align="none")
            references.setdefault("every frame alone", []).append(alone)
            references.setdefault("best constant depth", []).append(constant)
    result: dict[str, Any] = {
        "runs": [_summary(run, rows[run.name], rows.get(FULL, []), errors.get(run.name), seed) for run in ordered],
        "references": {name: means(found) for name, found in references.items()},
        "notes": _notes(ordered, truths, errors),
        "run": {
            "command": command,
            "model": model_name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "scenes": len(scenes),
            "frames": count,
            "height": size[0],
            "width": size[1],
            "tokens_per_frame": tokens,
            "seed": seed,
            "versions": _versions(),
            "hardware": hardware(next(model.parameters()).device),
        },
    }
    files = _write(folder, result, ordered, truths[0], shown, seed, save_points, save_plots)
    return result | {"files": [str(file) for file in files]}


def _scenes(given: Any) -> tuple[list[Frames], list[Sequence3D | None]]:
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    scenes = [one.images if isinstance(one, Sequence3D) else one for one in several]
    if not scenes or not len(scenes[0]):
        raise DataError("there is no frame; give images [S, 3, H, W], or a rendered sequence")
    if len({(len(scene), *scene[0].shape) for scene in scenes}) > 1:
        raise DataError("the sequences differ in length or size; measure them one by one, or cut them to one length")
    return scenes, [one if isinstance(one, Sequence3D) else None for one in several]


def _scores(out: Recording, truth: Sequence3D | None, full: Recording | None, seed: int) -> Scores:
    scores = {} if truth is None else against_truth(out, truth, seed)
    return scores | ({} if full is None or full is out else against_full(out, full))


def _row(out: Recording, scores: Scores) -> dict[str, Any]:
    """One run over one sequence."""
    report = out.report
    return {
        "metrics": scores,
        "bytes_trunk": report["bytes_held"],
        "bytes_camera": report["camera"]["bytes_held"],
        "bytes_held": report["bytes_held"] + report["camera"]["bytes_held"],
        "bytes_full": report["bytes_full"] + report["camera"]["bytes_full"],
        "bytes_largest": max(out.held),
        "bytes_gpu_peak": out.peak,
        "compression_ratio": report["compression_ratio"],
        "evictions": report["evictions"],
        "special_frames": report["special_frames"],
        "tokens_per_layer": out.tokens[-1],
        "tokens_per_layer_per_frame": out.tokens,
        "seconds": out.seconds,
        "policy": out.policy,
    }


def _summary(
    run: Run, scenes: list[dict[str, Any]], full: list[dict[str, Any]], error: str | None, seed: int
) -> dict[str, Any]:
    settings = {key: value for key, value in run.settings.items() if key != "policy"}
    about = {
        "name": run.name,
        "method": run.method,
        "folder": run.folder,
        "budget": run.budget,
        "budget_ratio": run.ratio,
        "settings": settings,
        "status": "ok" if error is None else "failed",
        "error": error,
        "metrics": {},
    }
    if error is not None:
        return about
    first = dict(scenes[0])
    seconds = [seconds for scene in scenes for seconds in scene["seconds"]]
    scores: list[Scores] = [scene["metrics"] for scene in scenes]
    others: list[Scores] = [scene["metrics"] for scene in full]
    first |= {
        "metrics": means(scores),
        "share_of_full": first["bytes_held"] / first["bytes_full"],
        "seconds_per_frame": statistics.median(seconds),
        "seconds_last_frame": statistics.median(scene["seconds"][-1] for scene in scenes),
        "metrics_per_scene": scores,
    }
    if run.name != FULL and len(others) == len(scores):
        first["difference_to_full"] = difference(scores, others, seed)
    return about | first


def _notes(runs: Sequence[Run], truths: Sequence[Sequence3D | None], errors: dict[str, str]) -> list[str]:
    notes = []
    if len(truths) > 1:
        notes.append(
            f"Metrics are means over {len(truths)} scenes; the interval of the change in AbsRel is a bootstrap over "
            "scenes, paired with the full cache. Memory, tokens and pictures are those of the first scene."
        )
    if all(run.name != FULL for run in runs) or FULL in errors:
        notes.append("Nothing is compared with the full cache, which was not among the runs that finished.")
    if any(run.ratio is not None for run in runs):
        notes.append(
            "Runs at the same share of the stream hold the same number of tokens per layer (evict3r: on average over "
            "layers), first frame and special tokens included, which no run evicts."
        )
    if any(run.method == "window" for run in runs):
        notes.append("window is the published one, the first frame and the last five: compare it by what it holds.")
    if truths[0] is not None:
        notes.append("`every frame alone` and `best constant depth` need no stream: a run has to beat them.")
    return notes


def _write(
    folder: Path,
    result: dict[str, Any],
    runs: Sequence[Run],
    truth: Sequence3D | None,
    shown: dict[str, Recording],
    seed: int,
    save_points: bool,
    save_plots: bool,
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "metrics.json", folder / "results.md"]
    write_json(files[0], result)
    files[1].write_text(markdown(result), encoding="utf-8")
    limits = limits_of(next(iter(shown.values()))) if shown else (0.0, 1.0)
    for run in runs:
        if run.name in shown:
            write_depths(folder / run.folder, shown[run.name], limits)
            if save_points:
                write_cloud(folder / run.folder, shown[run.name], seed)
            files.append(folder / run.folder)
    if save_plots and shown:
        files += write_pictures(folder, shown, result, truth)
    return files


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"kvsieve": __version__, "torch": torch.__version__, "python": platform.python_version()}


def hardware(device: torch.device) -> str:
    """What the numbers were measured on."""
    cpu = f"{_processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}; {cpu}" if device.type == "cuda" else cpu


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
