"""`run_geometry` and what it is made of: names of runs, recordings, numbers, files."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from common import DEPTH, TOKENS, frames, tiny

from kvsieve import BudgetError, DataError, PolicyError
from kvsieve.geometry import StreamSession, decode_pose, render_sequence
from kvsieve.geometry.metrics import depth_metrics, distance_to, trajectory_metrics
from kvsieve.geometry.outputs import markdown, terminal_table
from kvsieve.geometry.recording import POINTS, look_alone, record
from kvsieve.geometry.run import run_geometry
from kvsieve.geometry.runs import Asked, check_run, plan_runs, run_names
from kvsieve.geometry.scoring import best_constant, difference, means

COUNT = 5


def asked(**more):
    return Asked(TOKENS, **({"num_frames": COUNT, "budget_ratios": (0.8,)} | more))


def one(name, **more):
    (run,) = plan_runs([name], asked(**more))
    return run


@pytest.fixture(scope="module")
def sequence():
    return render_sequence(10_000_321, COUNT, (32, 32))


@pytest.fixture(autouse=True, scope="module")
def few_points():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvsieve.geometry.scoring.POINTS", 300)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every kind of run over three scenes."""
    folder = tmp_path_factory.mktemp("results")
    scenes = [render_sequence(10_000_321 + i, COUNT, (32, 32)) for i in range(3)]
    names = ["evict3r", "window", "recent", "random", "frame_attention", "frame_attention(ratio=0.3)", "full"]
    runs = plan_runs(names, asked(budget_ratios=(0.8, 0.6)))
    told = []
    result = run_geometry(
        scenes, tiny(), runs, folder, model_name="tiny", command="typed", progress=lambda *now: told.append(now)
    )
    return result, folder, scenes, runs, told


# ---- names


def test_every_listed_name_runs_and_keeps_its_budget():
    images, tokens = frames(COUNT), 90
    for name in run_names():
        # the one gives late layers too little of so few tokens, the other never evicts 1,280, which they say
        if name in ("pyramidkv", "sink_recent_uniform"):
            continue
        out = record(tiny(), one(name, budget_ratios=(), budgets=(tokens,)), images)
        assert out.report["frames_seen"] == COUNT
        assert np.isfinite(out.depth).all()
        if name not in ("full", "window", "adakv_snapkv", "frame_attention(ratio=0.3)"):
            assert sum(out.tokens[-1]) == DEPTH * tokens, name


def test_budget_ratios_are_one_number_of_tokens_for_all():
    runs = plan_runs(["random", "recent", "evict3r"], asked(budget_ratios=(0.5, 0.2), num_frames=29))
    assert [run.name for run in runs[:2]] == ["random 50%", "random 20%"]
    assert [run.settings["policy"].budget.n for run in runs] == [304, 121] * 3  # 609 tokens in all
    assert len({run.folder for run in runs}) == 6


def test_published_flags_are_used_where_the_published_form_is_asked_for():
    run = one("evict3r", fidelity="reference", temp=0.7)
    want = {"use_layerwise_eviction": True, "budget_ratio": 0.8, "temp": 0.7, "fidelity": "reference"}
    assert run.settings == {"mode": "causal", "num_frames": COUNT, **want}
    run = one("frame_attention", budget_ratios=(), eviction_ratio=0.2, importance_aggregation="max")
    assert run.name == "frame_attention(ratio=0.2)"
    assert run.settings["use_kv_compression"] is True
    assert run.settings["importance_aggregation"] == "max"
    assert one("evict3r", budget_ratios=(), budgets=("1MiB",)).name == "evict3r 1MiB"
    assert one("evict3r", budget_ratios=(), budgets=(0.5,)).name == "evict3r 50% of the past"
    assert one("evict3r", budget_ratios=()).name == "evict3r 50%"


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["evictr"], {}, "did you mean 'evict3r'?"),
        (["kvzap"], {}, "cannot run in a stream"),
        (["full", "full"], {}, "full is asked for more than once"),
        ([], {}, "no run was named"),
        (["random"], {"fidelity": "reference"}, "concerns evict3r"),
        (["random"], {"budget_ratios": (1.2,)}, "must lie in (0, 1]"),
        (["random"], {"budgets": ("much",), "budget_ratios": ()}, "not an amount of memory"),
        (["random"], {"budgets": (9,)}, "either budgets or budget_ratios"),
        (["frame_attention(ratio=1e)"], {}, "'1e' is not a number"),
        (["full"], {"num_frames": 0}, "num_frames must be 1 or more"),
    ],
)
def test_refusals(names, more, message):
    with pytest.raises(PolicyError) as error:
        plan_runs(names, asked(**more))
    assert message in str(error.value)


def test_a_budget_too_small_is_refused_before_the_first_frame(tmp_path):
    run = one("random", budget_ratios=(0.2,))
    with pytest.raises(BudgetError, match="smallest legal budget"):
        check_run(run, tiny(), TOKENS)
    with pytest.raises(BudgetError, match="smallest legal budget"):
        run_geometry(frames(COUNT), tiny(), [run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- recordings


def test_a_recording_is_what_a_session_says(tmp_path):
    images, run = frames(COUNT), one("evict3r")
    out = record(tiny(), run, images, tmp_path)
    session = run.session(tiny())
    counts = []
    for image in images:
        predicted = session.forward_stream(image[None])
        counts.append(session.tokens_per_layer())
    assert out.report | {"bytes_predictions": 0} == session.report() | {"bytes_predictions": 0}
    assert out.tokens == counts
    assert out.held[-1] == session.report()["bytes_held"] + session.report()["camera"]["bytes_held"]
    assert np.array_equal(np.load(tmp_path / "depth.npy"), predicted["depth"][0, ..., 0].numpy())
    assert torch.equal(out.points, predicted["world_points"][0])
    assert torch.equal(out.colours, images)
    assert torch.equal(out.extrinsics, decode_pose(predicted["pose_enc"][0], (32, 32))[0])
    assert len(out.seconds) == COUNT
    assert min(out.seconds) > 0


def test_points_are_thinned_where_there_are_many(monkeypatch):
    assert POINTS == 1_000_000
    monkeypatch.setattr("kvsieve.geometry.recording.POINTS", COUNT * 300)
    out, whole = record(tiny(), one("full"), frames(COUNT)), StreamSession(tiny(), "causal")
    for image in frames(COUNT):
        predicted = whole.forward_stream(image[None])
    assert out.stride == 2
    assert torch.equal(out.points, predicted["world_points"][0, :, ::2, ::2])
    assert out.depth.shape == (COUNT, 32, 32)


# ---- numbers


def test_numbers_against_the_truth_and_the_full_cache(measured):
    result, _, scenes, runs, _ = measured
    rows = {row["name"]: row for row in result["runs"]}
    run = next(run for run in runs if run.name == "evict3r 60%")
    for number, truth in enumerate(scenes[:2]):
        found = rows[run.name]["metrics_per_scene"][number]
        out, full = (record(tiny(), one_run, truth.images) for one_run in (run, one("full")))
        depth = depth_metrics(torch.from_numpy(out.depth), truth.depth)
        assert found["abs_rel"] == pytest.approx(depth["abs_rel"])
        assert found["delta_1.25"] == pytest.approx(depth["delta_1.25"])
        path = trajectory_metrics(out.extrinsics, truth.extrinsics)
        for name in ("ate", "rpe_translation", "rpe_rotation_deg"):
            assert found[name] == pytest.approx(path[name])
        parts = [
            {"depth": torch.from_numpy(o.depth), "extrinsics": o.extrinsics, "world_points": o.points}
            for o in (out, full)
        ]
        away = distance_to(*parts)
        assert found["depth_rel_to_full"] == pytest.approx(away["depth_rel"])
        assert found["translation_to_full"] == pytest.approx(away["translation"])
        assert found["points_rmse_to_full"] == pytest.approx(away["points_rmse"])
        assert found["accuracy_mean"] > 0
    assert rows[run.name]["metrics"]["ate"] == pytest.approx(
        sum(scene["ate"] for scene in rows[run.name]["metrics_per_scene"]) / 3
    )
    gap = rows[run.name]["difference_to_full"]["abs_rel"]
    assert gap["mean"] == pytest.approx(rows[run.name]["metrics"]["abs_rel"] - rows["full"]["metrics"]["abs_rel"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert "difference_to_full" not in rows["full"]
    assert "depth_rel_to_full" not in rows["full"]["metrics"]


def test_references_need_no_stream(measured, sequence):
    result, _, scenes, _, _ = measured
    assert torch.equal(scenes[0].depth, sequence.depth)
    alone = look_alone(tiny(), sequence.images)
    session = StreamSession(tiny(), "causal")
    torch.testing.assert_close(alone[:1], session.forward_stream(sequence.images[:1])["depth"][0, ..., 0])
    session.clear()
    torch.testing.assert_close(alone[3:4], session.forward_stream(sequence.images[3:4])["depth"][0, ..., 0])
    constant = best_constant(sequence.depth)
    assert constant.unique().numel() == 1
    best = depth_metrics(constant, sequence.depth, align="none")["abs_rel"]
    for factor in (0.95, 0.99, 1.01, 1.05):
        assert depth_metrics(factor * constant, sequence.depth, align="none")["abs_rel"] >= best
    assert set(result["references"]) == {"every frame alone", "best constant depth"}
    first = depth_metrics(constant, sequence.depth, align="none")["abs_rel"]
    assert 0 < result["references"]["best constant depth"]["abs_rel"] < 3 * first


def test_intervals_are_paired_and_need_three_scenes():
    full = [{"abs_rel": 1.0}, {"abs_rel": 5.0}, {"abs_rel": 9.0}]
    worse = [{"abs_rel": scene["abs_rel"] + 0.5} for scene in full]
    assert difference(worse, full, 0) == {"abs_rel": {"mean": 0.5, "low": 0.5, "high": 0.5}}
    assert difference(worse[:2], full[:2], 0)["abs_rel"]["low"] is None
    assert difference([{"abs_rel": None}, *worse[1:]], full, 0) == {}
    assert means([{"ate": 1.0, "abs_rel": None}, {"ate": 2.0, "abs_rel": 1.0}]) == {"ate": 1.5, "abs_rel": None}


def test_memory_is_measured(measured):
    result, _, scenes, runs, _ = measured
    rows = {row["name"]: row for row in result["runs"]}
    for run in runs:
        session = run.session(tiny())
        for image in scenes[0].images:
            session.forward_stream(image[None])
        report, row = session.report(), rows[run.name]
        assert (row["bytes_trunk"], row["bytes_camera"]) == (report["bytes_held"], report["camera"]["bytes_held"])
        assert row["bytes_held"] == row["bytes_trunk"] + row["bytes_camera"] <= row["bytes_largest"]
        assert row["evictions"] == report["evictions"]
        assert row["tokens_per_layer"] == session.tokens_per_layer()
        assert row["policy"] == session.memory.policy.to_dict()
        share = row["bytes_held"] / (report["bytes_full"] + report["camera"]["bytes_full"])
        assert row["share_of_full"] == pytest.approx(share)
    equal = {
        sum(rows[f"{name} 60%"]["tokens_per_layer"]) for name in ("evict3r", "recent", "random", "frame_attention")
    }
    assert equal == {DEPTH * int(0.6 * COUNT * TOKENS)}


# ---- files


def test_files(measured):
    result, folder, _, runs, told = measured
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored == json.loads(json.dumps({key: value for key, value in result.items() if key != "files"}))
    assert stored["runs"][0]["name"] == "full"
    assert stored["run"]["command"] == "typed"
    assert stored["run"]["versions"]["torch"] == torch.__version__
    assert {"seed", "hardware", "frames", "scenes", "tokens_per_frame"} <= set(stored["run"])
    for run in runs:
        here = folder / run.folder
        assert len(list(here.glob("depth_*.png"))) == COUNT
        assert np.load(here / "depth.npy").shape == (COUNT, 32, 32)
        assert (here / "points.ply").read_bytes().startswith(b"ply")
        assert (here / "points.glb").read_bytes().startswith(b"glTF")
    for name in ("tokens", "growth", "trajectory", "depths", "quality"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "results.md").read_text()
    assert text == markdown(result)
    assert all(run.name in text for run in runs)
    assert "best constant depth" in text
    total = 3 * len(runs) * COUNT
    assert told[-1][1:] == (total, total)
    assert [now[1] for now in told] == sorted(now[1] for now in told)


@pytest.mark.parametrize("width", [70, 100, 300])
def test_tables_fit_the_width(measured, width):
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(measured[0], width))
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert "AbsRel" in text
    assert ("RPE rot" in text) == (width == 300)


def test_images_without_truth(tmp_path):
    result = run_geometry(frames(COUNT), tiny(), plan_runs(["full", "random"], asked(budget_ratios=(0.6,))), tmp_path)
    full, random = result["runs"]
    assert full["metrics"] == {}
    assert set(random["metrics"]) == {
        "depth_rel_to_full", "translation_to_full", "rotation_deg_to_full", "points_rmse_to_full",
    }  # fmt: skip
    assert random["metrics"]["depth_rel_to_full"] > 0
    assert result["references"] == {}
    assert "AbsRel |" not in (tmp_path / "results.md").read_text().split("\n\n")[1]
    assert (tmp_path / "quality.png").is_file() is False  # the full cache alone has no distance to itself


def test_without_points_pictures_or_reference(tmp_path):
    (tmp_path / "random_80pct").mkdir()
    (tmp_path / "random_80pct" / "depth_0099.png").write_bytes(b"of an earlier run")
    runs = plan_runs(["random"], asked())
    result = run_geometry(frames(COUNT), tiny(), runs, tmp_path, save_points=False, save_plots=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "random_80pct", "results.md"]
    names = sorted(path.name for path in (tmp_path / "random_80pct").iterdir())
    assert names == ["depth.npy", *(f"depth_{i:04d}.png" for i in range(COUNT))]
    assert result["runs"][0]["metrics"] == {}
    assert any("Nothing is compared" in note for note in result["notes"])


def test_one_frame(tmp_path, sequence):
    truth = render_sequence(10_000_321, 1, (32, 32))
    result = run_geometry(truth, tiny(), plan_runs(["full", "window"], asked()), tmp_path)
    assert math.isfinite(result["runs"][0]["metrics"]["abs_rel"])
    assert result["runs"][0]["metrics"]["ate"] is None


def test_a_run_that_fails_on_the_way_leaves_the_others(tmp_path, monkeypatch):
    def fails(model, run, *more):
        if run.method == "recent":
            raise torch.cuda.OutOfMemoryError("no room for this\nand a lot of advice")
        return record(model, run, *more)

    monkeypatch.setattr("kvsieve.geometry.run.record", fails)
    scenes = [render_sequence(10_000_321 + i, 3, (32, 32)) for i in range(2)]
    runs = plan_runs(["full", "recent", "random"], asked())
    result = run_geometry(scenes, tiny(), runs, tmp_path, save_points=False, save_plots=False)
    full, failed, random = result["runs"]
    assert (full["status"], failed["status"], random["status"]) == ("ok", "failed", "ok")
    assert failed["error"] == "OutOfMemoryError: no room for this"
    assert failed["metrics"] == {}
    assert failed["error"] in (tmp_path / "results.md").read_text()
    assert random["metrics"]["depth_rel_to_full"] is not None


def test_sequences_that_do_not_fit(tmp_path):
    runs = plan_runs(["full"], asked())
    with pytest.raises(DataError, match="differ in length or size"):
        run_geometry([render_sequence(1, n, (32, 32)) for n in (2, 3)], tiny(), runs, tmp_path)
    with pytest.raises(DataError, match="no frame"):
        run_geometry([], tiny(), runs, tmp_path)
    with pytest.raises(DataError, match="no frame"):
        run_geometry(frames(2)[:0], tiny(), runs, tmp_path)
    with pytest.raises(PolicyError, match="names of their own"):
        run_geometry(frames(2), tiny(), [], tmp_path)
