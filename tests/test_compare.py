"""`compare_compression_methods`: numbers, files, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module

import pytest
import torch

import kvsieve
from kvsieve import zoo
from kvsieve._compare.cells import read_rows
from kvsieve._compare.settings import DEFAULT_METHODS, Settings, resolve_methods
from kvsieve._compare.summary import summarise
from kvsieve._rowlog import jsonable, read_json
from kvsieve.compare import compare_compression_methods, merge_results
from kvsieve.errors import BudgetError, DataError, KvsieveError, PolicyError
from kvsieve.scorer import SCORERS, StaticScorer
from kvsieve.text.likelihood import encode, perplexity

OUTPUTS = ["detailed_results.json", "comparison_summary.json", "comparison.csv", "comparison.md", "comparison.png"]
TEXTS = [
    "The old house at the end of the lane had been empty for years, and nobody knew who owned it any more. " * 2,
    "A dictionary maps keys to values; a list holds values in order, and a tuple is a list that cannot change. " * 2,
    "When the rain stopped she opened the window and listened to the water that ran along the gutters below. " * 2,
]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes longer than all the rest; one test draws."""
    monkeypatch.setattr("kvsieve.compare.has_matplotlib", lambda: False)


@pytest.fixture
def compare(data, tmp_path):
    def run(**options):
        options = {"data_path": data, "output_dir": tmp_path / "out", "methods": "random,tova", "quiet": True} | options
        return compare_compression_methods(**options)

    return run


def without_times(value):
    """Results without what the clock or the user's command line says."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "files", "command")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


# ---- numbers


def test_numbers_are_those_of_perplexity(compare, tmp_path):
    result = compare(methods="baseline,random,streaming_llm", compression_ratio=0.4, n_sink=2)
    model, tokenizer = zoo.load("mini-lm")
    policy = kvsieve.get_policy("streaming_llm", compression_ratio=0.4, when="every_forward", n_sink=2)
    scores = [perplexity(model, encode(tokenizer, text), policy) for text in TEXTS]
    total = math.fsum(x for score in scores for x in score.nll.tolist())
    tokens = sum(score.tokens for score in scores)
    detail = result["detailed"]["methods"]["streaming_llm"]
    assert detail["avg_nll"] == pytest.approx(total / tokens, rel=1e-12)
    assert detail["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-12)
    assert detail["total_tokens"] == tokens
    assert detail["nll_per_sample"] == pytest.approx([score.avg_nll for score in scores], rel=1e-12)
    stats = detail["compression_stats"]
    assert stats["total_keys_original"] == sum(score.keys_seen for score in scores)
    assert stats["total_keys_kept"] == sum(score.keys_held for score in scores)
    assert stats["total_keys_discarded"] == stats["total_keys_original"] - stats["total_keys_kept"]
    assert stats["sparsity_percentage"] == pytest.approx(40, abs=2)
    assert stats["avg_compression_ratio"] == pytest.approx(sum(s.compression_ratio for s in scores) / 3)
    assert detail["bytes_held"] == sum(score.bytes_held for score in scores)
    assert detail["mode"] == "one_pass"


def test_files_and_fields(compare, tmp_path, monkeypatch):
    monkeypatch.setattr("kvsieve.compare.has_matplotlib", lambda: True)
    result = compare()
    out = tmp_path / "out"
    assert result["files"] == [str(out / name) for name in OUTPUTS]
    assert all((out / name).stat().st_size for name in OUTPUTS)
    summary, detailed = read_json(out / "comparison_summary.json"), read_json(out / "detailed_results.json")
    assert detailed == jsonable(result["detailed"])
    assert [entry["method"] for entry in summary["results"]] == ["baseline", "random", "tova"]
    assert {"method", "perplexity", "ppl_delta", "ppl_delta_pct", "compression_ratio"} <= set(summary["results"][0])
    assert summary["baseline_perplexity"] == detailed["methods"]["baseline"]["perplexity"]
    base, random = summary["results"][:2]
    assert (base["kind"], random["kind"], base["asked"], random["asked"]) == ("none", "ratio", None, 0.5)
    assert base["compression_ratio"] == 0.0
    assert base["ppl_delta"] == 0.0
    assert random["ppl_delta"] == random["perplexity"] - base["perplexity"]
    low, high = random["ppl_delta_pct_interval"]
    assert low <= random["ppl_delta_pct"] <= high
    run = detailed["run"]
    assert {"kvsieve", "torch", "transformers", "python"} == set(run["versions"])
    assert (run["seed"], run["dtype"], run["samples"], run["hardware"]["device"]) == (42, "float32", 3, "cpu")
    assert any("max_length 8192 was lowered to" in note for note in detailed["notes"])
    assert any("random included" in note for note in detailed["notes"])


def test_two_runs_agree_to_the_bit_and_seeds_matter(compare, tmp_path):
    first = compare(output_dir=tmp_path / "a")
    again = compare(output_dir=tmp_path / "b")
    other = compare(output_dir=tmp_path / "c", seed=7)
    assert without_times(first) == without_times(again)
    nll = [r["detailed"]["methods"]["random"]["nll_per_sample"] for r in (first, other)]
    assert nll[0] != nll[1]
    seeds = {row["seed"] for row in read_rows(tmp_path / "a").values()}
    assert len(seeds) == 3, "every text has its own seed, whatever the order of work"


def test_larger_chunks_are_labelled(compare):
    result = compare(chunk_size=16)
    assert {(entry["mode"], entry["chunk_size"]) for entry in result["results"]} == {("chunked", 16)}


def test_sinks_are_protected_for_every_ratio_method_alike(compare):
    with_sinks, without = compare(), compare(n_sink=0)
    assert with_sinks["results"][2]["perplexity"] != without["results"][2]["perplexity"], "tova has no sinks of its own"


def test_rates_are_measured_and_a_note_says_when_protection_decides(compare):
    result = compare(methods="snapkv", compression_ratio=0.9)
    entry = result["results"][1]
    assert entry["compression_ratio"] < 0.5, "a window of 64 tokens in a text of less than 100"
    assert any("snapkv: asked to remove 90%, removed" in note for note in result["notes"])


def test_infinite_perplexity_is_stored_as_text(compare, tmp_path):
    compare()
    plan, rows = read_json(tmp_path / "out" / "plan.json"), read_rows(tmp_path / "out")
    for row in rows.values():
        row["nll"] = "Infinity" if row["method"] == "tova" else row["nll"]
    detailed, summary = summarise(plan, rows)
    assert summary["results"][2]["perplexity"] == math.inf
    assert json.loads(json.dumps(jsonable(detailed), allow_nan=False))["methods"]["tova"]["perplexity"] == "Infinity"
    assert float(jsonable(-math.inf)) == -math.inf


# ---- kvzap


@pytest.fixture(scope="module")
def surrogate(tmp_path_factory):
    from kvsieve.surrogates import KVzapSurrogate, SurrogateShape

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("surrogate")
    made = KVzapSurrogate(SurrogateShape(256, 2, None, 4))
    made.save(folder)
    return folder


def test_threshold_method_is_labelled_and_matched(compare, surrogate):
    result = compare(methods="kvzap", kvzap_scorer_model=surrogate, threshold="match", sliding_window_size=8)
    entry = result["results"][1]
    assert (entry["method"], entry["kind"]) == ("kvzap", "threshold")
    assert entry["compression_ratio"] == pytest.approx(0.5, abs=0.05)
    assert any(f"the threshold {entry['asked']} was looked for" in note for note in result["notes"])
    fixed = compare(methods="kvzap", kvzap_scorer_model=surrogate, threshold=entry["asked"], sliding_window_size=8)
    assert fixed["results"][1]["perplexity"] == entry["perplexity"]


def test_surrogate_of_another_model_is_refused(compare, tmp_path):
    from kvsieve.surrogates import KVzapSurrogate, SurrogateShape

    KVzapSurrogate(SurrogateShape(128, 2, None, 4)).save(tmp_path / "other")
    with pytest.raises(KvsieveError, match="was made for a model with hidden size 128"):
        compare(methods="kvzap", kvzap_scorer_model=tmp_path / "other")
    with pytest.raises(DataError, match="no folder"):
        compare(methods="kvzap", kvzap_scorer_model=str(tmp_path / "none"))


def test_threshold_without_surrogate_says_how_to_get_one(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "path", lambda name: tmp_path / "empty")
    for methods in ("kvzap", None, "all"):
        with pytest.raises(PolicyError, match=r"kvsieve train-kvzap .*--kvzap-scorer-model.*--methods"):
            compare(methods=methods)


# ---- names of methods


def test_method_names():
    assert resolve_methods(None)[1:] == tuple(name for name in DEFAULT_METHODS if name != "baseline")
    assert resolve_methods(None, include_observed_attention=False)[-1] == "expected_attention"
    assert resolve_methods(["Streaming-LLM", " full ", "random", "random"]) == ("full", "streaming_llm", "random")
    assert set(resolve_methods(["all"])) == set(kvsieve.list_methods())
    assert "observed_attention" not in resolve_methods(["all"], include_observed_attention=False)
    assert "observed_attention" in resolve_methods(["observed_attention"], include_observed_attention=False)


# ---- refusals, all before anything is written


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"compression_ratio": 1.0}, BudgetError, r"must lie in \[0, 1\), not 1.0"),
        ({"compression_ratio": -0.1}, BudgetError, r"must lie in \[0, 1\)"),
        ({"compression_ratio": math.nan}, PolicyError, "finite number"),
        ({"threshold": "low"}, PolicyError, 'finite number .or "match"'),
        ({"chunk_size": 0}, PolicyError, "chunk_size must be a whole number of 1 or more, not 0"),
        ({"chunk_size": 1.5}, PolicyError, "chunk_size must be a whole number"),
        ({"max_length": 1}, PolicyError, "max_length must be a whole number of 2 or more"),
        ({"max_samples": 0}, PolicyError, "max_samples must be a whole number of 1 or more"),
        ({"n_sink": -1}, PolicyError, "n_sink must be a whole number of 0 or more"),
        ({"sliding_window_size": -1}, PolicyError, "sliding_window_size"),
        ({"n_future_positions": 0}, PolicyError, "n_future_positions"),
        ({"seed": -1}, PolicyError, "seed"),
        ({"dtype": "int8"}, PolicyError, "dtype must be one of float64, float32"),
        ({"shard": "2/2"}, PolicyError, "shard must be i/n with 0 <= i < n"),
        ({"shard": "first"}, PolicyError, "shard must be i/n"),
        ({"num_gpus": 0}, PolicyError, "num_gpus"),
        ({"device": "toaster"}, PolicyError, "device must be such as"),
        ({"methods": "snapvk"}, PolicyError, "unknown method 'snapvk'; did you mean 'snapkv'"),
        ({"methods": " , "}, PolicyError, "no method was named"),
        ({"model_name": "no/such/folder/here"}, KvsieveError, "cannot load the model"),
        ({"n_sink": 40, "compression_ratio": 0.9}, BudgetError, "protect more tokens than"),
        ({"text_field": "body"}, DataError, "no field 'body'"),
    ],
)
def test_bad_values_are_refused_and_earlier_results_kept(compare, tmp_path, options, kind, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison_summary.json").write_text("earlier")
    (out / "cells.jsonl").write_text("{}\n")
    with pytest.raises(kind, match=message):
        compare(**options)
    assert sorted(file.name for file in out.iterdir()) == ["cells.jsonl", "comparison_summary.json"]
    assert (out / "comparison_summary.json").read_text() == "earlier"


def test_gpus_that_are_not_there_are_refused(compare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PolicyError, match="num_gpus=2, but this machine has 0 usable GPUs"):
        compare(num_gpus=2)
    with pytest.raises(PolicyError, match="device 'cuda' is not there"):
        compare(device="cuda")
    with pytest.raises(PolicyError, match="leave device out"):
        compare(num_gpus=2, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ('{"text": "fine and long enough"}\n{"text"\n', "line 2: not valid JSON"),
        ('{"text": "fine and long enough"}\n{"text": ""}\n', "line 2: the text has .* tokens?; at least 2"),
    ],
)
def test_bad_data_is_refused(compare, data, tmp_path, content, message):
    data.unlink()
    if content is not None:
        data.write_text(content)
    with pytest.raises(DataError, match=message):
        compare()
    assert not (tmp_path / "out").exists()


def test_unsupported_model_is_refused(compare, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=4096, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    zoo.load("mini-lm")[1].save_pretrained(tmp_path / "mamba")
    with pytest.raises(KvsieveError, match=r"(?i)mamba"):
        compare(model_name=str(tmp_path / "mamba"))


def test_foreign_model_without_surrogate_needs_other_methods(compare, tmp_path):
    model, tokenizer = zoo.load("mini-lm")
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    with pytest.raises(PolicyError, match="leave kvzap out with --methods"):
        compare(model_name=str(tmp_path / "copy"), methods=None)
    same = compare(model_name=str(tmp_path / "copy"), dtype="float32")
    assert same["baseline_perplexity"] == compare()["baseline_perplexity"]


# ---- failures


def test_a_failed_cell_is_recorded_and_its_method_has_no_mean(compare, tmp_path, monkeypatch):
    module = sys.modules["kvsieve.text.likelihood"]
    true = module.perplexity
    calls = []

    def sometimes(model, tokens, policy, **options):
        calls.append(policy.name)
        if policy.name == "random" and calls.count("random") == 2:
            raise ValueError("an accident")
        return true(model, tokens, policy, **options)

    monkeypatch.setattr(module, "perplexity", sometimes)
    result = compare()
    base, random, tova = result["results"]
    assert [entry["status"] for entry in result["results"]] == ["ok", "failed", "ok"]
    assert random["perplexity"] is None
    assert random["errors"] == ["line 2: ValueError: an accident"]
    assert tova["perplexity"] > base["perplexity"]
    assert "random failed: line 2" in (tmp_path / "out" / "comparison.md").read_text()
    (row,) = [row for row in read_rows(tmp_path / "out").values() if row["status"] == "failed"]
    assert "Traceback" in row["traceback"]
    monkeypatch.undo()
    assert without_times(compare(resume=True)) == without_times(compare(output_dir=tmp_path / "fresh"))


def test_a_failed_baseline_leaves_no_differences(compare, monkeypatch):
    module = import_module("kvsieve.text.likelihood")
    true = module.perplexity

    def broken(model, tokens, policy, **options):
        if policy.name == "full":
            raise RuntimeError("out of memory")
        return true(model, tokens, policy, **options)

    monkeypatch.setattr(module, "perplexity", broken)
    result = compare()
    assert result["baseline_perplexity"] is None
    assert [entry["ppl_delta"] for entry in result["results"]] == [None] * 3
    assert result["results"][1]["perplexity"] > 1


def test_not_a_number_is_a_failure(compare, monkeypatch):
    from dataclasses import replace

    module = import_module("kvsieve.text.likelihood")
    true = module.perplexity
    monkeypatch.setattr(module, "perplexity", lambda *a, **k: replace(s := true(*a, **k), nll=s.nll * math.nan))
    assert "is not a number" in compare()["results"][0]["errors"][0]


def test_a_method_of_ones_own_takes_part(compare):
    from dataclasses import dataclass
    from typing import ClassVar

    known = dict(SCORERS)
    try:

        @dataclass(frozen=True)
        class Oldest(StaticScorer):
            name: ClassVar[str] = "oldest"

            def token_score(self, view):
                return -view.new_positions.float().expand(*view.new_keys.shape[:3])

        assert [r["method"] for r in compare(methods=["oldest"])["results"]] == ["baseline", "oldest"]
    finally:
        SCORERS.clear()
        SCORERS.update(known)


# ---- without a plot, and output


def test_without_matplotlib_there_is_a_note_and_no_plot(compare, capsys, tmp_path):
    result = compare(quiet=False)
    assert not (tmp_path / "out" / "comparison.png").exists()
    assert len(result["files"]) == 4
    shown = capsys.readouterr().out
    assert "matplotlib is not installed" in shown
    assert "tova" in shown


def test_merge_needs_a_plan(tmp_path):
    with pytest.raises(DataError, match="run `kvsieve compare`"):
        merge_results(str(tmp_path))
    (tmp_path / "plan.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        merge_results(str(tmp_path))
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        merge_results(str(tmp_path))


def test_command_line_of_settings():
    assert Settings().command() == "kvsieve compare"
    line = Settings(model_name="m", use_vnorm=False, methods=("a", "b"), compression_ratio=0.25).command()
    assert line == "kvsieve compare --model m --compression-ratio 0.25 --methods a,b --no-use-vnorm"
