"""The files of a dialogue run, `<output>/<strategy>/<strategy>_...`, and what stands in the one with the metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._rowlog import write_text
from ..errors import DataError
from .metrics import VideoScore, pool

__all__ = ["ResultFiles", "RunnerNumbers", "metrics_table", "save", "write_json", "write_metrics"]


@dataclass(frozen=True)
class ResultFiles:
    """Where the files of one strategy lie: `<output>/<strategy>/<strategy>_...`.

    Attributes:
        output: the run's folder.
        strategy: letters, digits, `_`, `-`, `.`, `+`, `=`; it names folder and files.
    """

    output: Path
    strategy: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+=-]*", self.strategy):
            raise DataError(
                f"{self.strategy!r} cannot name a folder; use letters, digits and _ . + = - and begin with one of the "
                "first two"
            )

    @property
    def folder(self) -> Path:
        """`<output>/<strategy>`."""
        return Path(self.output) / self.strategy

    @property
    def predictions(self) -> Path:
        """`<strategy>_predictions.json`."""
        return self.folder / f"{self.strategy}_predictions.json"

    @property
    def metrics(self) -> Path:
        """`<strategy>_metrics.json`."""
        return self.folder / f"{self.strategy}_metrics.json"

    def log(self, timestamp: str) -> Path:
        """`<strategy>_<timestamp>.log`."""
        return self.folder / f"{self.strategy}_{timestamp}.log"


@dataclass(frozen=True)
class RunnerNumbers:
    """What only the runner knows.

    Attributes:
        cache_compressions: how often the cache was reduced.
        avg_cache_size: tokens in the cache, mean over frames.
        time_per_frame: seconds, mean over frames.
        peak_memory_mb: the most memory the process or its accelerator held, MB; None where it was not measured.
        cache_bytes: the most bytes the cache held, measured from its storage.
        extra: more numbers, under names that are not taken.
    """

    cache_compressions: int | None = None
    avg_cache_size: float | None = None
    time_per_frame: float | None = None
    peak_memory_mb: float | None = None
    cache_bytes: int | None = None
    extra: Mapping[str, Any] | None = None


def metrics_table(
    scores: Sequence[VideoScore],
    runner: RunnerNumbers | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of `<strategy>_metrics.json`, ready for `json.dump`.

    Documented names first: `frames_processed`, `dialogues_generated`, `dialogues_matched`, `precision`, `recall`,
    `f1`, `cache_compressions`, `avg_cache_size` (tokens), `time_per_frame` (seconds), `peak_memory_mb`. Then
    `dialogues_reference`, `dialogues_missed`, `dialogues_redundant`, the other rates of `pool`, `cache_bytes`,
    `intervals` (`[low, high]` or null by name), `videos`, `settings` and `per_video`.

    Args:
        scores: one per video.
        runner: what the runner measured.
        settings: how it was scored and run, copied into the file.
        confidence: see `pool`.
        seed: see `pool`.

    Raises:
        DataError: no videos, or a name in `runner.extra` that is taken.
    """
    runner = runner or RunnerNumbers()
    pooled = pool(scores, confidence=confidence, seed=seed)
    rates = dict(pooled.rates)
    table: dict[str, Any] = {
        "frames_processed": pooled.counts["frames"],
        "dialogues_generated": pooled.counts["spoken"],
        "dialogues_matched": pooled.counts["matched"],
        "precision": rates.pop("precision"),
        "recall": rates.pop("recall"),
        "f1": rates.pop("f1"),
        "cache_compressions": runner.cache_compressions,
        "avg_cache_size": runner.avg_cache_size,
        "time_per_frame": runner.time_per_frame,
        "peak_memory_mb": runner.peak_memory_mb,
        "dialogues_reference": pooled.counts["references"],
        "dialogues_missed": pooled.counts["missed"],
        "dialogues_redundant": pooled.counts["redundant"],
        **rates,
        "cache_bytes": runner.cache_bytes,
        "confidence": confidence,
        "intervals": {name: [one.low, one.high] if one else None for name, one in pooled.intervals.items()},
        "videos": pooled.videos,
        "settings": dict(settings or {}),
        "per_video": [_video_row(score) for score in scores],
    }
    for name, value in (runner.extra or {}).items():
        if name in table:
            raise DataError(f"the metrics file has a field {name!r} already; give the runner's number another name")
        table[name] = value
    return table


def write_metrics(metrics: Mapping[str, Any], strategy: str, output: str | Path) -> Path:
    """Write `<output>/<strategy>/<strategy>_metrics.json`, the content of `metrics_table`, and return where it is.

    Raises:
        DataError: something that JSON cannot hold.
    """
    file = ResultFiles(Path(output), strategy).metrics
    write_json(file, metrics)
    return file


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write a file in one step, folder included, so that a reader never sees half of it.

    Raises:
        DataError: something that JSON cannot hold, NaN included.
    """
    try:
        text = json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: cannot be written as JSON: {error}") from None
    save(file, f"{text}\n".encode())


def save(file: str | Path, content: bytes) -> Path:
    """Write a file in one step, folder included, so that a reader never sees half of it."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, content)
    return file


def _video_row(score: VideoScore) -> dict[str, Any]:
    return {
        "video_id": score.video_id,
        "frames_processed": score.frames,
        "dialogues_generated": score.spoken,
        "dialogues_reference": score.references,
        "dialogues_matched": score.matched,
        "dialogues_missed": score.missed,
        "dialogues_redundant": score.redundant,
        **score.rates(),
    }
