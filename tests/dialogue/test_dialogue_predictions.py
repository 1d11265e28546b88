"""What a run writes can be read and scored again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsieve.dialogue import (
    Predictions,
    ResultFiles,
    Summary,
    Utterance,
    VideoPrediction,
    metrics_table,
    read_predictions,
    write_metrics,
    write_predictions,
)
from kvsieve.errors import DataError

VIDEO = VideoPrediction(
    video_id="toy-7",
    key="toy-7/quiet_0/1",
    fps=2.0,
    frames=20,
    dataset="assembly101",
    spoken=(Utterance(6.0, "Die R\u00e4der, bitte!", 1), Utterance(12.0, "x", None)),
    references=(Utterance(6.2, "Die R\u00e4der, bitte!", 1),),
    summaries=(Summary(9.0, 7, "Wheels done.", "Summarise."),),
    events=({"frame": 7, "tokens_before": 140, "tokens_after": 80},),
    cache_tokens=(120, 140, 80),
)
RUN = Predictions(
    "drop_middle", (VIDEO, VideoPrediction("toy-8", 2.0, 0, status="failed", error="no frames")), {"n": 1}
)


def test_round_trip_and_where_files_lie(tmp_path: Path) -> None:
    file = write_predictions(RUN, tmp_path)
    assert file == tmp_path / "drop_middle" / "drop_middle_predictions.json"
    assert read_predictions(file) == read_predictions(file.parent) == RUN
    files = ResultFiles(tmp_path, "drop_middle")
    assert files.predictions == file
    assert files.log("20250101_120000") == tmp_path / "drop_middle" / "drop_middle_20250101_120000.log"
    metrics = write_metrics(metrics_table([VIDEO.score()]), "drop_middle", tmp_path)
    assert metrics == files.metrics == tmp_path / "drop_middle" / "drop_middle_metrics.json"
    assert json.loads(metrics.read_text(encoding="utf-8"))["dialogues_matched"] == 1
    write_predictions(RUN, tmp_path)
    assert sorted(path.name for path in file.parent.iterdir()) == [metrics.name, file.name]


def test_names_in_the_file(tmp_path: Path) -> None:
    data = json.loads(write_predictions(RUN, tmp_path).read_text(encoding="utf-8"))
    assert data["videos"][0]["predictions"][0] == {
        "gen": "Die R\u00e4der, bitte!",
        "frame_idx_in_stream": 1,
        "timestamp_in_stream": 6.0,
    }
    assert data["videos"][0]["references"][0]["ref"] == "Die R\u00e4der, bitte!"
    assert data["videos"][0]["summaries"][0]["summary"] == "Wheels done."
    assert data["videos"][0]["cache_tokens"] == [120, 140, 80]
    assert data["videos"][1]["cache_tokens"] == []
    assert data["videos"][1]["status"] == "failed"
    assert data["videos"][1]["key"] == "toy-8"


@pytest.mark.parametrize("missing", [True, False])
def test_files_without_cache_sizes_can_be_read(tmp_path: Path, missing: bool) -> None:
    file = write_predictions(RUN, tmp_path)
    data = json.loads(file.read_text(encoding="utf-8"))
    if missing:
        del data["videos"][0]["cache_tokens"]
    else:
        data["videos"][0]["cache_tokens"] = None
    file.write_text(json.dumps(data), encoding="utf-8")
    assert read_predictions(file) == replace(RUN, videos=(replace(VIDEO, cache_tokens=()), RUN.videos[1]))


def test_scores_come_from_the_file_alone(tmp_path: Path) -> None:
    video = read_predictions(write_predictions(RUN, tmp_path)).videos[0]
    score = video.score()
    assert (score.video_id, score.matched, score.missed, score.redundant) == ("toy-7/quiet_0/1", 1, 0, 1)
    assert video.score(window=0.1).matched == 0
    early = replace(VIDEO, spoken=(Utterance(2.5, VIDEO.references[0].text, 0),))
    assert early.score().matched == 1, "this data set lets a line come 4 s early"
    assert early.score(window="uniform").matched == 0
    with pytest.raises(DataError, match=r"toy-8.*no frames"):
        RUN.videos[1].score()


def test_writing_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="toy-7/quiet_0/1 occurs twice"):
        write_predictions(replace(RUN, videos=(VIDEO, VIDEO)), tmp_path)
    for value in (float("nan"), object()):
        with pytest.raises(DataError, match="cannot be written as JSON"):
            write_predictions(replace(RUN, settings={"n": value}), tmp_path)
    for strategy in ("", "../up", "a/b", ".hidden", "a b"):
        with pytest.raises(DataError, match="cannot name a folder"):
            write_predictions(replace(RUN, strategy=strategy), tmp_path)
    with pytest.raises(DataError, match="status must be one of"):
        VideoPrediction("v", 2.0, 1, status="maybe")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", r"not a file of predictions"),
        ("version", 2, r"version is 2; this release reads version 1"),
        ("strategy", "", r"strategy is blank"),
        ("videos", {}, r"videos must be a list"),
        ("videos.0.fps", None, r"videos\[0\]: fps is missing"),
        ("videos.0.status", "?", r"videos\[0\]: status is '\?'"),
        ("videos.0.predictions.0.gen", "", r"videos\[0\]: predictions\[0\]: gen is blank"),
        ("videos.0.references.0.timestamp_in_stream", "1", r"references\[0\]: timestamp_in_stream must be a number"),
        ("videos.0.summaries.0.frame_idx_in_stream", 0.5, r"summaries\[0\]: frame_idx_in_stream is 0.5"),
        ("videos.0.events", [1], r"events\[0\] must be an object"),
        ("videos.0.cache_tokens", {}, r"videos\[0\]: cache_tokens must be a list of whole numbers, not dict"),
        ("videos.0.cache_tokens.1", "140", r"videos\[0\]: cache_tokens\[1\] must be a number"),
        ("videos.0.cache_tokens.1", None, r"videos\[0\]: cache_tokens\[1\] is missing"),
        ("videos.0.cache_tokens.2", -1, r"videos\[0\]: cache_tokens\[2\] is -1"),
    ],
)
def test_reading_names_file_video_and_field(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = write_predictions(RUN, tmp_path)
    data = json.loads(file.read_text(encoding="utf-8"))
    inner = data
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in way:
        inner = inner[step]
    inner[last] = value
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(file)
    assert str(file) in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path / "none.json")
    with pytest.raises(DataError, match="no such file"):
        read_predictions(tmp_path)
    (tmp_path / "half.json").write_text('{"format"', encoding="utf-8")
    with pytest.raises(DataError, match="not valid JSON"):
        read_predictions(tmp_path / "half.json")
