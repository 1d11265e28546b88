"""`kvsieve ruler`, `longbench`, `visualize`, `diff` and `report` as typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from kvsieve.cli import app
from kvsieve.report.diff import compare_runs, load_summary
from kvsieve.tasks.longbench_scores import bootstrap_interval
from kvsieve.trace import Trace

RULER = ("ruler", "--no-pictures", "--lengths", "200", "--samples", "3", "--policy", "streaming_llm")


def _run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _summary(folder):
    return json.loads((folder / "summary.json").read_text())


def _samples(folder, count=4, name="qasper", **more):
    """LongBench records that the bundled model can make something of."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    rows = []
    for i in range(count):
        row = {"_id": f"s{i}", "context": f"Tom is here. The code of Alice is tree{i}. " + "All is well. " * 20}
        row |= {"input": "What is the code of Alice?", "answers": [f"tree{i}"], "all_classes": None, "length": 70 + i}
        rows.append(json.dumps(row | {"dataset": name, "language": "en"} | more))
    file.write_text("\n".join(rows) + "\n")
    return file


# ---- ruler


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler") / "out"
    result = _run(*RULER, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_ruler_leaves_everything_it_promises(done):
    folder, output = done
    names = {"run.json", "samples.jsonl", "timings.jsonl", "summary.json", "summary.csv", "summary.md", "report.html"}
    assert names <= {file.name for file in folder.iterdir()}
    summary = _summary(folder)
    assert [one["method"] for one in summary["overall"]] == ["full", "streaming_llm"]
    assert summary["run"]["command"] == "kvsieve ruler --lengths=200 --samples=3 --policy=streaming_llm"
    full, less = summary["overall"]
    assert full["kept_share"] == 1.0
    assert less["kept_share"] == pytest.approx(0.25, abs=0.02)
    assert less["bytes_held"] < 0.3 * full["bytes_held"]
    assert len(full["interval"]) == 2
    assert "streaming_llm" in output
    assert "How to read it" in output
    assert "| full |" in (folder / "summary.md").read_text()
    assert (folder / "summary.csv").read_text().count("\n") == 3


def test_numbers_stay_the_same_and_resume_does_nothing(done, tmp_path):
    folder, _ = done
    again = _run(*RULER, "--output", folder, "--resume")
    assert "6 of 6 were finished before" in again.output
    _run(*RULER, "--output", tmp_path / "b")
    assert (tmp_path / "b" / "samples.jsonl").read_bytes() == (folder / "samples.jsonl").read_bytes()


def test_a_grid_has_every_depth_at_every_length(tmp_path):
    words = (
        "ruler",
        "--no-pictures",
        "--grid",
        "--depths",
        "3",
        "--lengths",
        "150,220",
        "--policy",
        "snapkv",
        "--budget",
        "0.5",
    )
    for tasks in ("needle", "niah_single_1"):
        lengths = words if tasks == "needle" else ("350,420" if word == "150,220" else word for word in words)
        result = _run(*lengths, "--tasks", tasks, "--output", tmp_path / tasks)
        assert result.exit_code == 0, result.output
        summary = _summary(tmp_path / tasks)
        cells = [(one["method"], one["length"], len(one["by_depth"])) for one in summary["results"]]
        assert len(cells) == 4
        assert {depths for *_, depths in cells} == {3}
        assert {cell["depth"] for one in summary["results"] for cell in one["by_depth"]} == {0.0, 0.5, 1.0}


def test_options_agnostic_runs_and_several_budgets(tmp_path):
    result = _run(
        *RULER[:-2], "--policy", "snapkv", "--budget", "0.2,40", "--option", "snapkv.window_size=8",
        "--query-agnostic", "--chunk-size", "16", "--traces", "0", "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = _summary(tmp_path / "out")
    assert [one["method"] for one in summary["overall"]] == ["full", "snapkv@0.2", "snapkv@40"]
    assert summary["run"]["mode"] == "query-agnostic"
    assert "--option=snapkv.window_size=8" in summary["run"]["command"]
    assert summary["overall"][2]["tokens_kept"] == 40
    assert not (tmp_path / "out" / "traces").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "niah_single_9"), "there is no task 'niah_single_9'"),
        (("--lengths", "20"), "needs a length of"),
        (("--lengths", "many"), "must be whole numbers"),
        (("--policy", "h20"), "did you mean 'h2o'"),
        (("--policy", "h2o", "--budget", "2"), "smallest legal budget is 32"),
        (("--budget", "1.5"), "must lie in"),
        (("--demo", "--grid"), "has its own samples"),
        (("--tasks", "cwe", "--grid"), "no depth"),
        (("--texts", "none.txt"), "no such file"),
        (("--chat", "maybe"), "auto, yes or no"),
        (("--chat", "yes"), "no chat template"),
        (("--model", "nowhere/at-all"), "cannot load the model"),
        (("--option", "h2o"), "METHOD.NAME=VALUE"),
        (("--samples", "0"), "count must be a whole number of 1 or more"),
        (("--dtype", "float8"), "dtype must be one of"),
        (("--chunk-size", "0"), "chunk_size must be 1 or more"),
        (("--positions", "contiguous"), "original or slot"),
    ],
)
def test_what_ruler_refuses(words, message, tmp_path):
    result = _run(*RULER, *words, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_budget_for_more_than_there_is_is_noted(tmp_path):
    result = _run(*RULER, "--budget", "5000", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "evicted nothing: its budget (5,000 tokens) holds every prompt" in result.output


# ---- longbench


def test_longbench_from_a_folder(tmp_path):
    _samples(tmp_path / "data")
    result = _run(
        "longbench",
        "--no-pictures",
        "--data",
        tmp_path / "data",
        "--policy",
        "snapkv",
        "--budget",
        "0.5",
        "--output",
        tmp_path / "out",
    )
    assert result.exit_code == 0, result.output
    summary = _summary(tmp_path / "out")
    assert summary["tasks"] == [{"name": "qasper", "metric": "qa_f1", "samples": 4}]
    assert summary["run"]["profile"] == "fixed"
    assert summary["results"][0]["survival"]["answerable"] == 4
    assert summary["results"][0]["by_length"]["0-4k"]["samples"] == 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[:4]] == [f"qasper/s{i}" for i in range(4)]


def test_the_earlier_scripts_flags_and_file(tmp_path):
    _samples(tmp_path / "data")
    common = (
        "longbench", "--no-pictures", "--data", tmp_path / "data", "--dataset", "qasper", "--num_examples", "3",
        "--sink_tokens", "8", "--recent_tokens", "24",
    )  # fmt: skip
    result = _run(*common, "--strategy", "sink_recent", "--output", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["config"]["strategy"] == "sink_recent"
    assert (data["config"]["sink_tokens"], data["config"]["num_examples"]) == (8, 3)
    assert data["summary"]["total_examples"] == 3
    assert _summary(tmp_path / "a")["overall"][1]["tokens_kept"] == 32
    more = ("--strategy", "uniform", "--middle_budget", "16", "--option", "x.y=1", "--output", tmp_path / "b.json")
    assert _run(*common, *more).exit_code == 2
    result = _run(*common, "--strategy", "uniform", "--middle_budget", "128", "--output", tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    result = _run(*common, "--strategy", "none", "--output", tmp_path / "c.json")
    assert result.exit_code == 0, result.output
    diff = _run("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert diff.exit_code == 0, diff.output
    assert "sink_recent" in diff.output
    assert "sink_recent_uniform" in _run("diff", tmp_path / "a", tmp_path / "b").output


def test_failed_samples_are_rows_and_end_in_an_error(tmp_path, monkeypatch):
    from kvsieve.tasks.longbench import LongBenchTask

    _samples(tmp_path / "data")
    score = LongBenchTask.score

    def broken(self, text, sample, profile="fixed", **more):
        if sample.id == "s2":
            raise ValueError("no verdict")
        return score(self, text, sample, profile, **more)

    monkeypatch.setattr(LongBenchTask, "score", broken)
    words = ("longbench", "--no-pictures", "--data", tmp_path / "data", "--policy", "streaming_llm")
    result = _run(*words, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "streaming_llm failed on qasper/s2: ValueError: no verdict" in result.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert sum(row["status"] == "failed" for row in rows) == 2
    assert _summary(tmp_path / "out")["overall"][0]["samples"] == 4
    assert "Failed samples" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dataset", "no_such_task"), "no_such_task"),
        (("--data", "nowhere"), "no such file or folder"),
        (("--profile", "mine"), "profile"),
        (("--dataset", ","), "no task was named"),
        (("--strategy", "h2o"), "must be one of none"),
        (("--strategy", "none", "--policy", "h2o"), "not both"),
        (("--strategy", "sink_recent", "--sink_tokens", "-1"), "0 or more"),
        (("--demo_mode", "--data", "x"), "has its own samples"),
    ],
)
def test_what_longbench_refuses(words, message, tmp_path):
    result = _run("longbench", "--output", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_named(tmp_path):
    file = _samples(tmp_path / "data")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], '{"context": ', *lines[2:]]))
    result = _run("longbench", "--data", file)
    assert result.exit_code == 2
    assert re.search(r"qasper\.jsonl, line 3", result.output)
    _samples(tmp_path / "data", context="")
    result = _run("longbench", "--data", file)
    assert result.exit_code == 2
    assert "line 1" in result.output
    assert "context" in result.output
    _samples(tmp_path / "data", answers=[])
    assert "answers" in _run("longbench", "--data", file).output


# ---- visualize, diff, report


def test_visualize_draws_what_was_held(tmp_path):
    result = _run("visualize", "--length", "400", "--budget", "144", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "sink_recent_uniform" in result.output
    assert (tmp_path / "out" / "report.html").read_text().count("<figure>") == 11
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 11
    traces = [Trace.load(file) for file in (tmp_path / "out" / "traces").glob("*/*.npz")]
    assert len(traces) == 4
    for trace in traces:
        held = trace.held(trace.about["asked"]).sum(-1)
        assert held.max() <= 144
        assert held.min() > 100
    uniform = next(trace for trace in traces if trace.about["method"] == "sink_recent_uniform")
    middle = np.flatnonzero(uniform.share(uniform.about["asked"])[16:-100])
    assert len(middle) > 10
    assert middle.min() < 150


def test_visualize_reads_a_text_of_ones_own(tmp_path):
    (tmp_path / "my.txt").write_text("The river runs. " * 40)
    words = ("visualize", "--text", tmp_path / "my.txt", "--policy", "streaming_llm", "--budget", "64")
    result = _run(*words, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert _summary(tmp_path / "out")["overall"][1]["score"] is None
    assert _run("visualize", "--text", tmp_path / "no.txt").exit_code == 2


def test_report_makes_everything_again(done, tmp_path):
    folder, _ = done
    page = (folder / "report.html").read_bytes()
    for name in ("report.html", "summary.json"):
        (folder / name).unlink()
    result = _run("report", folder, "--no-pictures")
    assert result.exit_code == 0, result.output
    assert (folder / "report.html").read_bytes() == page
    assert _run("report", tmp_path / "none").exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "run.json" in _run("report", tmp_path / "empty").output
    rows = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(rows[: rows.rindex(b"\n", 0, -1) + 1])
    result = _run("report", folder, "--no-pictures")
    (folder / "samples.jsonl").write_bytes(rows)
    assert result.exit_code == 2
    assert "1 samples of" in result.output


def test_a_report_of_a_run_with_failures_says_so(done):
    folder, _ = done
    assert "failed" not in _run("report", folder, "--no-pictures").output


def _made(scores, label="m", **more):
    one = {
        "method": label, "task": "t", "length": None, "score": 100 * sum(scores) / len(scores), "samples": len(scores),
        "interval": None, "kept_share": 0.5, "bytes_held": 2**20,
        "sample_scores": {str(i): s for i, s in enumerate(scores)},
    }  # fmt: skip
    return {
        "overall": [one | {"seconds": 1.0}],
        "results": [one],
        "run": {"model": "x", "seed": 1} | more,
        "tasks": [{"name": "t"}],
    }


def test_a_difference_by_hand():
    a, b = [1.0, 0.0, 0.0, 1.0, 0.5], [1.0, 1.0, 0.0, 0.0, 1.0]
    found = compare_runs(_made(a), _made(b, seed=2))
    (pair,) = found["pairs"]
    assert pair["delta"] == pytest.approx(10.0)
    assert (pair["won"], pair["lost"], pair["shared"]) == (2, 1, 5)
    assert pair["interval"] == list(bootstrap_interval([y - x for x, y in zip(a, b, strict=True)]))
    assert found["notes"] == ["The runs differ in seed: 1 and 2."]
    other = compare_runs(_made(a), _made(b[:3], label="n"))
    assert (other["pairs"][0]["a"], other["pairs"][0]["b"]) == ("m", "n")
    assert "in one run only" in other["notes"][0]


def test_diff_from_files(done, tmp_path):
    folder, _ = done
    result = _run("diff", folder, folder / "summary.json", "--plot", "--output", tmp_path / "d.svg")
    assert result.exit_code == 0, result.output
    assert "+0.0" in result.output
    assert "<svg" in (tmp_path / "d.svg").read_text()
    assert (tmp_path / "d.svg").stat().st_size > 5000
    (tmp_path / "x.json").write_text("{}")
    assert "holds no results" in _run("diff", folder, tmp_path / "x.json").output
    (tmp_path / "y.json").write_text(json.dumps(_made([1.0], label="other")))
    assert "nothing in common" in _run("diff", tmp_path / "y.json", folder).output
    assert load_summary(folder)["kind"] == "ruler"
    (tmp_path / "z.json").write_text(json.dumps({"overall": [], "results": [], "run": {}}))
    assert _run("diff", tmp_path / "z.json", folder).exit_code == 2
    assert _run("diff", folder, tmp_path / "none.json").exit_code == 2


def test_no_strategy_works_in_a_process_of_its_own(tmp_path):
    """Methods register when they are first asked for, which another test may have done here."""
    _samples(tmp_path / "data", count=1)
    words = ["longbench", "--no-pictures", "--data", str(tmp_path / "data"), "--strategy", "none"]
    line = [sys.executable, "-m", "kvsieve.cli", *words, "--output", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [one["method"] for one in _summary(tmp_path / "out")["overall"]] == ["full"]


def test_official_chinese_needs_jieba_and_says_so_at_once(tmp_path, monkeypatch):
    from kvsieve.tasks import longbench_items

    monkeypatch.setattr(longbench_items, "find_spec", lambda name: None)
    result = _run("longbench", "--dataset", "multifieldqa_zh", "--profile", "official", "--data", tmp_path / "none")
    assert result.exit_code == 2
    assert "need jieba" in result.output
