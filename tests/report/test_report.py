"""Tables and plots from a summary, without any model."""

from __future__ import annotations

import csv
import io
import math

import pytest

from kvsieve.report.methods import methods_markdown, methods_table
from kvsieve.report.plots import quality_against_memory
from kvsieve.report.tables import ranked, terminal_table, to_csv, to_markdown


def result(method, kind="ratio", perplexity=20.0, **other):
    base = {
        "method": method, "kind": kind, "asked": None if kind == "none" else 0.5, "status": "ok",
        "perplexity": perplexity, "ppl_delta": perplexity - 10, "ppl_delta_pct": 10 * (perplexity - 10),
        "ppl_delta_interval": [1.0, 2.0], "ppl_delta_pct_interval": [-1.0, 2.0], "compression_ratio": 0.5,
        "bytes_held": 2**20, "bytes_full": 2**21, "mean_visible_keys": 100.4, "mode": "one_pass", "chunk_size": 1,
        "seconds": 1.0, "errors": [],
    }  # fmt: skip
    return base | other


def failure(method):
    return result(method, status="failed", perplexity=0.0, errors=["line 1: ValueError: no"]) | {
        "perplexity": None,
        "ppl_delta": None,
        "ppl_delta_pct": None,
        "compression_ratio": None,
    }


@pytest.fixture
def summary():
    run = {
        "command": "kvsieve compare", "model": "mini-lm", "data": "d", "samples": 3, "max_length": 9, "chunk_size": 1,
        "seed": 42, "dtype": "float32", "versions": {"kvsieve": "0"},
        "hardware": {"device": "cpu", "cpus": 2, "threads": 1, "machine": "x"},
    }  # fmt: skip
    results = [
        result("baseline", "none", 10.0, bytes_held=2**21, ppl_delta_pct_interval=None),
        failure("tova"),
        result("random", perplexity=30.0, chunk_size=8),
        result("kvzap", "threshold", 11.0),
    ]
    return {"baseline_perplexity": 10.0, "results": results, "notes": ["a note"], "run": run}


def test_ranking_is_baseline_best_to_worst_then_failed(summary):
    assert [r["method"] for r in ranked(summary)] == ["baseline", "kvzap", "random", "tova"]


def test_csv_reads_back(summary):
    rows = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert [row["method"] for row in rows] == ["baseline", "tova", "random", "kvzap"]
    assert float(rows[3]["perplexity"]) == 11.0
    assert (rows[3]["ppl_delta_pct_low"], rows[0]["ppl_delta_pct_low"], rows[1]["perplexity"]) == ("-1.0", "", "")


def test_markdown_has_rows_notes_errors_and_origin(summary):
    text = to_markdown(summary)
    assert (
        "| kvzap | threshold 0.5 | 11.000 | +1.000 | +10.0 | -1.0 to +2.0 | 50.0% | 1.00 MiB | 100 | one pass |" in text
    )
    assert "| tova | ratio 0.5 | failed |" in text
    assert "| one pass 8 |" in text, "a chunk size other than 1 stands with the number"
    for part in ("- a note", "tova failed: line 1: ValueError: no", "`kvsieve compare`", "kvsieve 0", "seed 42"):
        assert part in text


@pytest.mark.parametrize("value", [math.inf, 1e300, "Infinity"])
def test_huge_numbers_are_shown(summary, value):
    summary["results"][2] |= {"perplexity": value, "ppl_delta": value, "ppl_delta_pct": value}
    assert "random" in to_markdown(summary)
    assert quality_against_memory(summary)[:4] == b"\x89PNG"


def test_terminal_table_drops_columns_before_it_wraps(summary):
    wide, narrow = (len(terminal_table(summary, width).columns) for width in (200, 60))
    assert wide == 11
    assert 3 <= narrow < wide


def test_plot_is_a_picture_even_without_any_number(summary):
    assert quality_against_memory(summary)[:4] == b"\x89PNG"
    summary["results"] = [failure("baseline")]
    summary["baseline_perplexity"] = None
    assert quality_against_memory(summary)[:4] == b"\x89PNG"


def test_method_tables_follow_the_registry():
    from kvsieve import list_methods

    text = methods_markdown()
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == list_methods()
    assert "| `streaming_llm` | static | `n_sink=4` |" in text
    assert "| `full` | none |" in text
    assert "| `kvzap` | learned |" in text
    assert methods_table().row_count == len(list_methods())
