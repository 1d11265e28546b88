"""Interruptions, shards, workers and two runs in one folder."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time

import pytest
import torch

from kvsieve._compare.cells import CellLog, read_rows
from kvsieve._compare.plan import prepare
from kvsieve._compare.run import _next, run
from kvsieve._compare.settings import Settings
from kvsieve._compare.watcher import Watcher
from kvsieve.compare import compare_compression_methods, merge_results
from kvsieve.errors import DataError, KvsieveError, PolicyError

OPTIONS = {"methods": "random,tova,keydiff", "max_samples": 3, "max_length": 160, "quiet": True}
CELLS = 12

SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from kvsieve import compare_compression_methods
compare_compression_methods(**json.loads(sys.argv[1]))
"""


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "files")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(autouse=True, scope="module")
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvsieve.compare.has_matplotlib", lambda: False)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, without_times(compare_compression_methods(output_dir=str(folder), **OPTIONS))


def test_killed_run_resumes_to_the_same_bits(whole, tmp_path):
    rows = tmp_path / "cells.jsonl"
    arguments = json.dumps(OPTIONS | {"output_dir": str(tmp_path)})
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while process.poll() is None and not (rows.is_file() and rows.read_bytes().count(b"\n") >= 2):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = rows.read_bytes().count(b"\n")
    assert 2 <= finished < CELLS, "the kill came in the middle"
    assert not (tmp_path / "comparison_summary.json").exists()
    with rows.open("ab") as file:
        file.write(b'{"key": "half a li')
    before = read_rows(tmp_path)
    result = compare_compression_methods(output_dir=str(tmp_path), resume=True, **OPTIONS)
    assert without_times(result) == whole[1]
    after = read_rows(tmp_path)
    assert len(after) == CELLS
    assert all(after[key] == row for key, row in before.items()), "finished cells are not done again"
    assert b"half a li" not in rows.read_bytes()


def test_resume_of_a_finished_run_does_nothing_again(whole):
    folder, first = whole
    before = (folder / "cells.jsonl").read_bytes()
    assert without_times(compare_compression_methods(output_dir=str(folder), resume=True, **OPTIONS)) == first
    assert (folder / "cells.jsonl").read_bytes() == before


def test_resume_does_not_take_rows_of_other_settings(whole, tmp_path):
    (tmp_path / "cells.jsonl").write_bytes((whole[0] / "cells.jsonl").read_bytes())
    other = OPTIONS | {"compression_ratio": 0.25, "methods": "random"}
    resumed = compare_compression_methods(output_dir=str(tmp_path), resume=True, **other)
    fresh = compare_compression_methods(output_dir=str(tmp_path / "fresh"), **other)
    assert without_times(resumed) == without_times(fresh)
    assert resumed["baseline_perplexity"] == whole[1]["baseline_perplexity"]
    assert len(read_rows(tmp_path)) == CELLS + 3, "the baseline's rows fit, random's do not"


def test_without_resume_earlier_results_move_aside(tmp_path):
    options = OPTIONS | {"methods": "random", "max_samples": 1}
    compare_compression_methods(output_dir=str(tmp_path), **options)
    first = (tmp_path / "detailed_results.json").read_bytes()
    for number in (1, 2):
        compare_compression_methods(output_dir=str(tmp_path), **options)
        assert len((tmp_path / "cells.jsonl").read_bytes().splitlines()) == 2
        assert {"cells.jsonl", "plan.json", "comparison.md"} <= set(os.listdir(tmp_path / f"previous-{number}"))
    assert (tmp_path / "previous-1" / "detailed_results.json").read_bytes() == first


def test_shards_add_up_to_the_whole(whole, tmp_path):
    half = compare_compression_methods(output_dir=str(tmp_path), shard="0/2", **OPTIONS)
    assert half["missing_cells"] == CELLS // 2
    assert half["results"] == []
    assert not (tmp_path / "comparison_summary.json").exists()
    with pytest.raises(DataError, match="6 of 12 cells are missing"):
        merge_results(str(tmp_path), quiet=True)
    result = compare_compression_methods(output_dir=str(tmp_path), shard="1/2", **OPTIONS)
    assert without_times(result) == whole[1], "the last shard writes the results"
    assert sorted(file.name for file in tmp_path.glob("cells*")) == [f"cells.shard-{i}-of-2.jsonl" for i in (0, 1)]
    (tmp_path / "comparison_summary.json").unlink()
    assert without_times(merge_results(str(tmp_path), quiet=True)) == whole[1]
    assert (tmp_path / "comparison_summary.json").is_file()
    compare_compression_methods(output_dir=str(tmp_path), shard="1/2", **OPTIONS)
    assert os.listdir(tmp_path / "previous-1") == ["cells.shard-1-of-2.jsonl"], "a shard touches its own rows only"


def test_two_runs_do_not_write_one_file(tmp_path):
    with (
        CellLog(tmp_path, (0, 1), resume=False),
        pytest.raises(KvsieveError, match="another run is writing"),
        CellLog(tmp_path, (0, 1), resume=True),
    ):
        pass
    with CellLog(tmp_path, (0, 1), resume=True) as log, CellLog(tmp_path, (1, 2), resume=True):
        log.append({"key": "a", "status": "ok"})
    assert read_rows(tmp_path) == {"a": {"key": "a", "status": "ok"}}


def test_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="must name a folder"):
        Settings(output_dir=str(tmp_path / "file"))
    with pytest.raises(KvsieveError, match="cannot write to"), CellLog(tmp_path / "file" / "below", (0, 1), False):
        pass


def test_torn_and_foreign_lines_count_as_absent(tmp_path):
    good = {"key": "a", "status": "ok", "nll": 1.5}
    lines = ["not json", "[1]", "{}", json.dumps(good | {"status": "failed"}), json.dumps(good), "", '{"key": "b'
             ]  # fmt: skip
    (tmp_path / "cells.jsonl").write_text("\n".join(lines))
    (tmp_path / "cells.shard-0-of-2.jsonl").write_text(json.dumps(good | {"status": "failed"}) + "\n")
    assert read_rows(tmp_path) == {"a": good}


def test_workers_give_the_same_numbers(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = prepare(Settings(**{k: v for k, v in OPTIONS.items() if k not in ("quiet", "methods")},
                            methods=("random", "tova"), output_dir=str(tmp_path)))  # fmt: skip
    seen = []
    watcher = Watcher()
    watcher.started = seen.append
    with CellLog(tmp_path, (0, 1), resume=False) as log:
        run(plan, log, ["cpu", "cpu"], watcher)
    rows, expected = read_rows(tmp_path), read_rows(whole[0])
    assert len(rows) == 9
    assert sorted(seen) == sorted(["baseline", "random", "tova"] * 3)
    for key, row in rows.items():
        assert without_times(row) == without_times(expected[key])


def test_a_dead_worker_is_reported():
    class Dead:
        exitcode = -9

    class Alive:
        exitcode = None

    with pytest.raises(KvsieveError, match=r"the worker on cuda:1 ended with exit code -9; .* --resume"):
        _next(queue.Queue(), [Alive(), Dead()], ["cuda:0", "cuda:1"])


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    compare_compression_methods(output_dir=str(tmp_path), methods="random", max_samples=1, max_length=20, quiet=True)
    assert torch.equal(torch.rand(2), expected)
