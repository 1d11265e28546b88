"""What was said in a run over many videos: the file it is kept in, and reading it back to score it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._fields import Fields, read_json
from ..errors import DataError
from .matching import Window, get_window
from .metrics import VideoScore, score_video
from .records import Utterance
from .results import ResultFiles, write_json
from .similarity import Similarity

__all__ = ["Predictions", "Summary", "VideoPrediction", "read_predictions", "write_predictions"]

FORMAT = "kvsieve dialogue predictions"
VERSION = 1
_STATUS = ("ok", "failed")


@dataclass(frozen=True)
class Summary:
    """A summary that the model wrote when its context was full.

    Attributes:
        time: seconds on the clock of the video.
        frame: frame of the stream.
        text: the summary.
        prompt: what it was asked for with.
    """

    time: float
    frame: int
    text: str
    prompt: str = ""


@dataclass(frozen=True)
class VideoPrediction:
    """What was said during one video, and all that scoring it needs.

    Attributes:
        video_id: name of the video.
        key: unique in the data set, see `VideoRecord.key`; by default the name.
        fps: frames per second of the stream.
        frames: frames of the stream that were processed.
        spoken: what was said, each line with its frame.
        references: what was to be said.
        dataset: name of the data set, which decides the window.
        summaries: in the order they were written.
        events: what happened to the cache, one JSON object each, as the runner likes.
        cache_tokens: tokens in the cache after every frame; empty where that was not recorded.
        status: `"ok"` or `"failed"`.
        error: why it failed.
        numbers: what the runner measured, JSON values.
    """

    video_id: str
    fps: float
    frames: int
    spoken: tuple[Utterance, ...] = ()
    references: tuple[Utterance, ...] = ()
    key: str = ""
    dataset: str = ""
    summaries: tuple[Summary, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    status: str = "ok"
    error: str = ""
    cache_tokens: tuple[int, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in _STATUS:
            raise DataError(f"video {self.video_id!r}: status must be one of {', '.join(_STATUS)}, not {self.status!r}")
        if not self.key:
            object.__setattr__(self, "key", self.video_id)

    def score(
        self,
        *,
        window: str | float | Sequence[float] | Window = "auto",
        similarity: str | Similarity = "token_f1",
        threshold: float = 0.5,
    ) -> VideoScore:
        """See `score_video`; the window by default is the data set's own.

        Raises:
            DataError: the video failed.
        """
        if self.status != "ok":
            raise DataError(f"video {self.key!r} failed and cannot be scored: {self.error}")
        return score_video(
            self.spoken,
            self.references,
            video_id=self.key,
            frames=self.frames,
            window=get_window(window, self.dataset),
            similarity=similarity,
            threshold=threshold,
        )


@dataclass(frozen=True)
class Predictions:
    """A whole run: the strategy, its settings (JSON values), and the videos."""

    strategy: str
    videos: tuple[VideoPrediction, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_predictions(predictions: Predictions, output: str | Path) -> Path:
    """Write `<output>/<strategy>/<strategy>_predictions.json` and return where it is.

    An object with `format`, `version`, `strategy`, `settings` and `videos`. A video has `video_id`, `key`, `dataset`,
    `fps`, `frames_processed`, `status`, `error`, and lists: `predictions` of `{gen, frame_idx_in_stream,
    timestamp_in_stream}`, `references` of `{ref, ...}` with the same two, `summaries` of `{summary, prompt, ...}`
    likewise, `events`, and `cache_tokens`, a number for every frame; `numbers` is an object. Silent frames are not
    listed. Times are seconds on the clock of the video. The file is replaced in one step, so that a reader never sees
    half of it.

    Raises:
        DataError: two videos with the same key, or something that JSON cannot hold, NaN included.
    """
    keys = [video.key for video in predictions.videos]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if twice:
        raise DataError(f"strategy {predictions.strategy!r}: {', '.join(twice)} occurs twice")
    file = ResultFiles(Path(output), predictions.strategy).predictions
    write_json(
        file,
        {
            "format": FORMAT,
            "version": VERSION,
            "strategy": predictions.strategy,
            "settings": dict(predictions.settings),
            "videos": [_video_out(video) for video in predictions.videos],
        },
    )
    return file


def read_predictions(path: str | Path) -> Predictions:
    """Read a file of `write_predictions`.

    Args:
        path: the file, or the strategy's folder.

    Raises:
        DataError: missing or malformed, or of another format or version; the message names file, video and field.
    """
    file = Path(path)
    if file.is_dir():
        file = file / f"{file.name}_predictions.json"
    data = read_json(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f'{file}: not a file of predictions ("format" must be {FORMAT!r})')
    fields = Fields(data, str(file))
    version = fields.whole("version", least=1)
    if version != VERSION:
        raise fields.error("version", f"is {version}; this release reads version {VERSION}")
    return Predictions(
        strategy=fields.text("strategy"),
        videos=tuple(_video_in(video) for video in fields.objects("videos")),
        settings=fields.mapping("settings"),
    )


def _video_out(video: VideoPrediction) -> dict[str, Any]:
    return {
        "video_id": video.video_id,
        "key": video.key,
        "dataset": video.dataset,
        "fps": video.fps,
        "frames_processed": video.frames,
        "status": video.status,
        "error": video.error,
        "predictions": [{"gen": one.text, **_when(one.frame, one.time)} for one in video.spoken],
        "references": [{"ref": one.text, **_when(one.frame, one.time)} for one in video.references],
        "summaries": [
            {"summary": one.text, "prompt": one.prompt, **_when(one.frame, one.time)} for one in video.summaries
        ],
        "events": [dict(event) for event in video.events],
        "cache_tokens": list(video.cache_tokens),
        "numbers": dict(video.numbers),
    }


def _video_in(fields: Fields) -> VideoPrediction:
    return VideoPrediction(
        video_id=fields.text("video_id"),
        key=fields.words("key"),
        dataset=fields.words("dataset"),
        fps=fields.number("fps", least=0),
        frames=fields.whole("frames_processed", least=0),
        status=fields.choice("status", _STATUS),
        error=fields.words("error"),
        spoken=_utterances(fields, "predictions", "gen"),
        references=_utterances(fields, "references", "ref"),
        summaries=tuple(
            Summary(
                one.number("timestamp_in_stream"),
                one.whole("frame_idx_in_stream", least=0),
                one.words("summary"),
                one.words("prompt"),
            )
            for one in fields.objects("summaries")
        ),
        events=tuple(one.data for one in fields.objects("events")),
        cache_tokens=_counts(fields, "cache_tokens"),
        numbers=fields.mapping("numbers"),
    )


def _utterances(fields: Fields, name: str, text: str) -> tuple[Utterance, ...]:
    return tuple(
        Utterance(
            one.number("timestamp_in_stream"),
            one.text(text),
            None if one.absent("frame_idx_in_stream") else one.whole("frame_idx_in_stream", least=0),
        )
        for one in fields.objects(name)
    )


def _counts(fields: Fields, name: str) -> tuple[int, ...]:
    """A list of whole numbers of 0 or more; empty where absent, as in files that older releases wrote."""
    values = fields.data.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise fields.error(name, f"must be a list of whole numbers, not {type(values).__name__}")
    each = ((f"{name}[{i}]", value) for i, value in enumerate(values))
    return tuple(Fields({one: value}, fields.where).whole(one, least=0) for one, value in each)


def _when(frame: int | None, time: float) -> dict[str, Any]:
    return {"frame_idx_in_stream": frame, "timestamp_in_stream": time}
