"""A runner over many videos: files as it goes, going on after a stop, metrics at the end."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .matching import Window
from .metrics import VideoScore
from .predictions import Predictions, VideoPrediction, read_predictions, write_predictions
from .records import VideoRecord, parse_record, read_records
from .results import ResultFiles, RunnerNumbers, metrics_table, write_metrics
from .runner import VLMStreamRunner
from .similarity import Similarity

__all__ = ["BaselineGenerator", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with the key of a video, how many are done, and how many there are."""

Item = VideoRecord | VideoPrediction
"""A video to run, or the failure of one that cannot be."""


class BaselineGenerator:
    """Runs a runner over a data set and writes `<output_dir>/<strategy>/<strategy>_predictions.json`,
    `<strategy>_metrics.json` and `<strategy>_<timestamp>.log`.

    A second run with the same settings goes on where the first one stopped; videos that failed are tried again. A video
    that fails is recorded with its error, and the rest go on.

    Args:
        runner: see `VLMStreamRunner`.
        dataset: a file or folder of records, or videos: a sequence, or anything with a length and an index, of records
            or of mappings `{video_id, frames, conversation, fps}`.
        output_dir: folder for the results.
        window: of the matching, see `score_video`; by default that of the data set.
        similarity: of the matching.
        threshold: similarity from which on a matched line has the right content.
        overwrite: begin anew where results with other settings lie; by default that is an error.
        progress: told of every video; by default a bar on the terminal.

    Attributes:
        predictions: what was said, after `run`.
        scores: one for every video that did not fail, after `run`.
    """

    def __init__(
        self,
        runner: VLMStreamRunner,
        dataset: Any,
        output_dir: str | Path,
        *,
        window: str | float | Sequence[float] | Window = "auto",
        similarity: str | Similarity = "token_f1",
        threshold: float = 0.5,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.runner, self.dataset = runner, dataset
        self.files = ResultFiles(Path(output_dir), runner.strategy.name)
        self._scoring: dict[str, Any] = {"window": window, "similarity": similarity, "threshold": threshold}
        self.overwrite, self._progress = overwrite, progress
        self.predictions = Predictions(runner.strategy.name)
        self.scores: list[VideoScore] = []

    def run(self) -> dict[str, Any]:
        """Run what is not done yet.

        Returns:
            The content of the metrics file; `failed` lists the videos that failed, with their errors.

        Raises:
            DataError: the data set cannot be read or is empty, every video failed, or results with other settings are
                in the way.
        """
        items = list(self._items())
        if not items:
            raise DataError("the data set has no videos")
        done = self._done_before()
        self.files.folder.mkdir(parents=True, exist_ok=True)
        with _Log(self.files.log(time.strftime("%Y%m%d_%H%M%S"))) as log, _Bar(self._progress, self._name) as tell:
            log.write(f"{self._name}: {len(items)} videos, {self.runner.settings}")
            videos: list[VideoPrediction] = []
            for index, item in enumerate(items):
                tell(item.key, index, len(items))
                before = done.get(item.key)
                video = before or self._watch(item, log)
                videos.append(video)
                if before is None:
                    # videos of an earlier run that come later stay in the file, so that a stop here loses nothing
                    waiting = [done[one.key] for one in items[index + 1 :] if one.key in done]
                    self._write([*videos, *waiting])
            self._write(videos)
            tell(items[-1].key, len(items), len(items))
            metrics = self._metrics(videos)
            log.write(f"{self._name}: F1 {metrics['f1']}, {len(metrics['failed'])} of {len(items)} videos failed")
        return metrics

    @property
    def _name(self) -> str:
        return self.runner.strategy.name

    # ---- videos

    def _items(self) -> Iterator[Item]:
        """Every video of the data set, or what is wrong with it."""
        if isinstance(self.dataset, (str, Path)):
            wrong: list[DataError] = []
            yield from read_records(self.dataset, fps=self.runner.fps, on_error=wrong.append)
            for number, error in enumerate(wrong):
                yield _failed(f"record-{number}", error)
            return
        seen: set[str] = set()
        for index, given in enumerate(_each(self.dataset)):
            where = f"video {index}"
            try:
                record = (
                    given if isinstance(given, VideoRecord) else parse_record(given, where=where, fps=self.runner.fps)
                )
                if record.key in seen:
                    raise DataError(f"{where}: {record.key} is there already; results would be mixed up")
            except DataError as error:
                yield _failed(f"video-{index}", error)
                continue
            seen.add(record.key)
            yield record

    def _watch(self, item: Item, log: _Log) -> VideoPrediction:
        if isinstance(item, VideoPrediction):
            log.write(f"{item.key} failed: {item.error}")
            return item
        begun = time.perf_counter()
        try:
            video: VideoPrediction = self.runner.run_inference_on_video(item)["prediction"]
        except Exception as error:  # one video must not end the run; its error is in the results, the trace in the log
            log.write(f"{item.key} failed: {error}\n{traceback.format_exc()}")
            return _failed(item.key, error, item)
        seconds = time.perf_counter() - begun
        log.write(
            f"{item.key}: {video.frames} frames in {seconds:.1f} s, {len(video.spoken)} lines for "
            f"{len(video.references)}, {video.numbers['cache_compressions']} reductions, at most "
            f"{video.numbers['max_cache_size']} tokens"
        )
        return video

    def _done_before(self) -> dict[str, VideoPrediction]:
        """Videos of an earlier run with these settings that did not fail."""
        if not self.files.predictions.is_file() or self.overwrite:
            return {}
        before = read_predictions(self.files.predictions)
        now = self.runner.settings
        changed = sorted(name for name in {*before.settings, *now} if before.settings.get(name) != now.get(name))
        if changed:
            raise DataError(
                f"{self.files.predictions} holds results with other settings ({', '.join(changed)}); choose another "
                "folder, or overwrite them"
            )
        return {video.key: video for video in before.videos if video.status == "ok"}

    # ---- files

    def _write(self, videos: Sequence[VideoPrediction]) -> None:
        self.predictions = Predictions(self._name, tuple(videos), self.runner.settings)
        write_predictions(self.predictions, self.files.output)

    def _metrics(self, videos: Sequence[VideoPrediction]) -> dict[str, Any]:
        good = [video for video in videos if video.status == "ok"]
        bad = [{"video": video.key, "error": video.error} for video in videos if video.status != "ok"]
        if not good:
            raise DataError(f"every video failed; the first: {bad[0]['error']}")
        self.scores = [video.score(**self._scoring) for video in good]
        asked = {
            name: value if isinstance(value, (str, float, int)) else str(value) for name, value in self._scoring.items()
        }
        numbers = _pooled(good, bad)
        metrics = metrics_table(self.scores, numbers, settings={**self.runner.settings, "scoring": asked})
        write_metrics(metrics, self._name, self.files.output)
        return metrics


def _each(dataset: Any) -> Iterable[Any]:
    """The items of a sequence, or of anything with a length and an index."""
    if isinstance(dataset, Mapping):
        raise DataError("a data set is a list of videos, a file or a folder; this is a single mapping")
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[i] for i in range(len(dataset)))
    if isinstance(dataset, Iterable):
        return dataset
    raise DataError(f"a data set is a list of videos, a file or a folder, not {type(dataset).__name__}")


def _failed(key: str, error: Exception, record: VideoRecord | None = None) -> VideoPrediction:
    text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    if record is None:
        return VideoPrediction(key, 1.0, 0, status="failed", error=text)
    return VideoPrediction(
        record.video_id,
        record.fps,
        0,
        references=record.references,
        key=record.key,
        dataset=record.dataset,
        status="failed",
        error=text,
    )


def _pooled(videos: Sequence[VideoPrediction], failed: list[dict[str, str]]) -> RunnerNumbers:
    """Numbers over all videos: sums, means over frames, and the largest."""
    frames = sum(video.frames for video in videos)

    def mean(name: str) -> float:
        return sum(video.numbers[name] * video.frames for video in videos) / frames

    def most(name: str) -> Any:
        return max(video.numbers[name] for video in videos)

    return RunnerNumbers(
        cache_compressions=sum(video.numbers["cache_compressions"] for video in videos),
        avg_cache_size=mean("avg_cache_size"),
        time_per_frame=mean("time_per_frame"),
        peak_memory_mb=most("peak_memory_mb"),
        cache_bytes=most("cache_bytes"),
        extra={
            "max_cache_size": most("max_cache_size"),
            "tokens_fed": sum(video.numbers["tokens_fed"] for video in videos),
            "summaries": sum(len(video.summaries) for video in videos),
            "failed": failed,
        },
    )


class _Log:
    """Lines with the time in front, on disk as soon as they are written."""

    def __init__(self, file: Path) -> None:
        self._handle = file.open("a", encoding="utf-8")

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def write(self, text: str) -> None:
        self._handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._handle.flush()


class _Bar:
    """The caller's progress, or a bar on the terminal."""

    def __init__(self, progress: Progress | None, name: str) -> None:
        self._progress, self._name = progress, name
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._progress is not None:
            return self._progress
        from ..report.terminal import make_bar, make_console

        bar = make_bar(make_console(), 28)
        task = bar.add_task(self._name, total=None)
        self._bar = bar
        bar.start()

        def tell(key: str, done: int, total: int) -> None:
            bar.update(task, description=f"{self._name} {key}"[:28], completed=done, total=total)

        return tell

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
