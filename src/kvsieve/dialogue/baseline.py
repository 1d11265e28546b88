"""A runner over many videos: files as it goes, going on after a stop, metrics at the end."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, PolicyError
from .matching import Window, get_window
from .metrics import VideoScore
from .predictions import Predictions, VideoPrediction, read_predictions, write_predictions
from .records import VideoRecord, parse_record, read_records
from .results import ResultFiles, RunnerNumbers, metrics_table, write_metrics
from .runner import VLMStreamRunner
from .similarity import Similarity, get_similarity

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

    Raises:
        PolicyError: a window, similarity or threshold that there is not.
        DataError: the strategy's name cannot name a folder, or the data set is none.
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
        self.files = ResultFiles(Path(output_dir), runner.strategy.label)
        get_window(window), get_similarity(similarity)  # what is wrong with them is said before hours are spent
        if not 0 <= threshold <= 1:
            raise PolicyError(f"threshold must be in [0, 1], not {threshold!r}")
        self._scoring: dict[str, Any] = {"window": window, "similarity": similarity, "threshold": threshold}
        self.overwrite, self._progress = overwrite, progress
        self.predictions = Predictions(runner.strategy.label)
        self.scores: list[VideoScore] = []

    def run(self) -> dict[str, Any]:
        """Run what is not done yet.

        Returns:
            The content of the metrics file; `failed` lists the videos that failed, with their errors.

        Raises:
            DataError: the data set cannot be read or is empty, every video failed, or results with other settings are
                in the way.
        """
        count, items = self._items()
        if not count:
            raise DataError("the data set has no videos")
        waiting = self._done_before()
        self.files.folder.mkdir(parents=True, exist_ok=True)
        with _Log(self.files.log(time.strftime("%Y%m%d_%H%M%S"))) as log, _Bar(self._progress, self._name) as tell:
            log.write(f"{self._name}: {count} videos, {self.runner.settings}")
            videos: list[VideoPrediction] = []
            for index, item in enumerate(items):
                tell(item.key, index, count)
                before = waiting.pop(item.key, None)
                if before is not None and _same_dialogue(before, item):
                    videos.append(before)
                    continue
                videos.append(self._watch(item, log))
                # videos of an earlier run that come later stay in the file, so that a stop here loses nothing
                self._write([*videos, *waiting.values()])
            self._write(videos)
            tell(videos[-1].key, count, count)
            metrics = self._metrics(videos)
            log.write(f"{self._name}: F1 {metrics['f1']}, {len(metrics['failed'])} of {count} videos failed")
        return metrics

    @property
    def _name(self) -> str:
        return self.runner.strategy.label

    @property
    def _settings(self) -> dict[str, Any]:
        """Those of the runner as they come back from a file: lists for tuples, text for objects."""
        settings: dict[str, Any] = json.loads(json.dumps(self.runner.settings, default=str))
        return settings

    # ---- videos

    def _items(self) -> tuple[int, Iterator[Item]]:
        """How many videos there are, and every one, or what is wrong with it. Those of a data set with an index are
        fetched one by one, as they may bring their frames along."""
        if isinstance(self.dataset, (str, Path)):
            wrong: list[DataError] = []
            read: list[Item] = [*read_records(self.dataset, fps=self.runner.fps, on_error=wrong.append)]
            read += [_failed(f"record-{number}", error) for number, error in enumerate(wrong)]
            return len(read), iter(read)
        count, each = _each(self.dataset)
        return count, self._parsed(each)

    def _parsed(self, each: Iterator[Callable[[], Any]]) -> Iterator[Item]:
        seen: set[str] = set()
        for index, fetch in enumerate(each):
            where = f"video {index}"
            try:
                given = fetch()
                record = (
                    given if isinstance(given, VideoRecord) else parse_record(given, where=where, fps=self.runner.fps)
                )
                if record.key in seen:
                    raise DataError(f"{where}: {record.key} is there already; results would be mixed up")
            except Exception as error:  # see _watch
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
        now = self._settings
        changed = sorted(name for name in {*before.settings, *now} if before.settings.get(name) != now.get(name))
        if changed:
            raise DataError(
                f"{self.files.predictions} holds results with other settings ({', '.join(changed)}); choose another "
                "folder, or overwrite them"
            )
        return {video.key: video for video in before.videos if video.status == "ok"}

    # ---- files

    def _write(self, videos: Sequence[VideoPrediction]) -> None:
        self.predictions = Predictions(self._name, tuple(videos), self._settings)
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
        metrics = metrics_table(self.scores, numbers, settings={**self._settings, "scoring": asked})
        write_metrics(metrics, self._name, self.files.output)
        return metrics


def _each(dataset: Any) -> tuple[int, Iterator[Callable[[], Any]]]:
    """How many items there are, and what fetches each, of a sequence or of anything with a length and an index."""
    if isinstance(dataset, Mapping):
        raise DataError("a data set is a list of videos, a file or a folder; this is a single mapping")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        if not isinstance(dataset, Iterable):
            raise DataError(f"a data set is a list of videos, a file or a folder, not {type(dataset).__name__}")
        dataset = list(dataset)
    return len(dataset), (partial(dataset.__getitem__, i) for i in range(len(dataset)))


def _same_dialogue(before: VideoPrediction, item: Item) -> bool:
    """Whether what an earlier run was scored against still stands."""
    return isinstance(item, VideoRecord) and (before.fps, before.references) == (item.fps, item.references)


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
        return max((video.numbers[name] for video in videos if video.numbers[name] is not None), default=None)

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
