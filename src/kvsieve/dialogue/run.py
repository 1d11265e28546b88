"""Several strategies over the same videos: one table, one picture, one page."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DataError, KvsieveError
from ..report.tables import markdown_table
from ._timeline import shrunk
from .baseline import BaselineGenerator
from .matching import Window, get_window
from .metrics import VideoScore, difference
from .page import write_timeline_page
from .predictions import VideoPrediction
from .records import VideoRecord
from .results import write_json
from .runner import VLMStreamRunner
from .script import frames_of
from .similarity import Similarity

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HOW_TO_READ", "markdown", "run_dialogue", "terminal_table"]

HOW_TO_READ = (
    "How to read it: a line is matched if something of the right content was said within the window; F1 counts those, "
    "timing F1 counts what was said at the right time whatever it said, both with a bootstrap interval over videos. "
    "`to full` is the difference in F1 to the stream that drops nothing. `tokens` are the most that were held, and the "
    "mean; `bytes` the most that keys and values took; `spoke` the share of frames at which something was said."
)
_MOST_FRAMES, _THUMBNAIL = 4000, 192
"""Frames of the pictured video that are read for its thumbnails, and the height in pixels that they are kept at."""

Watch = Callable[[str, str, int, int], None]
"""Called with the strategy, the key of a video, how many videos are done, and how many there are."""


def run_dialogue(
    runners: Sequence[VLMStreamRunner],
    videos: Sequence[VideoRecord],
    output_dir: str | Path,
    *,
    window: str | float | Sequence[float] | Window = "auto",
    similarity: str | Similarity = "token_f1",
    threshold: float = 0.5,
    baseline: str = "full",
    overwrite: bool = False,
    plots: bool = True,
    command: str = "",
    unread: Sequence[str] = (),
    watch: Watch = lambda strategy, key, done, total: None,
) -> dict[str, Any]:
    """Run every strategy over all videos, and compare.

    Writes, beside the files of each strategy (see `BaselineGenerator`), `comparison.json`, `comparison.md`,
    `timeline.html` and, with matplotlib, `timeline.png` of the first video.

    Args:
        runners: one for each strategy.
        videos: the records.
        output_dir: folder for the results.
        window: see `score_video`.
        similarity: see `score_video`.
        threshold: see `score_video`.
        baseline: the strategy that the others are compared with, where it is among them.
        overwrite: see `BaselineGenerator`.
        plots: draw the picture; the page needs no matplotlib.
        command: what was typed.
        unread: what was wrong with records that are not among `videos`, for the results.
        watch: told of every video of every strategy.

    Returns:
        The content of `comparison.json`.

    Raises:
        DataError: no videos, or two runners whose results would lie in one folder.
    """
    labels = [runner.strategy.label for runner in runners]
    if not videos:
        raise DataError("there are no videos")
    if not runners or len(set(labels)) < len(labels):
        raise DataError(f"strategies must be different ones, and at least one: {', '.join(labels)}")
    folder = Path(output_dir)
    scores: dict[str, list[VideoScore]] = {}
    metrics: dict[str, dict[str, Any]] = {}
    shown: dict[str, VideoPrediction] = {}
    errors: dict[str, str] = {}
    for runner in sorted(runners, key=lambda runner: runner.strategy.label != baseline):
        label = runner.strategy.label

        def tell(key: str, done: int, total: int, label: str = label) -> None:
            watch(label, key, done, total)

        generator = BaselineGenerator(
            runner,
            videos,
            folder,
            window=window,
            similarity=similarity,
            threshold=threshold,
            overwrite=overwrite,
            progress=tell,
        )
        try:
            metrics[label] = generator.run()
        except DataError as error:
            if not generator.predictions.videos:  # nothing was run: the settings or the folder are wrong
                raise
            errors[label] = str(error)
        scores[label] = generator.scores
        shown[label] = generator.predictions.videos[0]
    rows = [_row(label, metrics.get(label), scores, baseline, errors.get(label, "")) for label in labels]
    result: dict[str, Any] = {
        "strategies": rows,
        "unread": list(unread),
        "run": {
            "command": command,
            "model": runners[0].model_name,
            "parameters": sum(p.numel() for p in runners[0].vlm.model.parameters()),
            "videos": len(videos),
            "frames": sum(score.frames for score in next(iter(scores.values()), [])),
            "baseline": baseline,
            "device": str(runners[0].vlm.model.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **_versions()},
        },
    }
    write_json(folder / "comparison.json", result)
    (folder / "comparison.md").write_text(markdown(result), encoding="utf-8")
    _picture(folder, shown, metrics, videos[0], runners, plots, window, similarity, threshold)
    return result


def _row(
    label: str,
    metrics: Mapping[str, Any] | None,
    scores: Mapping[str, Sequence[VideoScore]],
    baseline: str,
    error: str,
) -> dict[str, Any]:
    if metrics is None:
        return {"strategy": label, "status": "failed", "error": error, "failed": []}
    names = ["frames_processed", "dialogues_generated", "dialogues_reference", "dialogues_matched", "precision"]
    names += ["recall", "f1", "timing_f1", "silence_accuracy", "speak_rate", "cache_compressions", "summaries"]
    names += [
        "avg_cache_size",
        "max_cache_size",
        "cache_bytes",
        "time_per_frame",
        "peak_memory_mb",
        "tokens_fed",
        "failed",
    ]
    row: dict[str, Any] = {"strategy": label, "status": "failed" if metrics["failed"] else "ok", "error": error}
    row |= {name: metrics[name] for name in names}
    row |= {f"{name}_interval": metrics["intervals"][name] for name in ("f1", "timing_f1")}
    row["f1_to_baseline"] = None
    same = label != baseline and scores.get(baseline)
    if same and {s.video_id for s in scores[label]} == {s.video_id for s in scores[baseline]}:
        found = difference(scores[label], scores[baseline])["f1"]
        interval = found.interval
        row["f1_to_baseline"] = found.value
        row["f1_to_baseline_interval"] = [interval.low, interval.high] if interval else None
    return row


def _versions() -> dict[str, str]:
    import transformers

    from .. import __version__

    return {"transformers": transformers.__version__, "kvsieve": __version__}


def _picture(
    folder: Path,
    shown: Mapping[str, VideoPrediction],
    metrics: Mapping[str, Mapping[str, Any]],
    video: VideoRecord,
    runners: Sequence[VLMStreamRunner],
    plots: bool,
    window: Any,
    similarity: Any,
    threshold: float,
) -> None:
    if all(one.status != "ok" for one in shown.values()):
        return
    try:
        frames = [shrunk(frame, _THUMBNAIL) for frame in itertools.islice(frames_of(video), _MOST_FRAMES)]
    except KvsieveError:
        frames = []  # a stream that can be read once only
    options: dict[str, Any] = {
        "frames": frames or None,
        "max_seq_len": runners[0].strategy.max_seq_len,
        "window": get_window(window, video.dataset),
        "similarity": similarity,
        "threshold": threshold,
    }
    write_timeline_page(shown, folder / "timeline.html", metrics=metrics, **options)
    if plots:
        from .timeline import draw_timeline

        draw_timeline(shown, folder / "timeline.png", **options)


# ---- tables

_HEAD = ("strategy", "F1", "timing F1", "to full", "tokens", "bytes", "reduced", "spoke", "ms / frame")


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row.get("f1") is None and row["status"] != "ok" and "avg_cache_size" not in row:
        return [row["strategy"], "failed", *[""] * (len(_HEAD) - 2)]
    return [
        row["strategy"],
        _rate(row["f1"], row["f1_interval"]),
        _rate(row["timing_f1"], row["timing_f1_interval"]),
        "" if row["f1_to_baseline"] is None else f"{row['f1_to_baseline']:+.3f}",
        f"{row['max_cache_size']} ({row['avg_cache_size']:.0f})",
        _bytes(row["cache_bytes"]),
        f"{row['cache_compressions']}" + (f" ({row['summaries']} summaries)" if row["summaries"] else ""),
        f"{100 * row['speak_rate']:.1f} %",
        f"{1000 * row['time_per_frame']:.1f}",
    ]


def _rate(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown: table, how to read it, what failed, and what produced it."""
    run = result["run"]
    lines = [markdown_table(list(_HEAD), [_cells(row) for row in result["strategies"]]), "", HOW_TO_READ, ""]
    lines += [f"- {text}" for text in failures(result)]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines += [
        f"Model {run['model']} ({run['parameters']:,} parameters), {run['videos']} videos, {run['frames']} frames, "
        f"{run['device']}; {versions}.",
        "",
    ]
    if run["command"]:
        lines += [f"Command: `{run['command']}`", ""]
    return "\n".join(lines)


def failures(result: Mapping[str, Any]) -> list[str]:
    """One line for every record that could not be read, and for every video that failed under a strategy."""
    out = [f"not read: {text}" for text in result["unread"]]
    for row in result["strategies"]:
        out += [f"{row['strategy']} failed on {one['video']}: {one['error']}" for one in row["failed"]]
        if row["error"]:
            out.append(f"{row['strategy']} failed: {row['error']}")
    return out


def terminal_table(result: Mapping[str, Any]) -> Table:
    """The comparison for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in _HEAD:
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=name == "strategy")
    for row in result["strategies"]:
        table.add_row(*_cells(row))
    return table
