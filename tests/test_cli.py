"""The command line: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import kvsieve
from kvsieve.cli import DEMO, app

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("kvsieve.compare.has_matplotlib", lambda: False)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in ("One two three. " * 9, "Four five. " * 9)))
    return file


@pytest.fixture
def asked(monkeypatch):
    """What reaches `compare_compression_methods`, which does nothing."""
    seen = {}

    def record(**options):
        seen.update(options)
        return {"results": []}

    monkeypatch.setattr("kvsieve.compare.compare_compression_methods", record)
    return seen


def test_version_and_help_need_no_torch():
    script = (
        "import sys; from kvsieve.cli import app\n"
        "for words in (['--version'], ['compare', '--help']):\n"
        "    try: app(words)\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"kvsieve {kvsieve.__version__}\n")


def test_compare_has_the_flags_users_know():
    text = invoke("compare", "--help").output
    for flag in (
        "--model", "--data", "--methods", "--compression-ratio", "--threshold", "--sliding-window-size", "--n-sink",
        "--n-future-positions", "--use-covariance", "--no-use-covariance", "--use-vnorm", "--no-use-vnorm",
        "--kvzap-scorer-model", "--max-length", "--max-samples", "--chunk-size", "--seed", "--device", "--dtype",
        "--output-dir", "--include-observed-attention", "--num-gpus", "--shard", "--resume", "--text-field", "--demo",
        "--merge", "--debug",
    ):  # fmt: skip
        assert flag in text


def test_defaults_and_spelling_with_underscores(asked):
    from inspect import signature

    from kvsieve.compare import Settings

    assert invoke("compare").exit_code == 0
    assert Settings(**asked) == Settings()
    assert invoke("compare", "--max_length", 99, "--no-use_vnorm", "--threshold", "match").exit_code == 0
    assert (asked["max_length"], asked["use_vnorm"], asked["threshold"]) == (99, False, "match")
    assert set(asked) <= set(signature(Settings).parameters)


def test_demo_is_a_preset_that_typed_flags_override(asked):
    assert invoke("compare", "--demo", "--max-length", 100).exit_code == 0
    assert (asked["max_length"], asked["methods"], asked["threshold"]) == (100, DEMO["methods"], DEMO["threshold"])
    names = DEMO["methods"].split(",")
    assert len(set(names)) >= 8
    assert set(names) - {"baseline"} <= set(kvsieve.list_methods())


def test_compare_runs_and_writes(data, tmp_path):
    out = tmp_path / "out"
    arguments = ("compare", "--data", data, "--methods", "random", "--output-dir", out)
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "baseline" in done.output
    assert "How to read it" in done.output
    assert "max_length 8192 was lowered to" in done.output
    assert (out / "comparison.md").is_file()
    again = invoke(*arguments, "--resume")
    assert "4 of 4 cells were finished before" in again.output
    merged = invoke("compare", "--merge", "--output-dir", out)
    assert merged.exit_code == 0
    assert "random" in merged.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compression-ratio", "1"], "must lie in [0, 1)"),
        (["--methods", "snapvk"], "did you mean 'snapkv'?"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--text-field", "text"], "no field 'text'"),
        (["--shard", "3/2"], "shard must be i/n"),
        (["--chunk-size", "0"], "chunk_size must be a whole number of 1 or more"),
    ],
)
def test_refusals_are_one_line_on_stderr_with_exit_code_2(data, tmp_path, flags, message):
    out = tmp_path / "out"
    done = invoke("compare", "--data", data, "--methods", "random", "--output-dir", out, *flags)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_debug_lets_the_error_through(tmp_path):
    done = invoke("compare", "--compression-ratio", "2", "--debug")
    assert isinstance(done.exception, kvsieve.BudgetError)


def test_unknown_flags_are_named():
    done = invoke("compare", "--max-lenght", "9")
    assert done.exit_code == 2
    assert "--max-length" in done.stderr


def test_a_failed_cell_makes_the_exit_code_1(data, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("an accident")

    monkeypatch.setattr("kvsieve.text.likelihood.perplexity", broken)
    done = invoke("compare", "--data", data, "--methods", "random", "--output-dir", tmp_path / "out")
    assert done.exit_code == 1
    assert "an accident" in done.output
    assert "failed" in done.output


def test_interruption_says_how_to_go_on(monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvsieve.compare.compare_compression_methods", interrupted)
    done = invoke("compare")
    assert done.exit_code == 130
    assert "--resume" in done.stderr


def test_methods_table_and_markdown():
    table, markdown = invoke("methods"), invoke("methods", "--markdown")
    assert (table.exit_code, markdown.exit_code) == (0, 0)
    for name in kvsieve.list_methods():
        assert name in table.output
        assert f"| `{name}` |" in markdown.output


def test_train_kvzap_makes_a_surrogate_that_compare_takes(data, tmp_path):
    data.write_text("".join(json.dumps({"text": f"{word} and some more of it. " * 12}) + "\n" for word in "abcd"))
    folder = tmp_path / "surrogate"
    done = invoke(
        "train-kvzap", "--data", data, "--output-dir", folder, "--kind", "linear", "--window-tokens", 40,
        "--tokens-per-text", 20, "--max-texts", 8,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"--kvzap-scorer-model {folder}" in done.output
    compared = invoke(
        "compare", "--data", data, "--methods", "kvzap", "--kvzap-scorer-model", folder, "--threshold", "match",
        "--sliding-window-size", 8, "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert compared.exit_code == 0, compared.output
    assert "threshold" in compared.output
    assert invoke("train-kvzap", "--kind", "cubic", "--output-dir", folder, "--data", data).exit_code == 2


def test_main_is_the_entry_point(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kvsieve.cli", "compare", "--compression-ratio", "7"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: compression_ratio is the share removed and must lie in [0, 1), not 7.0\n"
