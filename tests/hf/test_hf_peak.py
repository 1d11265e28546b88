"""A budget in bytes bounds the memory of a process that reads a long input in chunks, at every moment.

What may come on top of the budget, the workspace, is stated here and in docs/streaming.md, and is measured in a process
of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import resident
from kvsieve.budgets import parse_bytes

MIB = 2**20
WORKER = Path(__file__).with_name("peak_worker.py")
LAYERS, CHUNK = 8, 128


@dataclass(frozen=True)
class Case:
    """A budget that is a third of what the full cache takes, or nearly so."""

    budget: str
    heads: int
    head_dim: int
    chunks: int
    runs: tuple[tuple[str, str], ...]

    @property
    def full(self) -> int:
        """Bytes of all keys and values that are fed."""
        return self.chunks * CHUNK * LAYERS * 2 * self.heads * self.head_dim * 4


CASES = [
    Case(
        "64MiB", 16, 128, 12,
        (("streaming_llm", "slot"), ("h2o", "slot"), ("h2o", "original"), ("full", "original")),
    ),
    Case("512MiB", 64, 256, 6, (("h2o", "original"),)),
]  # fmt: skip


def workspace(case: Case, method: str, positions: str) -> int:
    """Bytes that a forward pass may need beside the budget: one layer's keys and values once more, because the kept
    ones are gathered while attention still holds the old ones; the chunk's own tensors in one layer (queries, keys and
    values before and after rotation, outputs); and what libraries allocate. With slot positions, also a copy of one
    layer's keys, and those behind a gap, which are few where only the newest stay, in float32 with their cosines, sines
    and products."""
    chunk = CHUNK * case.heads * case.head_dim * 4
    column = parse_bytes(case.budget) // (2 * LAYERS) + chunk
    columns = 2 if positions == "original" else 3 if method == "streaming_llm" else 7
    return columns * column + 10 * chunk + 6 * MIB


def measure(case: Case) -> list[dict[str, Any]]:
    if not resident.STATUS.is_file():
        pytest.skip("peak memory is measured on Linux only")
    asked = {
        "shape": [LAYERS, case.heads, case.head_dim], "budget": case.budget, "chunk": CHUNK, "chunks": case.chunks,
        "cases": case.runs,
    }  # fmt: skip
    environment = {**os.environ, **resident.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(asked)],
        capture_output=True, text=True, check=False, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if not all(row["reset"] for row in rows):
        pytest.skip("this system does not let a process reset its high-water mark")
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.budget)
def test_the_peak_stays_within_the_budget_and_the_workspace(case):
    rows = measure(case)
    assert [(row["method"], row["positions"]) for row in rows] == list(case.runs)
    for row in rows:
        assert row["bytes_full"] == case.full
        assert row["peak"] >= row["bytes_held"], "the measurement missed the cache"
        if row["method"] == "full":
            assert row["peak"] >= row["bytes_full"] == 3 * parse_bytes(case.budget)
            continue
        assert row["budget"] == parse_bytes(case.budget)
        assert row["most_held"] <= row["budget"]
        assert row["bytes_held"] > 0.95 * row["budget"]
        assert row["evictions"] > 0
        assert row["peak"] <= row["budget"] + workspace(case, row["method"], row["positions"])
        assert row["stays"] <= row["budget"] + 8 * MIB
