"""A budget in bytes bounds the memory of a process that reads a long input in chunks, at every moment.

What may come on top of the budget, the workspace, is stated here and in docs/streaming.md, and is measured in a process
of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import resident
from kvsieve.budgets import parse_bytes

MIB = 2**20
WORKER = Path(__file__).with_name("peak_worker.py")
LAYERS, HEADS, HEAD_DIM, CHUNK, CHUNKS = 8, 16, 128, 128, 12
BUDGET = "64MiB"
"""A third of what the full cache takes. 512MiB, with 64 heads of 256, gives the same picture (docs/streaming.md), but
takes minutes."""


def workspace(method: str, positions: str) -> int:
    """Bytes that a forward pass may need beside the budget: one layer's keys and values once more, because the kept
    ones are gathered while attention still holds the old ones; the chunk's own tensors in one layer (queries, keys and
    values before and after rotation, outputs); and what libraries allocate. With slot positions, also a copy of one
    layer's keys, and those behind a gap, which are few where only the newest stay, in float32 with their cosines, sines
    and products."""
    chunk = CHUNK * HEADS * HEAD_DIM * 4
    column = parse_bytes(BUDGET) // (2 * LAYERS) + chunk
    columns = 2 if positions == "original" else 3 if method == "streaming_llm" else 7
    return columns * column + 10 * chunk + 6 * MIB


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    if not resident.STATUS.is_file():
        pytest.skip("peak memory is measured on Linux only")
    asked = {
        "shape": [LAYERS, HEADS, HEAD_DIM], "budget": BUDGET, "chunk": CHUNK, "chunks": CHUNKS,
        "cases": [["streaming_llm", "slot"], ["h2o", "slot"], ["h2o", "original"], ["full", "original"]],
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
def test_the_peak_stays_within_the_budget_and_the_workspace(measured):
    *bounded, full = measured
    for row in bounded:
        assert row["budget"] == parse_bytes(BUDGET)
        assert row["most_held"] <= row["budget"]
        assert row["bytes_held"] > 0.95 * row["budget"]
        assert row["evictions"] > 0
        assert row["peak"] >= row["bytes_held"], "the measurement missed the cache"
        assert row["peak"] <= row["budget"] + workspace(row["method"], row["positions"])
        assert row["stays"] <= row["budget"] + 8 * MIB
    assert full["bytes_full"] == CHUNKS * CHUNK * LAYERS * 2 * HEADS * HEAD_DIM * 4
    assert full["bytes_full"] == 3 * parse_bytes(BUDGET)
    assert full["peak"] >= full["bytes_full"]
