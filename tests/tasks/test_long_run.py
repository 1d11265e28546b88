"""Runs: rows, failures, resuming after a kill, summaries by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from kvsieve import zoo
from kvsieve.errors import BudgetError, DataError, PolicyError
from kvsieve.report.long_results import write_results
from kvsieve.tasks import needle
from kvsieve.tasks.contenders import Contender, contenders, parse_amount, parse_options
from kvsieve.tasks.earlier import earlier_results, is_earlier, read_earlier
from kvsieve.tasks.items import procedural_item
from kvsieve.tasks.longbench_scores import bootstrap_interval
from kvsieve.tasks.run import Run, load_run, missing, perform, trace_path
from kvsieve.tasks.summary import summarise
from kvsieve.trace import Trace


@pytest.fixture(scope="module")
def mini():
    return zoo.load("mini-lm")


@pytest.fixture
def make(mini):
    model, tokenizer = mini
    samples = needle.generate(tokenizer, 160, 3)

    def run(methods=None, **more):
        items = [procedural_item(one, tokenizer) for one in samples]
        methods = contenders(["streaming_llm", "random"], [0.5]) if methods is None else methods
        given = {"metrics": {items[0].task: "first_word"}, "command": "kvsieve ruler"} | more
        return Run("ruler", model, tokenizer, "mini-lm", methods, items, **given)

    return run


def _lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_every_sample_has_a_row_and_traces_are_kept(make, tmp_path):
    run = make()
    assert perform(run, tmp_path) is None
    rows = _lines(tmp_path)
    assert [row["method"] for row in rows] == ["full"] * 3 + ["streaming_llm"] * 3 + ["random"] * 3
    assert all(row["status"] == "ok" for row in rows)
    assert {row["kept_share"] for row in rows[:3]} == {1.0}
    traced = [path.relative_to(tmp_path / "traces").as_posix() for path in (tmp_path / "traces").glob("*/*.npz")]
    name = run.items[0].id
    assert sorted(traced) == [f"random/{name}.npz", f"streaming_llm/{name}.npz"]
    trace = Trace.load(trace_path(tmp_path, "streaming_llm", name))
    assert trace.about["score"] == rows[3]["score"]
    assert (trace.about["sink_tokens"], trace.about["method"]) == (4, "streaming_llm")
    plan, found, seconds = load_run(tmp_path)
    assert missing(plan, found) == 0
    assert all(seconds[key] > 0 for keys in plan["keys"] for key in keys)
    assert plan["run"]["mode"] == "query-aware"
    assert plan["run"]["seed"] == 42
    assert plan["run"]["versions"].keys() >= {"kvsieve", "torch", "transformers", "python"}


def test_a_run_that_stopped_goes_on_by_sample(make, tmp_path):
    run = make()
    perform(run, tmp_path / "whole")
    whole = (tmp_path / "whole" / "samples.jsonl").read_bytes()

    class StopError(Exception):
        pass

    class After:
        def __init__(self):
            self.count = 0

        def begin(self, run, total, finished):
            self.finished = finished

        def started(self, label):
            if self.count == 4:
                raise StopError

        def done(self, row):
            self.count += 1

    with pytest.raises(StopError):
        perform(run, tmp_path / "half", watcher=After())
    rows = tmp_path / "half" / "samples.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"key": "torn')
    watcher = After()
    watcher.count = 10
    assert perform(make(), tmp_path / "half", resume=True, watcher=watcher) is None
    assert watcher.finished == 4
    assert rows.read_bytes() == whole


def test_another_setting_is_another_row(make, tmp_path):
    run = make()
    keys = {run.key(run.contenders[1], run.items[0])}
    for change in ({"seed": 1}, {"aware": False}, {"chunk_size": 3}, {"positions": "slot"}):
        other = make(**change)
        keys.add(other.key(other.contenders[1], other.items[0]))
    other = make(contenders(["streaming_llm"], [0.4]))
    keys.add(other.key(other.contenders[1], other.items[0]))
    keys.add(run.key(run.contenders[1], replace(run.items[0], scoring=("other",))))
    assert len(keys) == 7
    assert make(about={"lengths": [1]}).key(run.contenders[1], run.items[0]) in keys


def test_a_surrogate_that_was_trained_anew_is_another(make, tmp_path):
    folder = tmp_path / "kvzap"
    shutil.copytree(zoo.path("mini-lm") / "kvzap", folder)
    methods = contenders(["kvzap"], [0.9], {"kvzap": {"scorer": str(folder)}})
    before = make(methods)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors")
    after = make(methods)
    assert before.key(methods[1], before.items[0]) != after.key(methods[1], after.items[0])


def test_a_run_can_grow_but_not_change(make, tmp_path):
    perform(make(contenders(["streaming_llm"], [0.5])), tmp_path)
    perform(make(contenders(["random"], [0.5])), tmp_path, resume=True)
    _, summary = write_results(tmp_path, pictures=False)
    assert [one["method"] for one in summary["overall"]] == ["full", "random"]
    assert "streaming_llm" not in (tmp_path / "report.html").read_text()
    for change in ({"seed": 1}, {"aware": False}, {"chunk_size": 3}):
        with pytest.raises(DataError, match="holds a run with"):
            perform(make(**change), tmp_path, resume=True)


def test_what_was_said_is_kept_when_scoring_fails(make, tmp_path):
    run = make(contenders([], []))
    run.items[0] = replace(run.items[0], score=lambda text: 1 / 0)
    perform(run, tmp_path)
    assert len(_lines(tmp_path)[0]["text"]) > 3


def test_a_failure_is_a_row_and_is_tried_again(make, tmp_path):
    run = make()
    broken = replace(run.items[1], score=lambda text: 1 / 0)
    run.items[1] = broken
    perform(run, tmp_path)
    rows = _lines(tmp_path)
    assert len(rows) == 9
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["id"] for row in failed] == [broken.id] * 3
    assert "ZeroDivisionError" in failed[0]["error"]
    assert "Traceback" in failed[0]["traceback"]
    summary = summarise(*load_run(tmp_path))
    full = summary["overall"][0]
    assert (full["failed"], full["samples"]) == (1, 3)
    good = [row["score"] for row in rows[:3] if row["status"] == "ok"]
    assert full["score"] == pytest.approx(100 * sum(good) / 3)
    assert len(summary["failures"]) == 3
    perform(make(), tmp_path, resume=True)
    assert summarise(*load_run(tmp_path))["failures"] == []


def test_an_earlier_run_is_set_aside(make, tmp_path):
    run = make(contenders([], []))
    perform(run, tmp_path)
    first = (tmp_path / "samples.jsonl").read_bytes()
    moved = perform(make(contenders([], []), seed=1), tmp_path)
    assert moved == tmp_path / "previous-1"
    assert (moved / "samples.jsonl").read_bytes() == first
    assert (moved / "run.json").is_file()
    assert len(_lines(tmp_path)) == 3


def test_what_cannot_run_is_said_before_it_begins(make, mini):
    run = make()
    with pytest.raises(DataError, match="two samples have the id"):
        Run("ruler", *mini, "mini-lm", run.contenders, [run.items[0]] * 2, {}, "c")
    with pytest.raises(DataError, match="no samples"):
        Run("ruler", *mini, "mini-lm", run.contenders, [], {}, "c")
    for bad in ({"positions": "contiguous"}, {"chunk_size": 0}, {"traced": -1}):
        with pytest.raises(PolicyError, match=next(iter(bad)).replace("traced", "traces")):
            make(**bad)
    with pytest.raises(PolicyError, match="same name and budget"):
        make([*contenders(["h2o"], [0.5]), *contenders(["h2o"], [0.5])[1:]])


def test_longer_than_the_model_is_noted(make):
    run = make()
    long = replace(run.items[0], id="long", max_new_tokens=5000)
    noted = Run("ruler", run.model, run.tokenizer, "mini-lm", run.contenders, [long], {}, "c")
    assert "was made for 2,048" in noted.notes[0]
    assert make().notes == []


# ---- a run that is killed


def _command(folder, *more):
    line = ["ruler", "--lengths", "200", "--samples", "8", "--policy", "h2o,random", "--output", str(folder), *more]
    return [sys.executable, "-m", "kvsieve.cli", *line]


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(_command(tmp_path / "whole"), check=True, env=env, capture_output=True)
    rows = tmp_path / "killed" / "samples.jsonl"
    process = subprocess.Popen(
        _command(tmp_path / "killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and (not rows.is_file() or rows.read_bytes().count(b"\n") < 9):
        time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = rows.read_bytes().count(b"\n")
    assert 9 <= done < 24
    assert not (tmp_path / "killed" / "summary.json").exists()
    again = subprocess.run(_command(tmp_path / "killed", "--resume"), env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{done} of 24 were finished before" in again.stdout
    assert rows.read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert (tmp_path / "killed" / "report.html").is_file()


# ---- methods


def test_methods_and_budgets_as_typed():
    found = contenders(["snapkv", "h2o", "baseline", "snapkv"], [0.25, 512], {"h2o": {"window_size": 8}})
    assert [one.label for one in found] == ["full", "snapkv@0.25", "snapkv@512", "h2o@0.25", "h2o@512"]
    assert found[3].options == {"window_size": 8}
    assert found[1].asked == "0.25 of the tokens"
    assert found[2].asked == "512 tokens"
    assert [one.label for one in contenders(["h2o"], [0.5, 0.50])] == ["full", "h2o"]
    assert [parse_amount(text) for text in ("0.25", "512", "1MiB")] == [0.25, 512, "1MiB"]
    assert parse_options(["h2o.window_size=8", "random.x=none", "a.b=true", "a.c=0.5"]) == {
        "h2o": {"window_size": 8},
        "random": {"x": None},
        "a": {"b": True, "c": 0.5},
    }
    assert len(contenders(["all"], [0.5])) > 15


def test_methods_that_draw_numbers_draw_others_for_each_item():
    one = Contender("random", "random", 0.5)
    seeds = {one.policy(seed, item).scorer.seed for seed in (1, 2) for item in ("a", "b")}
    assert len(seeds) == 4
    assert one.policy(1, "a") == one.policy(1, "a")
    fixed = Contender("random", "random", 0.5, {"seed": 3})
    assert fixed.policy(1, "a").scorer.seed == 3


@pytest.mark.parametrize(
    ("names", "budgets", "options", "error", "words"),
    [
        (["h20"], [0.5], {}, PolicyError, "did you mean"),
        (["h2o"], [1.5], {}, BudgetError, "must lie in"),
        (["h2o"], [4], {}, BudgetError, "smallest legal budget"),
        (["h2o"], ["12 apples"], {}, BudgetError, "not an amount"),
        (["h2o"], [0.5], {"h2o": {"colour": 1}}, PolicyError, "no hyper-parameter"),
        (["h2o"], [0.5], {"tova": {}}, PolicyError, "does not have"),
    ],
)
def test_what_is_no_method_is_refused(names, budgets, options, error, words):
    with pytest.raises(error, match=words):
        contenders(names, budgets, options)
    with pytest.raises(PolicyError, match=r"METHOD\.NAME=VALUE"):
        parse_options(["h2o"])


# ---- summaries, by hand


def _plan(depths=(0.0, 1.0), kind="ruler", answerable=True):
    items = [
        {"id": f"{task}{i}", "task": task, "length": 100, "depth": depth, "prompt_tokens": 90, "answerable": answerable}
        for task in ("a", "b")
        for i, depth in enumerate(depths)
    ]
    methods = [
        {"label": "full", "name": "full", "budget": "everything", "options": {}},
        {"label": "m", "name": "h2o", "budget": "0.25 of the tokens", "options": {}},
    ]
    keys = [[f"{method['label']}/{item['id']}" for item in items] for method in methods]
    about = {"model": "mini-lm", "seed": 1, "chunk_size": 4, "positions": "original"}
    return {
        "format": 1, "kind": kind, "run": about, "tasks": [], "methods": methods, "items": items, "keys": keys,
        "notes": ["first"],
    }  # fmt: skip


def _row(score, survival=1.0, kept=0.25, layers=(1.0, 1.0)):
    return {
        "status": "ok", "score": score, "kept_share": kept, "tokens_kept": 25.0, "bytes_held": 100, "bytes_full": 400,
        "prompt_tokens": 90, "survival": survival, "survival_by_layer": list(layers),
    }  # fmt: skip


def test_a_summary_by_hand():
    plan = _plan()
    rows = {key: _row(1.0, kept=1.0) for key in plan["keys"][0]}
    rows["m/a0"] = _row(1.0, 0.5, layers=(1.0, 0.0))
    rows["m/a1"] = _row(0.0, 0.25, layers=(0.5, 0.0))
    rows["m/b0"] = _row(0.0, 1.0)
    rows["m/b1"] = {"status": "failed", "error": "E: x"}
    summary = summarise(plan, rows, dict.fromkeys(plan["keys"][1], 2.0))
    full, m = summary["overall"]
    assert (full["score"], full["delta"], full["seconds"]) == (100.0, None, 0.0)
    assert (m["score"], m["delta"], m["seconds"]) == (25.0, -75.0, 8.0)
    assert (m["failed"], m["samples"], m["kept_share"], m["bytes_held"]) == (1, 4, 0.25, 100)
    assert (m["wrong_evicted"], m["wrong_held"]) == (1, 1)
    a, b = summary["results"][2:]
    assert a["survival"] == {
        "answerable": 2, "held": 1, "share": 0.375, "by_layer": [0.75, 0.0], "wrong_evicted": 1, "wrong_held": 0,
    }  # fmt: skip
    assert m["survival"] == pytest.approx((0.375 + 1.0) / 2)
    assert b["sample_scores"] == {"b0": 0.0, "b1": 0.0}
    assert a["by_depth"] == [
        {"depth": 0.0, "score": 100.0, "survival": 0.5, "samples": 1},
        {"depth": 1.0, "score": 0.0, "survival": 0.25, "samples": 1},
    ]
    assert summary["failures"] == [{"method": "m", "task": "b", "id": "b1", "error": "E: x"}]
    assert summary["notes"] == ["first"]


def test_intervals_are_those_of_the_samples():
    plan = _plan(depths=[i / 9 for i in range(10)])
    plan["items"], plan["keys"] = plan["items"][:10], [keys[:10] for keys in plan["keys"]]
    scores = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    rows = {key: _row(1.0) for key in plan["keys"][0]}
    rows |= {key: _row(score) for key, score in zip(plan["keys"][1], scores, strict=True)}
    m = summarise(plan, rows)["overall"][1]
    assert m["interval"] == list(bootstrap_interval(scores, seed=1))
    low, high = bootstrap_interval([score - 1 for score in scores], seed=1)
    assert m["delta_interval"] == [low, high]
    assert low < m["delta"] < high


def test_the_interval_of_several_tasks_surrounds_their_mean():
    """Tasks count the same; samples are drawn within each."""
    plan = _plan(depths=[0.0, 0.5, 1.0])
    rows = {key: _row(1.0) for key in plan["keys"][0]}
    rows |= {key: _row(score) for key, score in zip(plan["keys"][1], [1, 0, 0, 1, 1, 0], strict=True)}
    m = summarise(plan, rows)["overall"][1]
    assert m["score"] == pytest.approx(50.0)
    assert m["interval"][0] < 50 < m["interval"][1]
    rng, means = np.random.default_rng(1), 0.0
    for scores in ([1, 0, 0], [1, 1, 0]):
        means = means + rng.multinomial(3, [1 / 3] * 3, size=2000) @ np.array(scores) * (50 / 3)
    assert m["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert m["delta_interval"][0] < m["delta"] == pytest.approx(-50.0)


def test_when_methods_decide_is_noted():
    plan = _plan()
    plan["methods"][1]["steady"] = True
    rows = {key: _row(1.0) for keys in plan["keys"] for key in keys}
    assert "before the question was seen" in " ".join(summarise(plan, rows)["notes"])
    plan["run"]["mode"] = "query-agnostic"
    assert "has a say" in " ".join(summarise(plan, rows)["notes"])
    plan["methods"][1]["steady"] = False
    assert "held in full" in " ".join(summarise(plan, rows)["notes"])
    rows["m/a0"]["unmanaged_layers"] = {"1": "DynamicSlidingWindowLayer"}
    assert "1 layers of this model (DynamicSlidingWindowLayer) are not managed" in " ".join(
        summarise(plan, rows)["notes"]
    )


def test_what_is_off_is_noted():
    plan = _plan()
    rows = {key: _row(0.0, kept=1.0) for keys in plan["keys"] for key in keys}
    notes = " ".join(summarise(plan, rows)["notes"])
    assert "m evicted nothing" in notes
    assert "a at 100 tokens: the full cache itself scores 0.0" in notes
    rows |= {key: _row(1.0, kept=0.5) for key in plan["keys"][1]}
    notes = " ".join(summarise(plan, rows)["notes"])
    assert "asked to keep 25% and kept 50%" in notes


def test_depths_that_are_all_different_come_in_tenths():
    plan = _plan(depths=[i / 29 for i in range(30)])
    rows = {key: _row(1.0) for keys in plan["keys"] for key in keys}
    cells = summarise(plan, rows)["results"][0]["by_depth"]
    assert [cell["depth"] for cell in cells] == pytest.approx([0.05 + i / 10 for i in range(10)])
    assert sum(cell["samples"] for cell in cells) == 30


def test_the_earlier_scripts_file(make, tmp_path):
    run = make(contenders(["streaming_llm"], [0.5]))
    run.items[2] = replace(run.items[2], score=lambda text: 1 / 0)
    perform(run, tmp_path)
    plan, rows, seconds = load_run(tmp_path)
    summary = summarise(plan, rows, seconds)
    data = json.loads(json.dumps(earlier_results(plan, rows, seconds, summary)))
    assert is_earlier(data)
    assert not is_earlier(summary)
    assert data["summary"]["failed"] == 1
    assert [one["success"] for one in data["results"]] == [True, True, False]
    back = read_earlier(data, "x.json")
    assert back["overall"][0]["score"] == pytest.approx(summary["overall"][1]["score"])
    assert back["overall"][0]["failed"] == 1
    with pytest.raises(DataError, match="no results"):
        read_earlier({"config": {}, "results": []}, "x.json")
    twice = {"success": True, "score": 1, "id": "a"}
    with pytest.raises(DataError, match="twice"):
        read_earlier({"config": {}, "results": [twice, twice]}, "x.json")
    with pytest.raises(DataError, match="score"):
        read_earlier({"config": {}, "results": [{"success": True}]}, "x.json")
