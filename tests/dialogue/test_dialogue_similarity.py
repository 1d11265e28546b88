"""Similarities by name, by function, and the one that needs a package."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsieve.dialogue import get_similarity, list_similarities, register_similarity, sentence_encoder, similarity
from kvsieve.dialogue.similarity import exact, token_f1, tokens
from kvsieve.errors import KvsieveError, PolicyError, ScoreError


@pytest.fixture(autouse=True)
def _names_as_they_were() -> Iterator[None]:
    before = dict(similarity._FACTORIES)
    yield
    similarity._FACTORIES.clear()
    similarity._FACTORIES.update(before)


def test_words_of_a_text() -> None:
    words = ["lets", "unscrew", "the", "2nd", "wheel", "its", "easy"]
    assert tokens("Let's  unscrew the 2nd WHEEL \u2014 it\u2019s easy!") == words
    assert tokens("Stra\u00dfe \ufb01x a_b 'quoted'") == ["strasse", "fix", "a", "b", "quoted"]
    assert tokens("...") == []


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("take the red wheel", "Take the red wheel.", 1.0),
        ("wheel red the take", "take the red wheel", 1.0),
        ("take the red wheel", "take the blue wheel", 0.75),
        ("red red red", "red", 0.5),
        ("red", "blue", 0.0),
        ("...", "red", 0.0),
        ("...", "...", 1.0),
        ("...", "?", 0.0),
    ],
)
def test_f1_of_words(said: str, wanted: str, value: float) -> None:
    assert token_f1(said, wanted) == token_f1(wanted, said) == value


def test_exact_means_up_to_white_space() -> None:
    assert exact("a  b\n", "a b") == 1.0
    assert exact("a b", "A b") == exact("a b", "a b.") == 0.0


@given(st.text(), st.text())
def test_bounds_and_identity(said: str, wanted: str) -> None:
    for function in (exact, token_f1):
        assert function(said, said) == 1.0
        assert 0.0 <= function(said, wanted) == function(wanted, said) <= 1.0


def test_names() -> None:
    assert list_similarities() == ["exact", "sentence_encoder", "token_f1"]
    assert get_similarity("exact")(["a", "b"], ["a", "c"]) == [1.0, 0.0]
    assert get_similarity("exact")([], []) == []
    for bad in ("bleu", 3, None):
        with pytest.raises(PolicyError):
            get_similarity(bad)  # type: ignore[arg-type]


def test_own_functions_by_name_and_as_they_are() -> None:
    def same_length(said: str, wanted: str) -> float:
        return float(len(said) == len(wanted))

    register_similarity("same_length", same_length)
    assert "same_length" in list_similarities()
    for one in ("same_length", same_length):
        assert get_similarity(one)(["ab", "c"], ["cd", "ef"]) == [1.0, 0.0]

    def half(said: Sequence[str], wanted: Sequence[str]) -> list[float]:
        return [0.5] * len(said)

    register_similarity("half", half, batched=True)
    assert get_similarity("half")(["ab", "c"], ["cd", "ef"]) == [0.5, 0.5]
    with pytest.raises(PolicyError, match="already"):
        register_similarity("half", half)
    with pytest.raises(PolicyError, match="needs a name"):
        register_similarity("", half)
    with pytest.raises(PolicyError, match="must be a function"):
        register_similarity("none", 3)  # type: ignore[arg-type]


def test_values_that_are_no_similarity() -> None:
    for value in (float("nan"), -0.1, 1.1):
        with pytest.raises(ScoreError, match="from 0 to 1"):
            get_similarity(lambda said, wanted, value=value: value)(["a"], ["b"])
    assert get_similarity(lambda said, wanted: 1 + 1e-7)(["a"], ["b"]) == [1.0]
    register_similarity("short", lambda said, wanted: [], batched=True)
    with pytest.raises(ScoreError, match="0 numbers for 1 pairs"):
        get_similarity("short")(["a"], ["b"])


def test_the_encoder_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(KvsieveError, match=r"kvsieve\[sentence-encoder\]"):
        sentence_encoder()(["a"], ["b"])


def test_the_encoder_encodes_every_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    class Encoder:
        def __init__(self, model: str, device: str | None) -> None:
            self.model = model

        def encode(self, texts: list[str], **_: Any) -> list[list[float]]:
            calls.append(texts)
            table = {"east": [2.0, 0.0], "north-east": [1.0, 1.0], "west": [-1.0, 0.0], "nowhere": [0.0, 0.0]}
            return [table[text] for text in texts]

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    encoder = sentence_encoder("any")
    checked = get_similarity(encoder)
    values = checked(["east", "east", "east"], ["east", "north-east", "west"])
    assert values == [1.0, pytest.approx(0.5**0.5), 0.0], "the opposite is not alike"
    checked(["west"], ["east"])
    assert calls == [["east", "north-east", "west"]]
    with pytest.raises(ScoreError, match="no direction"):
        checked(["nowhere"], ["east"])
