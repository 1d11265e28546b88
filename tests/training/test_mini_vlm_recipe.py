"""Runs the recipe of the small SmolVLM at toy scale: training, stopping, going on, export, measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

RECIPE = Path(__file__).resolve().parents[2] / "training" / "mini_vlm"


def _python(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=RECIPE)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_recipe_resumes_exports_and_measures(tmp_path: Path) -> None:
    whole, halves, folder, table = (tmp_path / n for n in ("whole", "halves", "model", "measured.json"))
    _python("run.py", "--toy", "--work", str(whole), "--steps", "3", "--export", str(folder))
    _python("run.py", "--toy", "--work", str(halves), "--steps", "3", "--stop", "4")
    assert "resumed at step 4" in _python("run.py", "--toy", "--work", str(halves), "--steps", "3")
    first, second = (torch.load(work / "latest.pt", weights_only=True) for work in (whole, halves))
    assert first["at"] == second["at"]
    assert first["at"]["video"] == 3 + 2  # two steps of polish
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name

    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert {"loss", "silent", "counted"} <= lines[-1].keys()
    files = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= files

    _python("measure.py", str(folder), "--videos", "3", "--seeds", "0", "--out", str(table))
    measured = json.loads(table.read_text())[0]
    assert measured["lines"] == 4 + 5 + 6
    assert 0 <= measured["f1"] <= 1
    assert "10" not in measured["entries"]


CLIPS = """
import random
from clips import IGNORED, batch, video_example
from network import tokenizer
from settings import Recipe
words, recipe = tokenizer(), Recipe()
clip = recipe.clips[1]
for step in range(3):
    data = batch(words, recipe, 3, step, clip, 0)
    assert (data.ids == words.convert_tokens_to_ids("<image>")).sum() == len(data.frames) == len(data.placed)
    learned = data.labels != IGNORED
    assert (data.labels[learned] == data.ids[learned]).all()
    assert (data.weights[~learned] == 0).all()
    assert words.convert_tokens_to_ids("<unk>") not in data.ids
    again = batch(words, recipe, 3, step, clip, 0)
    assert (again.ids == data.ids).all() and (again.frames == data.frames).all()
print("fine")
"""


def test_clips_are_what_they_say_and_the_same_every_time() -> None:
    assert _python("-c", CLIPS).strip() == "fine"
