"""`kvsieve geometry`: what it runs, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kvsieve
from kvsieve import zoo
from kvsieve.cli import app
from kvsieve.cli_geometry import DEMO

sys.path.append(str(Path(__file__).parent / "geometry"))

from common import TOKENS, frames, tiny

runner = CliRunner()
COUNT = 5


def invoke(*arguments):
    return runner.invoke(app, ["geometry", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Plots are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvsieve.report.plots.has_matplotlib", lambda: False)
        patch.setattr("kvsieve.geometry.scoring.POINTS", 300)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of PNGs, one of them of another size where asked."""
    image_module = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(frames(COUNT, (48, 64))):
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        image_module.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def asked(monkeypatch, model):
    """What reaches `run_geometry`, which does nothing."""
    seen = {}

    def take(sequences, loaded, runs, output, **more):
        seen.update(more, sequences=sequences, runs=runs, output=output)
        raise kvsieve.KvsieveError("far enough")

    monkeypatch.setattr("kvsieve.geometry.run.run_geometry", take)
    return seen


def names(asked):
    return [run.name for run in asked["runs"]]


def test_a_folder_of_images(images, model, tmp_path):
    done = invoke(
        "--images", images, "--model", model, "--policy", "evict3r", "--budget-ratio", "0.7", "--output", tmp_path
    )
    assert done.exit_code == 0, done.output
    assert "2 runs over 5 frames of 24x32 pixels" in done.output
    assert "evict3r 70%" in done.output
    assert "How to read it" in done.output
    assert "no plots: matplotlib is not installed" in done.output
    stored = json.loads((tmp_path / "metrics.json").read_text())
    full, evict3r = stored["runs"]
    assert full["tokens_per_layer"] == [COUNT * 17] * 3
    assert sum(evict3r["tokens_per_layer"]) == 3 * int(0.7 * COUNT * 17)
    assert evict3r["metrics"]["depth_rel_to_full"] > 0
    assert stored["run"]["command"].startswith("kvsieve geometry --images=")
    assert (tmp_path / "evict3r_70pct" / "points.glb").is_file()
    assert len(list((tmp_path / "full").glob("depth_*.png"))) == COUNT


def test_the_demo_is_a_preset_that_typed_flags_override(asked, model):
    invoke("--demo", "--model", model, "--frames", 6, "--scenes", 3)
    assert len(asked["sequences"]) == 3
    assert asked["sequences"][0].depth.shape == (6, 32, 32)
    kinds = {run.method for run in asked["runs"]}
    assert kinds == {"full", "window", "recent", "random", "frame_attention", "frame_attention(ratio)", "evict3r"}
    assert {run.ratio for run in asked["runs"]} == {None, 0.5, 0.2}
    invoke("--demo", "--model", model, "--frames", 6, "--budget", "99", "--compare", "random,recent")
    assert names(asked) == ["full", "random 99", "recent 99"]
    assert len(asked["sequences"]) == DEMO["scenes"]
    invoke("--demo", "--model", model, "--frames", 6, "--policy", "random")
    assert names(asked) == ["full", "random 50%", "random 20%"]


def test_the_demo_runs(model, tmp_path):
    done = invoke(
        "--demo", "--model", model, "--frames", 4, "--scenes", 3, "--compare", "evict3r,window", "--budget-ratio", 0.6,
        "--no-save-points", "--output", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "best constant depth" in done.output
    assert "next scene ..." in done.output
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["runs"][1]["difference_to_full"]["abs_rel"]["low"] is not None
    assert not (tmp_path / "full" / "points.ply").exists()


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ([], ["full"]),
        (["--mode", "window"], ["full", "window"]),
        (["--mode", "window", "--no-reference"], ["window"]),
        (["--budget-ratio", "0.8"], ["full", "evict3r 80%"]),
        (["--budget", "99"], ["full", "evict3r 99"]),
        (["--policy", "lagkv", "--budget", "99,1MiB,0.9"],
         ["full", "lagkv 99", "lagkv 1MiB", "lagkv 90% of the past"]),
        (["--eviction-ratio", "0.25"], ["full", "frame_attention(ratio=0.25)"]),
        (["--policy", "frame_attention"], ["full", "frame_attention 50%"]),
        (["--compare", "random,frame_attention", "--eviction-ratio", "0.3", "--num-frames", "50"],
         ["full", "random 50%", "frame_attention 50%", "frame_attention(ratio=0.3)"]),
        (["--policy", "evict3r", "--fidelity", "reference", "--mode", "causal"], ["full", "evict3r 50%"]),
    ],
)  # fmt: skip
def test_flags_become_runs(asked, images, model, flags, want):
    done = invoke("--images", images, "--model", model, "--output", "nowhere", *flags)
    assert "far enough" in done.stderr
    assert names(asked) == want
    assert asked["output"] == "nowhere"
    if "--num-frames" in flags:
        assert asked["runs"][1].settings["policy"].budget.n == 25 * 17


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --images FOLDER and --demo"),
        (["--images", "IMAGES", "--demo"], "give one of --images FOLDER and --demo"),
        (["--images", "nowhere"], "nowhere does not exist"),
        (["--images", "EMPTY"], "holds no image"),
        (["--images", "IMAGES", "--model", "no/such/folder/here"], "is not a folder"),
        (["--images", "IMAGES", "--model", "mini-lm"], "mini-lm is a model of text"),
        (["--images", "IMAGES", "--policy", "evictr"], "did you mean 'evict3r'?"),
        (["--images", "IMAGES", "--compare", "full,kvzap"], "cannot run in a stream"),
        (["--images", "IMAGES", "--compare", "full", "--policy", "random"], "are for a single run"),
        (["--images", "IMAGES", "--budget", "20"], "the smallest legal budget here is"),
        (["--images", "IMAGES", "--budget-ratio", "half"], "a share of the stream such as 0.5"),
        (["--images", "IMAGES", "--budget-ratio", "0.5", "--budget", "99"], "either budgets or budget_ratios"),
        (["--images", "IMAGES", "--budget", "99", "--eviction-ratio", "0.5"], "give no --budget"),
        (["--images", "IMAGES", "--policy", "random", "--eviction-ratio", "0.5"], "is for frame_attention"),
        (["--images", "IMAGES", "--mode", "full"], "cannot run in mode 'full'"),
        (["--images", "IMAGES", "--preprocess", "stretch"], "is not one of crop, pad"),
        (["--images", "IMAGES", "--scenes", "2"], "--scenes is for --demo"),
        (["--images", "IMAGES", "--frames", "0"], "--frames must be 1 or more"),
        (["--images", "IMAGES", "--device", "cuda:99"], "usable GPUs"),
    ],
)
def test_refusals_are_one_line_with_exit_code_2(images, model, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    places = {"IMAGES": images, "EMPTY": tmp_path / "empty"}
    words = [places.get(flag, flag) for flag in flags]
    if "--model" not in flags:
        words += ["--model", model]
    done = invoke(*words, "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_pictures_of_several_sizes_and_the_first_few(images, model, tmp_path):
    from PIL import Image

    for name in ("0.png", "1.png", "2.png"):
        Image.open(images / name).save(tmp_path / name)
    Image.open(images / "3.png").resize((64, 64)).save(tmp_path / "10.png")
    common = ("--model", model, "--no-save-points", "--output")
    done = invoke("--images", tmp_path, *common, tmp_path / "all")
    assert "1 runs over 4 frames of 32x32 pixels" in done.output
    assert done.exit_code == 0
    done = invoke("--images", tmp_path, "--frames", 3, "--preprocess", "pad", *common, tmp_path / "some")
    assert "1 runs over 3 frames of 32x32 pixels" in done.output
    (tmp_path / "11.png").write_bytes(b"not a picture")
    done = invoke("--images", tmp_path, *common, tmp_path / "none")
    assert done.exit_code == 2
    assert "cannot be read as an image" in done.stderr


def test_a_failed_run_makes_the_exit_code_1(images, model, tmp_path, monkeypatch):
    def fails(model, run, *more):
        raise kvsieve.BudgetError("too little")

    monkeypatch.setattr("kvsieve.geometry.run.record", fails)
    done = invoke("--images", images, "--model", model, "--output", tmp_path)
    assert done.exit_code == 1
    assert "full failed: BudgetError: too little" in done.output


def test_a_small_model_runs_on_one_thread_unless_told(asked, images, model, monkeypatch):
    told = []
    monkeypatch.setattr("torch.set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    invoke("--images", images, "--model", model)
    assert told == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    invoke("--images", images, "--model", model)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("kvsieve.cli_common._SMALL", 1000)
    invoke("--images", images, "--model", model)
    assert told == [1]


def test_a_tracker_in_the_weights_is_left_out_on_request(asked, images, model, tmp_path):
    other = tmp_path / "with_tracker"
    other.mkdir()
    (other / "config.json").write_text((model / "config.json").read_text())
    save_file(load_file(model / "model.safetensors") | {"track_head.x": torch.zeros(2)}, other / "model.safetensors")
    refused = invoke("--images", images, "--model", other)
    assert refused.exit_code == 2
    assert "skip_track_head" in refused.output
    assert not asked
    assert "far enough" in invoke("--images", images, "--model", other, "--skip-track-head").stderr


def test_help_says_what_there_is():
    text = invoke("--help").output
    for flag in (
        "--images", "--demo", "--model", "--mode", "--policy", "--budget", "--budget-ratio", "--num-frames",
        "--eviction-ratio", "--importance-aggregation", "--temp", "--fidelity", "--compare", "--output", "--preprocess",
        "--seed", "--frames", "--scenes", "--save-points", "--no-save-points", "--device", "--debug", "--no-reference",
    ):  # fmt: skip
        assert flag in text
    assert TOKENS == 21


# ---- the bundled model


def test_the_zoo_knows_kinds():
    assert zoo.list_models("text") == ["mini-lm"]
    assert zoo.list_models("geometry") == ["mini-stream3r"]
    assert zoo.list_models() == ["mini-lm", "mini-stream3r", "mini-vlm"]


def test_the_zoo_loads_a_stream3r_alone(model, monkeypatch):
    monkeypatch.setattr(zoo, "path", lambda name: model)
    loaded = zoo.load("mini-stream3r")
    assert isinstance(loaded, kvsieve.geometry.STream3R)
    assert not loaded.training
    assert zoo.load("mini-stream3r", dtype=torch.bfloat16).aggregator.camera_token.dtype == torch.bfloat16
    monkeypatch.setattr(zoo, "path", lambda name: model / "empty")
    with pytest.raises(kvsieve.KvsieveError, match="weights of mini-stream3r are missing"):
        zoo.load("mini-stream3r")


@pytest.mark.skipif(not (zoo.path("mini-stream3r") / "model.safetensors").is_file(), reason="not trained yet")
def test_the_bundled_model_beats_a_constant(tmp_path):
    done = invoke(
        "--demo", "--frames", 3, "--scenes", 1, "--compare", "full,window", "--no-save-points", "--output", tmp_path
    )
    assert done.exit_code == 0, done.output
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["runs"][0]["metrics"]["abs_rel"] < stored["references"]["best constant depth"]["abs_rel"]


@pytest.mark.parametrize("methods", [[], ["--methods", "random"]])
def test_compare_refuses_a_model_of_images(methods, tmp_path):
    out = tmp_path / "out"
    done = runner.invoke(app, ["compare", "--model", "mini-stream3r", "--output-dir", str(out), *methods])
    assert done.exit_code == 2
    assert "mini-stream3r is not a language model; use it with `kvsieve geometry`" in done.stderr
    assert not out.exists()
