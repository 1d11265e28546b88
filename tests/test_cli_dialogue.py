"""`kvsieve dialogue`: from flags to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kvsieve.cli import app
from kvsieve.dialogue import read_predictions
from kvsieve.dialogue.assembly import AssemblyVideo

pytest.importorskip("matplotlib")
SMALL = ["--max-seq-len", "128", "--reserved-seq-len", "24", "--last-keep-len", "32", "--max-new-tokens", "16"]
SUMMARY = ["--summary-max-length", "24"]


def run(*arguments):
    return CliRunner().invoke(app, ["dialogue", *map(str, arguments)])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two short videos whose frames lie in files, as records."""
    folder = tmp_path_factory.mktemp("records")
    lines = []
    for seed in (1, 2):
        record = AssemblyVideo(seed, steps=4, gap=(6, 9)).record()
        np.savez(folder / f"{seed}.npz", frames=record["frames"])
        lines.append(json.dumps(record | {"frames": f"{seed}.npz"}))
    file = folder / "videos.jsonl"
    file.write_text("\n".join(lines))
    return file


@pytest.mark.slow
def test_all_strategies_over_a_file(records, tmp_path):
    result = run("--data", records, "--strategy", "all,full,drop_middle+naive", *SMALL, *SUMMARY, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    names = ["none", "drop_all", "drop_middle", "summarize_and_drop", "full", "drop_middle+naive"]
    table = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["strategy"] for row in table["strategies"]] == names
    for name in names:
        row = next(row for row in table["strategies"] if row["strategy"] == name)
        metrics = json.loads((tmp_path / name / f"{name}_metrics.json").read_text())
        assert row["f1"] == metrics["f1"]
        assert metrics["videos"] == 2
        assert len(list((tmp_path / name).glob(f"{name}_*.log"))) == 1
        predictions = read_predictions(tmp_path / name)
        assert [len(video.cache_tokens) for video in predictions.videos] == [
            video.frames for video in predictions.videos
        ]
        most = max(max(video.cache_tokens) for video in predictions.videos)
        assert most <= 128 if name != "full" else most > 0
    assert "drop_middle+naive" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "timeline.png").stat().st_size > 20_000
    assert "<script src" not in (tmp_path / "timeline.html").read_text()
    assert "drop_middle+naive" in result.output

    again = run("--data", records, "--strategy", "drop_all", *SMALL, "--output", tmp_path)  # nothing is left to do
    assert again.exit_code == 0, again.output
    assert len(list((tmp_path / "drop_all").glob("*.log"))) >= 1

    other = run("--data", records, "--strategy", "drop_all", *SMALL, "--last-keep-len", "16", "--output", tmp_path)
    assert other.exit_code == 2
    assert "other settings" in other.output


def test_demo_with_typed_flags(tmp_path):
    result = run("--demo", "--videos", "1", "--strategy", "drop_middle", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "comparison.json").read_text())["strategies"][0]
    assert row["cache_compressions"] > 2
    assert row["max_cache_size"] <= 192
    assert row["frames_processed"] > 200


def test_options_from_a_file(records, tmp_path):
    (tmp_path / "options.yaml").write_text(
        "strategy: [drop_middle, h2o]\nmax_seq_len: 128\nreserved_seq_len: 24\nlast_keep_len: 32\nmax_new_tokens: 16\n"
        "strategies:\n  h2o: {protect_initial: true}\n"
    )
    out = tmp_path / "out"
    result = run("--data", records, "--config", tmp_path / "options.yaml", "--last-keep-len", "40", "--output", out)
    assert result.exit_code == 0, result.output
    settings = read_predictions(out / "h2o").settings["strategy_settings"]
    assert settings["protect_initial"] is True
    assert settings["last_keep_len"] == 40


def test_a_bad_video_is_reported_and_the_rest_go_on(records, tmp_path):
    bad = tmp_path / "videos.jsonl"
    missing = json.dumps(AssemblyVideo(3, steps=4).record() | {"video_id": "gone", "frames": str(tmp_path / "no.npz")})
    silent = json.dumps({"video_id": "nobody", "frames": "1.npz", "fps": 2.0, "conversation": []})
    bad.write_text("\n".join([missing, silent, records.read_text()]))
    result = run(
        "--data",
        bad,
        "--frames-root",
        records.parent,
        "--strategy",
        "drop_middle",
        *SMALL,
        "--output",
        tmp_path / "out",
    )
    assert result.exit_code == 1, result.output
    assert "gone" in result.output
    assert "no line of the assistant" in " ".join(result.output.split())
    table = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(table["unread"]) == 1
    assert table["strategies"][0]["failed"][0]["video"] == "gone"
    assert table["strategies"][0]["frames_processed"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--demo"),
        (["--demo", "--data", "x.json"], "--demo"),
        (["--demo", "--strategy", "drop_midle"], "Unknown context strategy"),
        (["--demo", "--strategy", "drop_middle+sideways"], "positions"),
        (["--demo", "--last-keep-len", "900"], "max_seq_len"),
        (["--demo", "--videos", "0"], "--videos"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--demo", "--model", "mini-lm"], "vision"),
        (["--demo", "--model", "no-such-model"], "no-such-model"),
        (["--demo", "--device", "toaster"], "toaster"),
        (["--demo", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*flags, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_unknown_option_in_a_file(tmp_path):
    (tmp_path / "options.yaml").write_text("max_sequence: 3\n")
    result = run("--demo", "--config", tmp_path / "options.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "max_sequence" in result.output
