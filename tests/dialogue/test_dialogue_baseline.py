"""Runs over many videos: files, going on after a stop, and videos that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import frames, rule, video
from kvsieve.dialogue import read_predictions
from kvsieve.dialogue.baseline import BaselineGenerator
from kvsieve.dialogue.records import parse_record
from kvsieve.dialogue.runner import VLMStreamRunner
from kvsieve.dialogue.vlm import VisionLanguageModel
from kvsieve.errors import DataError, PolicyError

NAMES = ["a", "b", "c", "d"]
Run = Callable[..., dict[str, Any]]


def videos() -> list[dict[str, Any]]:
    return [video(8 + i, name=name, seed=i) for i, name in enumerate(NAMES)]


def runner(vlm: VisionLanguageModel, **options: Any) -> VLMStreamRunner:
    own = {"max_seq_len": 40, "reserved_seq_len": 5, "last_keep_len": 8}
    options = {"max_new_tokens": 3, "context_strategy_type": "drop_middle", "context_strategy_config": own} | options
    return VLMStreamRunner(vlm, **options)


@pytest.fixture
def run(vlm: VisionLanguageModel, tmp_path: Path) -> Run:
    """Runs a data set, by default over a folder of this test."""

    def go(dataset: Any, folder: Path = tmp_path / "out", **options: Any) -> dict[str, Any]:
        own = {name: options.pop(name) for name in list(options) if name in ("overwrite", "progress", "window")}
        own = {"progress": lambda key, done, total: None} | own
        with rule(vlm, None):
            return BaselineGenerator(runner(vlm, **options), dataset, folder, **own).run()

    return go


def untimed(folder: Path, strategy: str = "drop_middle") -> dict[str, Any]:
    """The file of predictions without what a clock or the process says."""
    data: dict[str, Any] = json.loads((folder / strategy / f"{strategy}_predictions.json").read_text())
    for one in data["videos"]:
        for name in ("time_per_frame", "median_time_per_frame", "peak_memory_mb"):
            one["numbers"].pop(name)
        for event in one["events"]:
            event.pop("seconds")
    return data


def test_files_and_documented_fields(run: Run, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    metrics = run(videos(), progress=lambda *args: told.append(args))
    folder = tmp_path / "out" / "drop_middle"
    log, metrics_file, predictions_file = sorted(folder.iterdir())
    assert (metrics_file.name, predictions_file.name) == ("drop_middle_metrics.json", "drop_middle_predictions.json")
    assert log.name.startswith("drop_middle_2")
    assert log.name.endswith(".log")
    assert json.loads(metrics_file.read_text()) == metrics
    documented = ["frames_processed", "dialogues_generated", "dialogues_matched", "precision", "recall", "f1"]
    documented += ["cache_compressions", "avg_cache_size", "time_per_frame", "peak_memory_mb"]
    assert list(metrics)[: len(documented)] == documented
    before = read_predictions(folder)
    assert metrics["frames_processed"] == 8 + 9 + 10 + 11
    assert metrics["dialogues_generated"] == sum(len(one.spoken) for one in before.videos) > 4
    assert metrics["cache_compressions"] == sum(len(one.events) for one in before.videos) > 4
    sizes = [size for one in before.videos for size in one.cache_tokens]
    assert metrics["avg_cache_size"] == pytest.approx(np.mean(sizes))
    assert max(sizes) <= metrics["max_cache_size"] <= 40
    assert metrics["failed"] == []
    assert [one.key for one in before.videos] == NAMES
    assert told == [("a", 0, 4), ("b", 1, 4), ("c", 2, 4), ("d", 3, 4), ("d", 4, 4)]
    text = log.read_text()
    assert all(f" {name}: " in text for name in NAMES)


def test_a_stopped_run_goes_on(run: Run, vlm: VisionLanguageModel, tmp_path: Path) -> None:
    run(videos(), tmp_path / "whole")
    stopped = tmp_path / "stopped"
    stock, calls = VLMStreamRunner.run_inference_on_video, []

    def interrupted(self: VLMStreamRunner, item: Any) -> dict[str, Any]:
        calls.append(item.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLMStreamRunner, "run_inference_on_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(videos(), stopped)
        assert [one.key for one in read_predictions(stopped / "drop_middle").videos] == ["a", "b"]
        assert not list((stopped / "drop_middle").glob("*.part"))
        run(videos(), stopped)
        assert calls == ["a", "b", "c", "c", "d"]
        assert _same(untimed(stopped), untimed(tmp_path / "whole"))
        run(videos(), stopped)
        assert len(calls) == 5
        run([{**videos()[0], "conversation": video(lines=(("assistant", 1.0, "two"),))["conversation"]}], stopped)
        assert calls[5:] == ["a"]  # what it is scored against has changed
        run(videos(), stopped, overwrite=True)
        assert calls[6:] == NAMES


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal, numbers from the model up to rounding."""
    for a, b in zip(one["videos"], other["videos"], strict=True):
        assert a["numbers"].pop("mean_silence") == pytest.approx(b["numbers"].pop("mean_silence"))
    return one == other


def test_a_stop_in_the_middle_loses_nothing_of_an_earlier_run(run: Run, tmp_path: Path) -> None:
    some = videos()
    run(some[2:])
    with pytest.MonkeyPatch.context() as patch:
        stock, calls = VLMStreamRunner.run_inference_on_video, []

        def interrupted(self: VLMStreamRunner, item: Any) -> dict[str, Any]:
            calls.append(item.key)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return stock(self, item)

        patch.setattr(VLMStreamRunner, "run_inference_on_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(some)
    assert [one.key for one in read_predictions(tmp_path / "out" / "drop_middle").videos] == ["a", "c", "d"]


def test_other_settings_are_refused(run: Run, vlm: VisionLanguageModel) -> None:
    run(videos()[:1])
    with pytest.raises(DataError, match=r"other settings \(max_new_tokens\)"):
        run(videos()[:1], max_new_tokens=2)
    own = {"max_seq_len": 41, "reserved_seq_len": 5, "last_keep_len": 8}
    with pytest.raises(DataError, match=r"other settings \(strategy_settings\)"):
        run(videos()[:1], context_strategy_config=own)
    run(videos()[:1], max_new_tokens=2, overwrite=True)
    run(videos()[:1], context_strategy_type="none", context_strategy_config={})  # another folder


def test_settings_come_back_from_the_file_as_they_went_in(run: Run) -> None:
    """What JSON makes a list of must not look like another setting."""
    own = {"max_seq_len": 64, "reserved_seq_len": 5, "last_keep_len": 8, "protect_initial": True}
    for _ in range(2):
        run(videos()[:1], context_strategy_type="tova", context_strategy_config=own)


def test_a_bad_video_is_recorded_and_the_rest_go_on(run: Run, tmp_path: Path) -> None:
    a, b, c, d = videos()
    mixed = [frames(1)[0], frames(1, side=16)[0]]
    bad = [{**b, "frames": mixed}, {**c, "conversation": []}, 7, {**d, "system": 1, "conversation": d["conversation"]}]
    metrics = run([a, *bad, a])
    assert [one["video"] for one in metrics["failed"]] == ["b", "video-2", "video-3", "video-5"]
    errors = [one["error"] for one in metrics["failed"]]
    assert "must have one size" in errors[0]
    assert "no line of the assistant" in errors[1]
    assert "a is there already" in errors[3]
    assert metrics["videos"] == 2
    kept = {one.key: one.status for one in read_predictions(tmp_path / "out" / "drop_middle").videos}
    assert kept["b"] == "failed"
    assert kept["a"] == kept["d"] == "ok"
    again = run([a, b, c, d])
    assert again["failed"] == []


def test_an_unexpected_error_is_recorded_with_its_trace(run: Run, vlm: VisionLanguageModel, tmp_path: Path) -> None:
    stock = VLMStreamRunner.run_inference_on_video

    def broken(self: VLMStreamRunner, item: Any) -> dict[str, Any]:
        if item.key == "b":
            raise ZeroDivisionError("nothing to share")
        return stock(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLMStreamRunner, "run_inference_on_video", broken)
        metrics = run(videos())
    assert metrics["failed"] == [{"video": "b", "error": "ZeroDivisionError: nothing to share"}]
    (log,) = (tmp_path / "out" / "drop_middle").glob("*.log")
    assert "Traceback" in log.read_text()
    assert "in broken" in log.read_text()


def test_a_model_without_numbers_fails_its_video_alone(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    """NaN cannot be written to a file; it must not cost the videos before it."""
    stock = VisionLanguageModel.forward
    black = {**videos()[1], "frames": np.zeros((9, 32, 32, 3), np.uint8)}

    def forward(self: Any, ids: Any, pictures: Any, cache: Any, position: int) -> Any:
        out = stock(self, ids, pictures, cache, position)
        return out * float("nan") if pictures and float(pictures[0].pixels.max()) == -1.0 else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionLanguageModel, "forward", forward)
        metrics = BaselineGenerator(runner(vlm), [videos()[0], black], tmp_path, progress=lambda *_: None).run()
    assert [one["video"] for one in metrics["failed"]] == ["b"]
    assert "is not a number" in metrics["failed"][0]["error"]


def test_every_video_failing_is_an_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"every video failed; the first: .*no line of the assistant"):
        run([{**videos()[0], "conversation": []}])
    assert read_predictions(tmp_path / "out" / "drop_middle").videos[0].status == "failed"


def test_data_sets_of_every_kind(run: Run, tmp_path: Path) -> None:
    some = videos()[:2]
    for one in some:
        np.save(tmp_path / f"{one['video_id']}.npy", one["frames"])
    lines = [json.dumps({**one, "frames": f"{one['video_id']}.npy"}) for one in some]
    (tmp_path / "records.jsonl").write_text("\n".join([*lines, '{"video_id": "bad"}']) + "\n")

    class Indexed:
        """Brings its frames along when asked; one item cannot be fetched."""

        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            if i == 2:
                raise OSError("disk is gone")
            return some[i]

    want = run(some, tmp_path / "list")
    kinds: dict[str, Any] = {
        "file": tmp_path / "records.jsonl",
        "records": [parse_record(one) for one in some],
        "iterator": iter(some),
        "indexed": Indexed(),
        "tuple": tuple(some),
    }
    for name, dataset in kinds.items():
        got = run(dataset, tmp_path / name)
        assert got["dialogues_generated"] == want["dialogues_generated"] > 0
        assert got["per_video"] == want["per_video"]
        failed = {"file": "record-0", "indexed": "video-2"}.get(name)
        assert [one["video"] for one in got["failed"]] == ([failed] if failed else [])
        assert name != "indexed" or got["failed"][0]["error"] == "OSError: disk is gone"


def test_an_indexed_data_set_is_fetched_one_by_one(run: Run, vlm: VisionLanguageModel) -> None:
    order: list[str] = []

    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            order.append(f"fetch {i}")
            return videos()[i]

    stock = VLMStreamRunner.run_inference_on_video

    def noted(self: VLMStreamRunner, item: Any) -> dict[str, Any]:
        order.append(f"run {item.key}")
        return stock(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLMStreamRunner, "run_inference_on_video", noted)
        run(Lazy())
    assert order == ["fetch 0", "run a", "fetch 1", "run b", "fetch 2", "run c"]


def test_what_is_no_data_set(run: Run, tmp_path: Path) -> None:
    for wrong, message in (([], "no videos"), ({"video_id": "a"}, "single mapping"), (7, "not int")):
        with pytest.raises(DataError, match=message):
            run(wrong)
    with pytest.raises(DataError, match="nowhere"):
        run(tmp_path / "nowhere.json")


def test_scoring_is_checked_before_anything_runs(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    for wrong in ({"window": "wide"}, {"similarity": "fuzzy"}, {"threshold": 2.0}):
        with pytest.raises(PolicyError):
            BaselineGenerator(runner(vlm), videos(), tmp_path, **wrong)


def test_the_bar_on_the_terminal(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    with rule(vlm, None):
        made = BaselineGenerator(runner(vlm), videos()[:2], tmp_path)
        made.run()
    assert [one.video_id for one in made.scores] == ["a", "b"]
    assert made.predictions == read_predictions(tmp_path / "drop_middle")
