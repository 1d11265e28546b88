"""Prompts and samples against the published files (skipped where they are absent)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvsieve.tasks.longbench import TASKS, get_task, settings
from kvsieve.tasks.longbench_scores import score_task
from kvsieve.tasks.records import read_samples

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "long_context"
MINI = (
    "2wikimqa", "gov_report", "lcc", "multifieldqa_zh", "passage_count", "qasper", "samsum", "trec", "vcsum",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not on this machine")


def test_prompts_and_lengths_are_the_published_ones() -> None:
    config = DATA / "config"
    for ours, theirs in (
        ("prompts", "dataset2prompt.json"),
        ("max_new_tokens", "dataset2maxlen.json"),
        ("model_lengths", "model2maxlen.json"),
    ):
        assert settings()[ours] == json.loads((config / theirs).read_text(encoding="utf-8"))
    for name, text in settings()["v2_prompts"].items():
        assert text == (config / "v2_prompts" / f"{name}.txt").read_bytes().decode()


@pytest.mark.parametrize("name", ["multi_news", "passage_retrieval_zh"])
def test_official_files(name: str) -> None:
    samples = read_samples(DATA, dataset=name)
    assert len(samples) == TASKS[name].samples == 200
    assert {sample.dataset for sample in samples} == {name}
    assert all(sample.length and sample.context in TASKS[name].prompt(sample) for sample in samples)


@pytest.mark.parametrize("name", MINI)
def test_samples_with_complete_prompts(name: str) -> None:
    samples = read_samples(DATA / "minilongbench", dataset=name)
    task = get_task(name)
    assert len({sample.id for sample in samples}) == len(samples) > 3
    assert all(sample.prompt and sample.answers for sample in samples)
    assert all(bool(sample.classes) == (task.metric == "classification") for sample in samples)
    # A right answer scores full; a line of code may end in blanks, which do not count.
    right = score_task(task, samples, [sample.answers[0] for sample in samples])
    assert right.score == pytest.approx(100)
    assert score_task(task, samples, ["@"] * len(samples)).score < 5


def test_relatives() -> None:
    ruler = read_samples(DATA / "niah_multikey_3.jsonl.gz", limit=3)
    assert all(sample.answers[0] in (sample.prompt or "") for sample in ruler)
    lines = read_samples(DATA / "200_lines.jsonl.gz", limit=3)
    assert all(f"<{sample.answers[0]}>" in (sample.prompt or "") for sample in lines)


def test_official_scores_of_right_answers() -> None:
    samples = read_samples(DATA, dataset="passage_retrieval_zh")
    answers = [sample.answers[0] for sample in samples]
    assert score_task(TASKS["passage_retrieval_zh"], samples, answers, profile="official").score == 100.0
    news = read_samples(DATA, dataset="multi_news", limit=5)
    score = score_task(TASKS["multi_news"], news, [sample.answers[0] for sample in news], profile="official")
    assert score.score == 100.0
