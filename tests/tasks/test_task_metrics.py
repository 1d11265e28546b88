"""Metrics of short answers, classes, numbers, paragraphs and code, in both profiles, against arithmetic by hand."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsieve.errors import DataError, KvsieveError, PolicyError
from kvsieve.tasks import metrics, metrics_text
from kvsieve.tasks.metrics import (
    average,
    best_score,
    classification,
    code_similarity,
    count,
    qa_f1,
    qa_f1_zh,
    retrieval,
    retrieval_zh,
)
from kvsieve.tasks.metrics_text import official_words, official_words_zh, segment_zh, sentences, words

EXACT = 1e-12


@pytest.fixture
def jieba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in that cuts into pairs of characters, white space included, as the real one may."""
    library = types.ModuleType("jieba")
    library.cut = lambda text, cut_all: (text[i : i + 2] for i in range(0, len(text), 2))  # type: ignore[attr-defined]
    library.setLogLevel = lambda level: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jieba", library)
    metrics_text._jieba.cache_clear()
    yield
    metrics_text._jieba.cache_clear()


@pytest.fixture
def no_jieba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "jieba", None)
    metrics_text._jieba.cache_clear()
    yield
    metrics_text._jieba.cache_clear()


def test_words_as_published() -> None:
    assert official_words("The U.S.A.-based firm, 3.5!") == ["usabased", "firm", "35"]
    assert official_words("\u201cyes\u201d") == ["\u201cyes\u201d"]
    # Punctuation goes first, so "a-the" has become one word when articles are looked for.
    assert official_words("A-the an them the\nend") == ["athe", "them", "end"]
    assert official_words("a an the . ,") == []


def test_words_of_the_fixed_profile() -> None:
    text = "The U.S.A.-based firm's 1,000 \u201cyes\u201d votes (3.5%) on 2nd/3rd x_y"
    assert words(text) == [
        "the", "usa", "based", "firms", "1000", "yes", "votes", "3.5", "on", "2nd", "3rd", "x", "y",
    ]  # fmt: skip
    assert words("A man, the plan", articles=False) == ["man", "plan"]
    assert words("\uff21\uff22 Stra\u00dfe") == ["ab", "strasse"]
    assert words("...") == []


def test_sentences() -> None:
    assert sentences("It is 3.5. Is it? Yes!\nNo... \u597d\u3002\u5427") == [
        "It is 3.5", " Is it", " Yes", "No", " \u597d", "\u5427",
    ]  # fmt: skip


def test_chinese_in_characters() -> None:
    text = "2012\u5e74\uff0cGDP\u589e\u957f25.89%\u3002"
    assert segment_zh(text, "characters") == [
        "2012", "\u5e74", "\uff0c", "GDP", "\u589e", "\u957f", "25.89", "%", "\u3002",
    ]  # fmt: skip
    with pytest.raises(PolicyError, match="segment must be one of characters, jieba, not 'words'"):
        segment_zh(text, "words")


@pytest.mark.parametrize(
    ("said", "wanted", "official", "fixed"),
    [
        # Same words up to articles, capitals and punctuation.
        ("The Eiffel Tower.", "eiffel tower", 1.0, 1.0),
        # P = 2/5 ("It is in Paris France"), R = 2/2: 2 * 2 / (5 + 2).
        ("It is in Paris, France", "Paris, France", 4 / 7, 4 / 7),
        # One of two "red" is in common: P = 1/2, R = 1/1, F = 2 * 1 / (2 + 1).
        ("red red", "red", 2 / 3, 2 / 3),
        ("blue", "red", 0.0, 0.0),
        # Official: "usabased" against "usa", "based".
        ("U.S.A.-based", "USA based", 0.0, 1.0),
        # Official: the quotes are part of the word.
        ("\u201cyes\u201d", "yes", 0.0, 1.0),
        # Official: both are "35".
        ("3.5", "35", 1.0, 0.0),
        # Official: an article is nothing. Fixed: P = 1/4, R = 1, F = 2 / 5.
        ("the answer is A", "A", 0.0, 2 / 5),
        ("A", "A", 0.0, 1.0),
        ("", "", 0.0, 1.0),
        ("!", "!", 0.0, 1.0),
        ("!", "?", 0.0, 0.0),
        ("", "red", 0.0, 0.0),
        ("1,000", "1000", 1.0, 1.0),
    ],
)
def test_f1_of_short_answers(said: str, wanted: str, official: float, fixed: float) -> None:
    assert qa_f1(said, wanted, profile="official") == pytest.approx(official, abs=EXACT)
    assert qa_f1(said, wanted) == pytest.approx(fixed, abs=EXACT)


def test_f1_of_short_answers_in_chinese() -> None:
    # 5 characters against 4, 4 of them in common: 2 * 4 / (5 + 4).
    assert qa_f1_zh("\u5728\u5317\u4eac\u5e02\u533a\u3002", "\u5317\u4eac\u5e02\u533a") == pytest.approx(
        8 / 9, abs=EXACT
    )
    # A number is one word: 1 of 2 ("%" is none) in common with 1.
    assert qa_f1_zh("\u7ea625.89%", "25.89") == pytest.approx(2 / 3, abs=EXACT)
    assert qa_f1_zh("25.8", "25.89") == 0.0
    assert qa_f1_zh("\u3002", "\u3002") == 1.0
    assert qa_f1_zh("\u3002", "\u597d") == 0.0


def test_f1_in_chinese_as_published(jieba: None) -> None:
    # Pairs: "ab", "c,", "d " become "ab", "c", "d"; the reference "ab", "c" has two of three in common: 2 * 2 / 5.
    assert official_words_zh("abc,d ", "jieba") == ["ab", "c", "d"]
    assert qa_f1_zh("abc,d ", "ABc", profile="official") == pytest.approx(4 / 5, abs=EXACT)
    # The closing mark is on the published list, the opening one is not.
    assert official_words_zh("\u300a\u4e66\u300b\uff0c", "jieba") == ["\u300a\u4e66"]
    assert qa_f1_zh("\u300b", "\u300b", profile="official") == 0.0
    by_character = qa_f1_zh("\u4e66\u540d", "\u4e66", profile="official", segment="characters")
    assert by_character == pytest.approx(2 / 3, abs=EXACT)


def test_published_chinese_needs_jieba(no_jieba: None) -> None:
    with pytest.raises(KvsieveError, match="pip install jieba, or take segment='characters'"):
        qa_f1_zh("a", "a", profile="official")
    assert qa_f1_zh("a", "a") == 1.0


CLASSES = ("A", "AB", "ABC", "ABCD")


@pytest.mark.parametrize(
    ("said", "wanted", "classes", "official", "fixed"),
    [
        # Found: all four. The walk removes A, skips AB, removes ABC: AB and ABCD are left, 1 / 2.
        ("ABCD", "ABCD", CLASSES, 0.5, 1.0),
        # A, AB, ABC: A is removed, AB skipped: AB and ABC are left.
        ("ABC", "ABC", CLASSES, 0.5, 1.0),
        ("AB", "AB", CLASSES, 1.0, 1.0),
        # Right and one wrong: 1 / 2.
        ("Sport or Politics", "Sport", ("Sport", "Politics", "Music"), 0.5, 0.5),
        ("Politics", "Sport", ("Sport", "Politics"), 0.0, 0.0),
        ("sport", "Sport", ("Sport", "Politics"), 0.0, 1.0),
        # A wrong longer name that holds the right one: official finds both, fixed only the longer.
        ("Other location", "location", ("location", "Other location"), 0.5, 0.0),
        # A name of TREC that ends in the middle of a word.
        ("Definition of something", "Definition of somethin", ("Definition of somethin", "Reason"), 1.0, 1.0),
        # The right name is not among the classes.
        ("Music", "Music", ("Sport",), 0.0, 1.0),
        ("", "Sport", ("Sport",), 0.0, 0.0),
        # The shorter name also stands on its own: two classes are named.
        ("Reason; Other Reason", "Reason", ("Reason", "Other Reason"), 0.5, 0.5),
    ],
)
def test_classification(said: str, wanted: str, classes: tuple[str, ...], official: float, fixed: float) -> None:
    assert classification(said, wanted, classes=classes, profile="official") == official
    assert classification(said, wanted, classes=classes) == fixed


def test_classification_needs_classes() -> None:
    with pytest.raises(DataError, match=r"needs the names of all classes \(all_classes\) for the answer 'Sport'"):
        classification("Sport", "Sport", classes=())


@pytest.mark.parametrize(
    ("said", "wanted", "official", "fixed"),
    [
        ("7", "7", 1.0, 1.0),
        ("There are 7 paragraphs", "7", 1.0, 1.0),
        # Official: 7 and 0.
        ("7.0", "7", 0.5, 1.0),
        ("7 or 8", "7", 0.5, 0.5),
        ("07", "7", 0.0, 1.0),
        # Official: 1 and 000.
        ("1,000", "1000", 0.0, 1.0),
        ("seven", "7", 0.0, 0.0),
        ("1, 2, 7", "7", 1 / 3, 1 / 3),
    ],
)
def test_count(said: str, wanted: str, official: float, fixed: float) -> None:
    assert count(said, wanted, profile="official") == official
    assert count(said, wanted) == fixed


def test_count_needs_a_number() -> None:
    with pytest.raises(DataError, match="needs a number in digits as reference, not 'seven'"):
        count("7", "seven")


@pytest.mark.parametrize(
    ("said", "wanted", "official", "fixed"),
    [
        ("Paragraph 30", "Paragraph 30", 1.0, 1.0),
        # Official: 30 and 19.
        ("Paragraph 30: 19 lines", "Paragraph 30", 0.5, 1.0),
        ("Paragraph 30 or Paragraph 12", "Paragraph 30", 0.5, 0.5),
        # Three ids, one right.
        ("Paragraphs 3, 12 and 30", "Paragraph 30", 1 / 3, 1 / 3),
        ("30", "Paragraph 30", 1.0, 1.0),
        ("paragraph #30, not 4", "Paragraph 30", 0.5, 1.0),
        ("none", "Paragraph 30", 0.0, 0.0),
        ("Paragraph 3", "Paragraph 30", 0.0, 0.0),
    ],
)
def test_retrieval(said: str, wanted: str, official: float, fixed: float) -> None:
    assert retrieval(said, wanted, profile="official") == official
    assert retrieval(said, wanted) == fixed


@pytest.mark.parametrize(
    ("said", "official", "fixed"),
    [
        ("\u6bb5\u843d12", 1.0, 1.0),
        ("\u6bb5\u843d 12\uff0c\u51713\u884c", 0.5, 1.0),
        ("\u7b2c12\u6bb5\uff0c2023\u5e74", 0.5, 1.0),
        ("\u6bb5\u843d\uff11\uff12", 0.0, 1.0),
        ("\u6bb5\u843d3\u6216\u6bb5\u843d12", 0.5, 0.5),
    ],
)
def test_retrieval_in_chinese(said: str, official: float, fixed: float) -> None:
    assert retrieval_zh(said, "\u6bb5\u843d12", profile="official") == official
    assert retrieval_zh(said, "\u6bb5\u843d12") == fixed


def test_retrieval_needs_an_id() -> None:
    for profile in metrics_text.PROFILES:
        with pytest.raises(DataError, match="needs a reference such as 'Paragraph 12', not 'the first'"):
            retrieval("Paragraph 1", "the first", profile=profile)


@pytest.mark.parametrize(
    ("said", "wanted", "official", "fixed"),
    [
        ("x = 1", "x = 1", 1.0, 1.0),
        # "bcd" in common: 2 * 3 / 8.
        ("abcd", "bcde", 0.75, 0.75),
        # 2 / 16 is 12.5 percent, which rounds to the even 12.
        ("aXXXXXXX", "aYYYYYYY", 0.12, 0.125),
        # difflib takes "abc" first and finds nothing after it: 6 / 17 = 35.29 %. "1234" is longer in all: 8 / 17.
        ("abc1x2y3z4", "1234abc", 0.35, 8 / 17),
        # The first line that is no comment.
        ("# note\n// note\nx = 1\ny = 2", "x = 1", 1.0, 1.0),
        # An empty line inside is official's first line.
        ("# note\n\nx = 1", "x = 1", 0.0, 1.0),
        ("\n\nx = 1", "x = 1", 1.0, 1.0),
        # White space is a line too for official; " " against "x = 1": 2 * 1 / 6 = 33 %.
        ("\n \nx = 1", "x = 1", 0.33, 1.0),
        ("```python\nx = 1\n```", "x = 1", 1.0, 1.0),
        # A comment at the end of the line: official drops the line. Fixed: 2 * 5 / (5 + 11).
        ("x = 1 # one", "x = 1", 0.0, 10 / 16),
        ("#include <a.h>", "#include <a.h>", 0.0, 1.0),
        # A line of comment is what is wanted.
        ("# note", "# note", 0.0, 1.0),
        ("", "x", 0.0, 0.0),
        ("x = 1\r\ny", "x = 1", 0.91, 1.0),
        ("  x", "    x", 0.75, 0.75),
    ],
)
def test_code(said: str, wanted: str, official: float, fixed: float) -> None:
    assert code_similarity(said, wanted, profile="official") == pytest.approx(official, abs=EXACT)
    assert code_similarity(said, wanted) == pytest.approx(fixed, abs=EXACT)


def test_code_with_the_other_backend() -> None:
    # 8 / 17 = 47.06 %, as fuzzywuzzy has it with python-Levenshtein.
    assert code_similarity("abc1x2y3z4", "1234abc", profile="official", backend="subsequence") == 0.47
    assert code_similarity("abc1x2y3z4", "1234abc", backend="difflib") == pytest.approx(6 / 17, abs=EXACT)
    with pytest.raises(PolicyError, match="backend must be one of difflib, subsequence, not 'rapid'"):
        code_similarity("a", "a", backend="rapid")


def test_difflib_ignores_frequent_signs_of_long_lines() -> None:
    # From 200 signs on, difflib does not look for signs that are more than 1 % of a text, unless at the start.
    said, wanted = "x" + "a" * 250, "y" + "a" * 250
    assert code_similarity(said, wanted, profile="official") == 0.0
    assert code_similarity(said, wanted) == pytest.approx(500 / 502, abs=EXACT)


@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_subsequence_against_all_subsequences(first: str, second: str) -> None:
    def longest(i: int, j: int, known: dict[tuple[int, int], int]) -> int:
        if i == len(first) or j == len(second):
            return 0
        if (i, j) not in known:
            same = 1 + longest(i + 1, j + 1, known) if first[i] == second[j] else 0
            known[i, j] = max(same, longest(i + 1, j, known), longest(i, j + 1, known))
        return known[i, j]

    assert metrics._subsequence_length(first, second) == longest(0, 0, {})


def test_best_of_several_references() -> None:
    # 2 * 1 / (1 + 2) against "red car", 1 against "red".
    assert best_score("qa_f1", "red", ["blue", "red car", "red"]) == 1.0
    assert best_score("qa_f1", "red", ["blue", "red car"]) == pytest.approx(2 / 3, abs=EXACT)
    assert best_score("classification", "A", ["A"], classes=["A", "B"]) == 1.0
    assert best_score("qa_f1_zh", "a", ["a"], segment="characters", profile="official") == 1.0


def test_best_score_says_what_is_wrong() -> None:
    with pytest.raises(PolicyError, match="there is no metric 'bleu'; it must be one of qa_f1, "):
        best_score("bleu", "a", ["a"])
    with pytest.raises(DataError, match=r"qa_f1 needs a list of at least one right answer, not \[\]"):
        best_score("qa_f1", "a", [])
    with pytest.raises(DataError, match="not 'red'"):
        best_score("qa_f1", "a", "red")
    with pytest.raises(PolicyError, match="profile must be one of fixed, official, not 'strict'"):
        best_score("qa_f1", "a", ["a"], profile="strict")


def test_average() -> None:
    # (1 + 0 + 1/3) / 3 = 0.44444...
    assert average([1.0, 0.0, 1 / 3], profile="official") == 44.44
    assert average([1.0, 0.0, 1 / 3]) == pytest.approx(400 / 9, abs=1e-9)
    with pytest.raises(DataError, match="no score"):
        average([])


TEXTS = st.text("ab .A,3\n", max_size=20)


@given(TEXTS, TEXTS, st.sampled_from(metrics_text.PROFILES))
def test_bounds(said: str, wanted: str, profile: str) -> None:
    for function in (qa_f1, metrics.rouge, code_similarity):
        assert 0.0 <= function(said, wanted, profile=profile) <= 1.0
    for function in (qa_f1_zh, metrics.rouge_zh):
        assert 0.0 <= function(said, wanted, profile=profile, segment="characters") <= 1.0


@given(TEXTS)
def test_equal_texts_are_right_in_the_fixed_profile(text: str) -> None:
    for function in (qa_f1, qa_f1_zh, metrics.rouge, metrics.rouge_zh):
        assert function(text, text) == 1.0
