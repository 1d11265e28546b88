"""The tasks of LongBench: what is asked, which part of an answer counts, and the score of a task."""

from __future__ import annotations

from typing import Any

import pytest

from kvsieve.errors import DataError, PolicyError
from kvsieve.tasks.longbench import (
    EXTENDED_TASKS,
    TASKS,
    clean_response,
    get_task,
    list_tasks,
    model_length,
    settings,
)
from kvsieve.tasks.longbench_scores import bootstrap_interval, length_bucket, mean_of_tasks, score_task
from kvsieve.tasks.metrics import METRICS
from kvsieve.tasks.metrics_text import PROFILES
from kvsieve.tasks.records import Sample

FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}


def sample(name: str = "s1", **fields: Any) -> Sample:
    values: dict[str, Any] = {"id": name, "dataset": "d", "context": "C", "input": "Q", "answers": ("red",)}
    return Sample(**{**values, **fields})


def test_the_table() -> None:
    assert len(TASKS) == 21
    assert set(TASKS) == set(settings()["prompts"]) == set(settings()["max_new_tokens"])
    assert {task.metric for task in TASKS.values()} == set(METRICS)
    assert {name for name, task in TASKS.items() if task.one_line} == FIRST_LINE
    assert {name for name, task in TASKS.items() if not task.chat} == FIRST_LINE | {"lcc", "repobench-p"}
    assert sum(task.samples for task in TASKS.values()) == 21 * 200 - 50 + 2 * 300
    assert sum(task.language == "zh" for task in TASKS.values()) == 5
    assert TASKS["gov_report"].max_new_tokens == 512
    assert TASKS["hotpotqa"].max_new_tokens == 32


def test_names() -> None:
    assert len(list_tasks()) == 21 + 13
    for name in list_tasks():
        assert get_task(name).name == name
    assert get_task("lcc_e").template() == TASKS["lcc"].template()
    assert get_task("trec_e").one_line
    assert not get_task("trec_e").chat
    assert set(EXTENDED_TASKS) < set(TASKS)
    for name in ("nq", "musique_e", "lcc_e_e", ""):
        with pytest.raises(PolicyError, match=f"there is no LongBench task {name!r}; it must be one of narrativeqa, "):
            get_task(name)


def test_source_and_licence_stand_beside_the_prompts() -> None:
    licence = "\n".join(settings()["licence"])
    assert "MIT License" in licence
    assert "THU-KEG" in licence
    assert "permission notice shall be included" in licence


def test_prompts_as_published() -> None:
    assert TASKS["narrativeqa"].template("official").count("asconcisely") == 2
    assert TASKS["lcc"].prompt(sample(), "official") == "Please complete the code given below. \nCNext line of code:\n"
    assert TASKS["repobench-p"].prompt(sample(), "official").endswith("\nCQNext line of code:\n")
    assert TASKS["passage_count"].prompt(sample(), "official").endswith("The final answer is: ")
    # Braces in the text are not fields.
    assert TASKS["trec"].prompt(sample(context="{input}{x}"), "official").endswith("\n\n{input}{x}\nQ")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_prompts_of_the_fixed_profile(name: str) -> None:
    published, fixed = (TASKS[name].template(profile) for profile in ("official", "fixed"))
    prompt = TASKS[name].prompt(sample(context="{input}\n", input="x "))
    assert " \n" not in fixed
    assert "asconcisely" not in fixed
    assert not prompt.endswith(" ")
    assert "{input}" in prompt
    # White space aside, only the typing error is gone.
    assert published.replace("asconcisely", "as concisely").split() == fixed.split()


def test_a_complete_prompt_is_kept() -> None:
    given = sample(context="", prompt="Summary: ")
    assert TASKS["samsum"].prompt(given, "official") == "Summary: "
    assert TASKS["samsum"].prompt(given) == "Summary:"


@pytest.mark.parametrize(
    ("text", "official", "fixed"),
    [
        ("\n\nAnn\nBen", "Ann", "Ann"),
        (" \nAnn\nBen", " ", "Ann"),
        ("Ann\r\nBen", "Ann\r", "Ann"),
        ("  Ann ", "  Ann ", "Ann"),
        ("", "", ""),
        ("\n", "", ""),
    ],
)
def test_one_line_counts(text: str, official: str, fixed: str) -> None:
    for name in FIRST_LINE:
        assert TASKS[name].answer(text, "official") == official
        assert TASKS[name].answer(text) == fixed
    assert TASKS["qasper"].answer(text) == TASKS["lcc"].answer(text, "official") == text


def test_where_generation_ends() -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert (text, add_special_tokens) == ("\n", False)
            return [29871, 13]

    assert TASKS["samsum"].stop_token_ids(Tokenizer(), "official") == (13,)
    assert get_task("samsum_e").stop_token_ids(Tokenizer(), "official") == (13,)
    assert TASKS["samsum"].stop_token_ids(Tokenizer()) == TASKS["trec"].stop_token_ids(Tokenizer(), "official") == ()
    for name, task in TASKS.items():
        assert task.finished("\nAnn\nB") == task.finished("Ann\r\n") == (name in FIRST_LINE)
        assert not task.finished("\n\n")
        assert not task.finished("Ann")
        assert not task.finished("Ann\n", "official")


def test_answers_of_some_models_are_cleaned() -> None:
    assert clean_response(" Assistant: yes ", "xgen-7b-8k") == " yes"
    assert clean_response("yes<eoa>no", "internlm-7b-8k") == "yes"
    assert clean_response(" Assistant: yes<eoa>", "llama2-7b-chat-4k") == " Assistant: yes<eoa>"
    assert model_length("llama2-7b-chat-4k") == 3500
    assert model_length("other") is None


def test_score_of_a_sample() -> None:
    named = sample(answers=("Sport",), classes=("Sport", "Music"))
    assert (
        TASKS["trec"].score("\nSport\nMusic", named) == TASKS["trec"].score("\nSport\nMusic", named, "official") == 1.0
    )
    assert TASKS["hotpotqa"].score("blue or red", sample(answers=("red", "blue or red"))) == 1.0
    # 1 of 3 words right: 2 * 1 / (3 + 1).
    assert TASKS["hotpotqa"].score("blue or red", sample()) == pytest.approx(0.5)


def test_score_of_a_task() -> None:
    samples = [sample(f"s{i}", length=length) for i, length in enumerate((3999, 4000, 7999, 8000))]
    # 1, 2/3, 0 and a failure, which counts as 0: (5/3) / 4 = 41.666...
    texts = ["red", "red car", "blue", None]
    score = score_task(TASKS["qasper"], samples, texts)
    assert score.score == pytest.approx(500 / 12)
    assert (score.task, score.metric, score.profile, score.samples, score.failed) == ("qasper", "qa_f1", "fixed", 4, 1)
    assert score.sample_scores == pytest.approx({"s0": 1, "s1": 2 / 3, "s2": 0, "s3": 0})
    # One sample below 4000, two from there to 8000 with 1/3 on average, one above.
    assert score.by_length == {"0-4k": (100.0, 1), "4-8k": (pytest.approx(100 / 3), 2), "8k+": (0.0, 1)}
    assert score.interval is not None
    assert score.interval[0] < score.score < score.interval[1]
    official = score_task(TASKS["qasper"], samples, texts, profile="official")
    assert official.score == 41.67
    assert official.by_length["4-8k"] == (33.33, 2)
    assert score_task(TASKS["qasper"], samples[:1], texts[:1]).by_length["8k+"] == (None, 0)
    assert score_task(TASKS["qasper"], [sample()], ["red"]).by_length == {}


def test_score_of_a_task_says_what_it_depends_on() -> None:
    code = score_task(TASKS["lcc"], [sample()], ["red"], profile="official")
    assert code.notes == {"backend": "difflib"}
    assert score_task(TASKS["lcc"], [sample()], ["red"]).notes == {"backend": "subsequence"}
    assert score_task(TASKS["dureader"], [sample()], ["red"]).notes == {"segment": "characters"}
    retrieval = score_task(TASKS["passage_retrieval_zh"], [sample(answers=("\u6bb5\u843d3",))], ["3"])
    assert (retrieval.notes, retrieval.score) == ({}, 100.0)


def test_what_is_wrong_with_the_texts_of_a_task() -> None:
    with pytest.raises(DataError, match="qasper: 1 samples, but 0 texts; give one per sample"):
        score_task(TASKS["qasper"], [sample()], [])
    with pytest.raises(DataError, match="qasper: the sample s1 occurs twice"):
        score_task(TASKS["qasper"], [sample(), sample()], ["", ""])
    with pytest.raises(DataError, match="no score"):
        score_task(TASKS["qasper"], [], [])
    with pytest.raises(DataError, match="f, line 3: classification needs the names of all classes"):
        score_task(TASKS["trec"], [sample(where="f, line 3")], ["red"])
    with pytest.raises(PolicyError, match="profile must be one of"):
        score_task(TASKS["qasper"], [sample()], ["red"], profile="new")


def test_mean_of_tasks() -> None:
    right = score_task(TASKS["qasper"], [sample()], ["red"])
    wrong = score_task(TASKS["hotpotqa"], [sample("s1"), sample("s2")], ["blue", "blue"])
    assert mean_of_tasks([right, wrong]) == 50.0
    for scores in ([right, right], [right, score_task(TASKS["lcc"], [sample()], ["red"], profile="official")]):
        with pytest.raises(DataError, match="different tasks scored with one profile"):
            mean_of_tasks(scores)


def test_intervals() -> None:
    assert bootstrap_interval([1.0, 0.0]) is None
    assert bootstrap_interval([0.5] * 5) == pytest.approx((50.0, 50.0))
    scores = [float(i % 4 == 0) for i in range(200)]
    low, high = bootstrap_interval(scores) or (0.0, 0.0)
    # The standard error of a share of 1/4 over 200 is 3.06 points.
    assert low == pytest.approx(25 - 1.96 * 3.06, abs=1)
    assert high == pytest.approx(25 + 1.96 * 3.06, abs=1)
    assert bootstrap_interval(scores) == (low, high)
    with pytest.raises(PolicyError, match="confidence must be between 0 and 1"):
        bootstrap_interval(scores, confidence=1)
    with pytest.raises(PolicyError, match="resamples must be 1 or more"):
        bootstrap_interval(scores, resamples=0)


def test_buckets() -> None:
    lengths = (0, 3999, 4000, 7999, 8000)
    assert [length_bucket(length) for length in lengths] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+"]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"multifieldqa_zh", "dureader", "vcsum"}))
def test_the_right_answer_scores_full(name: str, profile: str) -> None:
    answer = {"passage_count": "7", "passage_retrieval_en": "Paragraph 7", "passage_retrieval_zh": "\u6bb5\u843d7"}
    given = sample(answers=(answer.get(name, "red car"),), classes=("red car", "blue"))
    assert TASKS[name].score(given.answers[0], given, profile) == pytest.approx(1, abs=1e-8)
    assert TASKS[name].score("", given, profile) == 0.0
