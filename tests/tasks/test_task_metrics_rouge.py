"""ROUGE-L as published, against numbers of the package, and as defined, against arithmetic by hand."""

from __future__ import annotations

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsieve.errors import KvsieveError, PolicyError
from kvsieve.tasks import metrics_text
from kvsieve.tasks.metrics_rouge import common_subsequence, rouge, rouge_zh

PUBLISHED = [
    # What the package rouge 1.0.1 returns as rouge-l f; 0 where it raises, which LongBench counts as 0.
    ("the cat sat on the mat.", "the cat sat on the mat.", 0.999999995),
    ("the cat sat. on mat", "the cat sat on the mat.", 0.999999995),
    (". .", "a. . b", 0.4999999962500001),
    (".", "a", 0.0),
    ("police killed the gunman", "police kill the gunman", 0.749999995),
    ("the the the the", "the cat", 0.6666666622222223),
    ("a b c. d e f", "a c e. b d f.", 0.999999995),
    ("Pi is 3.14", "Pi is 3.15", 0.749999995),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.6153846106508877),
    ("a b c d. e f", "b a d c. f e", 0.4999999950000001),
    ("the cat. the dog", "a dog and the cat", 0.49999999531250006),
    ("x y x y x", "y x y", 0.999999995),
    ("a b. c d", "c d. a b", 0.999999995),
    ("One two three four five", "one two three four five", 0.7999999950000002),
    ("end. . start", "end. start", 0.7999999952000001),
    ("..a..", "a", 0.999999995),
    ("a  b\tc\nd", "a b c d", 0.999999995),
    ("U.S. policy is 3.5 percent", "US policy is 3.5 percent", 0.7692307642603551),
    ("p q r s t u v", "v u t s r q p", 0.14285713785714302),
    ("a b c a b c", "c b a c b a", 0.6666666616666668),
    (" ", "a", 0.0),
    ("a", "b", 0.0),
    ("", "a", 0.0),
    ("a", "", 0.0),
    ("...", "...", 0.0),
]


@pytest.mark.parametrize(("said", "wanted", "value"), PUBLISHED)
def test_published_numbers(said: str, wanted: str, value: float) -> None:
    assert rouge(said, wanted, profile="official") == pytest.approx(value, abs=1e-9)


def test_published_arithmetic() -> None:
    # 4 different words on each side, 3 in common: P = R = 3/4, F = 2 * 9/16 / (6/4 + 1e-8).
    value = rouge("police killed the gunman", "police kill the gunman", profile="official")
    assert value == pytest.approx(2 * 9 / 16 / (6 / 4 + 1e-8), abs=1e-15)
    # Repetition costs nothing: one different word of one, one of two. P = 1, R = 1/2.
    assert rouge("a a a a a", "a b", profile="official") == pytest.approx(2 * 0.5 / (1.5 + 1e-8), abs=1e-15)


def test_longest_common_subsequence() -> None:
    assert common_subsequence(list("12345"), list("13895")) == [0, 2, 4]
    # Of two of length 1, walking back from the ends leaves out what is last in the second.
    assert common_subsequence(["a", "b"], ["b", "a"]) == [1]
    assert common_subsequence([], ["a"]) == common_subsequence(["a"], []) == []


@given(st.lists(st.sampled_from("abc"), max_size=10), st.lists(st.sampled_from("abc"), max_size=10))
def test_a_common_subsequence_is_one(first: list[str], second: list[str]) -> None:
    found = common_subsequence(first, second)
    assert found == sorted(set(found))
    rest = iter(second)
    assert all(first[i] in rest for i in found)
    assert len(found) == len(common_subsequence(second, first))


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        # 3 of 4 words on both sides: 2 * 3 / 8.
        ("police killed the gunman", "Police kill the gunman.", 6 / 8),
        # Lin (2004): the union of "w1 w2" and "w1 w3 w5" has 4 of 5; 10 words were written: 2 * 4 / 15.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 8 / 15),
        # Repetition costs: 1 in common, 5 + 2 words.
        ("a a a a a", "a b", 2 / 7),
        # A word is not found more often than it was written: 1 of 1 and of 2.
        ("a", "a. a", 2 / 3),
        # The point of a number ends no sentence: "pi", "is" are in common, 3 + 3 words.
        ("Pi is 3.14", "Pi is 3.15", 4 / 6),
        # Order counts: 1 in common.
        ("a b", "b a", 2 / 4),
        ("", "a", 0.0),
        ("", "", 1.0),
        (".", ".", 1.0),
        (".", "!", 0.0),
    ],
)
def test_fixed(said: str, wanted: str, value: float) -> None:
    assert rouge(said, wanted) == pytest.approx(value, abs=1e-12)


def test_a_sentence_of_many_words_is_scored() -> None:
    text = " ".join(f"w{i}" for i in range(700))
    assert rouge(text, text, profile="official") == pytest.approx(0.999999995, abs=1e-9)


def test_chinese() -> None:
    # Two sentences on either side; "今天", "好" of 3 + 1 characters: all of the 3 in common, 3 + 4 words.
    assert rouge_zh("\u4eca\u5929\u597d", "\u4eca\u5929\u3002\u5f88\u597d") == pytest.approx(6 / 7, abs=1e-12)
    assert rouge_zh("\u589e\u957f25.89%", "\u589e\u957f25.8%") == pytest.approx(4 / 6, abs=1e-12)


def test_chinese_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("jieba")
    library.cut = lambda text, cut_all: text.split("|")  # type: ignore[attr-defined]
    library.setLogLevel = lambda level: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jieba", library)
    metrics_text._jieba.cache_clear()
    # "今天 好 。" against "今天 。": sets of 3 and 2 with 2 in common, the mark among them.
    value = rouge_zh("\u4eca\u5929|\u597d|\u3002", "\u4eca\u5929|\u3002", profile="official")
    assert value == pytest.approx(2 * (2 / 3) / (5 / 3 + 1e-8), abs=1e-12)
    metrics_text._jieba.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(KvsieveError, match="pip install jieba"):
        rouge_zh("a", "a", profile="official")
    assert rouge_zh("a", "a", profile="official", segment="characters") == pytest.approx(1, abs=1e-8)
    metrics_text._jieba.cache_clear()


def test_unknown_profile() -> None:
    with pytest.raises(PolicyError, match="profile must be one of"):
        rouge("a", "a", profile="new")
    with pytest.raises(PolicyError, match="segment must be one of"):
        rouge_zh("a", "a", segment="new")
