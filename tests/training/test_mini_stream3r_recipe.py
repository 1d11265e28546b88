"""Runs the recipe of the small STream3R at toy scale: training, stopping, going on, export, measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

RECIPE = Path(__file__).resolve().parents[2] / "training" / "mini_stream3r"


def _python(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=RECIPE)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def _run(work: Path, *arguments: str) -> str:
    return _python("run.py", "--toy", "--workers", "0", "--work", str(work), *arguments)


def test_recipe_resumes_exports_and_measures(tmp_path: Path) -> None:
    whole, halves, folder, table = (tmp_path / n for n in ("whole", "halves", "model", "measured.json"))
    _run(whole, "--steps", "4", "--export", str(folder))
    _run(halves, "--steps", "4", "--stop", "2")
    assert "resumed at step 2" in _run(halves, "--steps", "4")
    first, second = (torch.load(work / "latest.pt", weights_only=True) for work in (whole, halves))
    assert first["step"] == second["step"] == 4
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]

    _python("measure.py", str(folder), "--scenes", "1", "--frames", "3", "--out", str(table))
    measured = json.loads(table.read_text())[0]
    assert measured["stream"] == pytest.approx(lines[-1]["held_out"]["stream"], abs=0.01)
    assert {"alone", "first_and_self", "constant", "rotation_degrees"} <= measured.keys()


SAME_BATCH = """
from pathlib import Path
import torch
from data import rendered
from network import build
from settings import TOY, TOY_SIZES
from trainer import Trainer
trainer = Trainer(build(TOY_SIZES, 0), TOY, Path("."), 0)
batch = rendered([1, 2], 2, 32)
for _ in range(10):
    print(trainer.train_step(batch)["total"])
"""

SCALES = """
import torch
from measure import absrel, best_constant
truth = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
assert absrel(3 * truth, truth) < 1e-5
noisy = truth * (1 + 0.3 * torch.randn(1000, generator=torch.Generator().manual_seed(1))).clamp(min=0.1)
p = noisy.double()
best = min((float((s * p - truth).abs().sum()), float(s)) for s in torch.linspace(0.5, 2, 3001).double())[1]
assert abs(absrel(noisy, truth) - float(((best * p - truth).abs() / truth).mean())) < 1e-3
constants = [float(((c - truth).abs() / truth).mean()) for c in torch.linspace(0.5, 1.5, 1001)]
assert abs(best_constant(truth) - min(constants)) < 1e-3
"""


def test_ten_steps_on_one_batch_lower_the_loss() -> None:
    totals = [float(line) for line in _python("-c", SAME_BATCH).split()]
    assert totals[-1] < 0.8 * totals[0]


def test_scale_and_constant_are_the_best_ones() -> None:
    _python("-c", SCALES)
