"""LongBench v2: prompts, finding the answer, accuracy."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvsieve.errors import DataError, KvsieveError, PolicyError
from kvsieve.tasks.longbench_v2 import (
    HUB,
    MODES,
    ChoiceQuestion,
    choice_prompt,
    extract_answer,
    load_questions,
    parse_question,
    read_questions,
    score_questions,
)

ROW: dict[str, Any] = {
    "_id": "q1", "domain": "Law", "sub_domain": "Contracts", "difficulty": "easy", "length": "short",
    "question": " Who? ", "choice_A": "Ann", "choice_B": "Ben ", "choice_C": "Cem", "choice_D": "Dan", "answer": "B",
    "context": " Ben did it. ",
}  # fmt: skip


def question(name: str = "q1", **changes: Any) -> ChoiceQuestion:
    return parse_question({**ROW, "_id": name, **changes})


def test_fields() -> None:
    one = question()
    assert (one.id, one.answer, one.difficulty, one.length, one.domain) == ("q1", "B", "easy", "short", "Law")
    assert one.choices == ("Ann", "Ben ", "Cem", "Dan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "E"}, "q: answer is 'E'; it must be one of A, B, C, D"),
        ({"context": " "}, "q: context is blank"),
        ({"choice_C": None}, "q: choice_C is missing"),
        ({"difficulty": "mid"}, "q: difficulty is 'mid'"),
        ({"length": 3}, "q: length must be a text, not int"),
    ],
)
def test_what_is_wrong_with_a_question(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_question({**ROW, **changes}, where="q")


@pytest.mark.parametrize("profile", ["official", "fixed"])
def test_prompts(profile: str) -> None:
    choices = "What is the correct answer to this question: Who?\nChoices:\n(A) Ann\n(B) Ben\n(C) Cem\n(D) Dan\n\n"
    text = choice_prompt(question(), profile=profile)
    assert f"<text>\nBen did it.\n</text>\n\n{choices}" in text
    assert text.endswith('"The correct answer is (insert answer here)".')
    assert choice_prompt(question(), "0shot_cot", profile=profile).endswith("think step by step:")
    assert "Ben did it." not in choice_prompt(question(), "0shot_no_context", profile=profile)
    after = choice_prompt(question(), "0shot_cot_ans", reasoning="So $Q$.", profile=profile)
    assert "The text is too long and omitted here." in after
    assert "step by step: So $Q$.\n" in after


def test_fields_inside_the_text() -> None:
    one = question(context="$C_A$ costs $Q$")
    assert "\nAnn costs Who?\n" in choice_prompt(one, profile="official")
    assert "\n$C_A$ costs $Q$\n" in choice_prompt(one)


def test_modes() -> None:
    assert set(MODES.values()) == {128, 1024}
    with pytest.raises(PolicyError, match="mode must be one of 0shot, 0shot_cot, "):
        choice_prompt(question(), "5shot")
    for mode, reasoning in (("0shot", "x"), ("0shot_cot_ans", None)):
        with pytest.raises(PolicyError, match="reasoning belongs to mode 0shot_cot_ans"):
            choice_prompt(question(), mode, reasoning=reasoning)


@pytest.mark.parametrize(
    ("text", "official", "fixed"),
    [
        ("The correct answer is (B).", "B", "B"),
        ("**The correct answer is (B)**", "B", "B"),
        ("The correct answer is B", "B", "B"),
        # Brackets are looked for first, wherever they stand.
        ("The correct answer is A? The correct answer is (B)", "B", "B"),
        # As published, any capital from A to D that follows.
        ("The correct answer is Ann", "A", "A"),
        ("the correct answer is (B)", None, "B"),
        ("Answer: B", None, "B"),
        ('The answer is "B".', None, "B"),
        ("The answer is a matter of taste", None, None),
        ("The answer is Ann", None, None),
        ("(B) Ben", None, "B"),
        ("B. Ben", None, "B"),
        ("B", None, "B"),
        ("Ben", None, None),
        ("I would say (B), yes (B)", None, "B"),
        ("(A) is wrong and (B) may be right", None, "A"),
        ("Neither (A) nor (B)", None, None),
        ("", None, None),
    ],
)
def test_finding_the_answer(text: str, official: str | None, fixed: str | None) -> None:
    assert extract_answer(text, profile="official") == official
    assert extract_answer(text) == fixed


def test_accuracy() -> None:
    questions = [
        question("q1"),
        question("q2", difficulty="hard", length="medium"),
        question("q3", difficulty="hard", length="long"),
        question("q4", difficulty="hard", length="long"),
        question("q5", difficulty="hard", length="medium"),
        question("q6", length="medium"),
    ]
    texts = ["The correct answer is (B)", "The correct answer is (A)", "no idea", None, "", "The correct answer is B"]
    score = score_questions(questions, texts)
    # 2 of 6; easy 2 of 2; hard 0 of 4; medium q6 of q2, q5, q6.
    assert score.accuracy == pytest.approx(100 / 3)
    assert score.groups == {
        "easy": (100.0, 2), "hard": (0.0, 4),
        "short": (100.0, 1), "medium": (pytest.approx(100 / 3), 3), "long": (0.0, 2),
    }  # fmt: skip
    assert (score.questions, score.failed, score.unanswered) == (6, 2, 1)
    assert score.answers == {"q1": "B", "q2": "A", "q3": None, "q4": None, "q5": None, "q6": "B"}
    # As published without q4 and q5: 2 of 4; hard q2 and q3; medium q2 and q6.
    official = score_questions(questions, texts, profile="official")
    assert (official.accuracy, official.questions) == (50.0, 4)
    assert official.groups["medium"] == (50.0, 2)
    # q3 counts a quarter: 2.25 of 4 and of 6.
    assert score_questions(questions, texts, profile="official", compensated=True).accuracy == 56.2
    assert score_questions(questions, texts, compensated=True).accuracy == pytest.approx(37.5)


def test_what_is_wrong_with_the_texts() -> None:
    with pytest.raises(DataError, match="1 questions, but 2 texts; give one per question"):
        score_questions([question()], ["", ""])
    with pytest.raises(DataError, match="the question q1 occurs twice"):
        score_questions([question(), question()], ["", ""])
    with pytest.raises(DataError, match="no question to score"):
        score_questions([], [])
    with pytest.raises(DataError, match="no question to score"):
        score_questions([question()], [None], profile="official")
    with pytest.raises(PolicyError, match="profile must be one of"):
        score_questions([question()], [""], profile="new")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "v2.jsonl"
    file.write_text("".join(json.dumps({**ROW, "_id": f"q{i}"}) + "\n" for i in (1, 2, 1)))
    assert [one.id for one in read_questions(file, limit=2)] == ["q1", "q2"]
    assert [one.id for one in load_questions(file, limit=1)] == ["q1"]
    with pytest.raises(DataError, match=r"line 3: the question q1 is there already \(.*, line 1\)"):
        read_questions(file)
    with pytest.raises(DataError, match="limit must be 1 or more"):
        read_questions(file, limit=0)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(hub: str, name: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((hub, name, split))
        return [ROW]

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load_questions()[0].where == f"{HUB}, row 0"
    assert asked == [(HUB, None, "train")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KvsieveError, match=r"pip install 'kvsieve\[data\]'"):
        load_questions()
