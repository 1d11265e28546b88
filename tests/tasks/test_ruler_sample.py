"""Scoring, token positions and filling up to a length."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from kvsieve import zoo
from kvsieve.errors import DataError, KvsieveError
from kvsieve.tasks._words import ADJECTIVES, NOUNS, invented_words, keys
from kvsieve.tasks.ruler_fill import Draft, Place, Writer, fill, spread
from kvsieve.tasks.ruler_sample import (
    Span,
    count_tokens,
    digest,
    first_word,
    string_match_all,
    string_match_part,
    token_spans,
    word_recall,
)
from kvsieve.tasks.ruler_text import Texts, sentences


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(zoo.path("mini-lm")))


@pytest.mark.parametrize(
    ("said", "answers", "every", "any_"),
    [
        ("1234567.", ["1234567"], 1.0, 1.0),
        ("12345678", ["1234567"], 1.0, 1.0),
        (" It is RED, and\x00blue\n", ["Red", "BLUE"], 1.0, 1.0),
        ("red", ["red", "blue", "green", "pink"], 0.25, 1.0),
        ("re\x01d", ["red"], 0.0, 0.0),
        ("two\x02words", ["two\nwords"], 1.0, 1.0),
        ("", ["red"], 0.0, 0.0),
        ("red red", ["red", "red"], 1.0, 1.0),
        ("nothing", ["red", "blue"], 0.0, 0.0),
    ],
)
def test_string_matches(said, answers, every, any_):
    assert string_match_all(said, answers) == every
    assert string_match_part(said, answers) == any_


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (" baker. The", 1.0),
        ("baker's", 1.0),
        ('"baker"', 1.0),
        ("Baker", 0.0),
        ("bakers", 0.0),
        ("the baker", 0.0),
        ("", 0.0),
    ],
)
def test_first_word_is_exact(said, score):
    assert first_word(said, ["baker"]) == score


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("Sit and eat!", ["eat and sit"], 1.0),
        ("eat eat", ["eat and sit"], 1 / 3),
        ("sit", ["eat and sit", "sit, sit"], 1.0),
        ("", ["eat"], 0.0),
    ],
)
def test_word_recall(said, answers, score):
    assert word_recall(said, answers) == pytest.approx(score)


@pytest.mark.parametrize("metric", [string_match_all, string_match_part, first_word, word_recall])
def test_nothing_to_compare_with_is_refused(metric):
    with pytest.raises(DataError, match="no answers"):
        metric("x", [])


def test_an_answer_without_words_is_refused():
    with pytest.raises(DataError, match="without a word"):
        word_recall("x", ["!"])


def test_token_spans_may_start_later_and_count_no_special_tokens(tokenizer):
    text = "Opening. The caf\u00e9 is \u201copen\u201d."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    context = text[9:]
    at = context.index("caf\u00e9")
    (with_bos,) = token_spans(tokenizer, text, [Span(at, at + 4, 0)], shift=9)
    (without,) = token_spans(tokenizer, text, [Span(at, at + 4, 0)], shift=9, add_special_tokens=False)
    assert [position - 1 for position in with_bos] == list(without)
    assert tokenizer.decode(ids[without.start : without.stop]).strip() == "caf\u00e9"


def test_token_spans_cover_the_whole_text(tokenizer):
    text = "one two three"
    (all_,) = token_spans(tokenizer, text, [Span(0, len(text), 0)])
    assert all_ == range(1, len(tokenizer(text).input_ids))
    assert token_spans(tokenizer, text, []) == []


@pytest.mark.parametrize(("span", "shift"), [((0, 0), 0), ((3, 99), 0), ((0, 3), -1), ((5, 4), 0), ((0, 3), 12)])
def test_spans_outside_the_text_are_refused(tokenizer, span, shift):
    with pytest.raises(DataError, match="not within the text"):
        token_spans(tokenizer, "one two three", [Span(*span, 0)], shift=shift)


class Slow:
    """A tokenizer that does not know where its tokens stand, and swallows what is not a letter or digit."""

    is_fast = False

    def __call__(self, text, **_):
        return {"input_ids": [word for word in text.split() if word.isalnum()]}


class Gaps(Slow):
    is_fast = True

    def __call__(self, text, **_):
        return {"input_ids": [0, 1], "offset_mapping": [(0, 0), (4, 7)]}


def test_token_spans_need_a_fast_tokenizer_that_covers_them():
    with pytest.raises(KvsieveError, match=r"Slow does not know .* load a fast tokenizer"):
        token_spans(Slow(), "a b", [Span(0, 1, 0)])
    assert token_spans(Gaps(), "one two", [Span(3, 5, 0)]) == [range(1, 2)]
    with pytest.raises(DataError, match="no token covers"):
        token_spans(Gaps(), "one two", [Span(0, 3, 0)])


def test_count_is_the_larger_of_joined_and_apart(tokenizer):
    assert count_tokens(tokenizer, "a b") == 3
    joined = len(tokenizer("unhappiness").input_ids)
    assert count_tokens(tokenizer, "unhap", "piness") >= joined
    assert count_tokens(Slow(), "a .", ". b") == 2
    assert count_tokens(Slow(), "a", "b") == 2  # one word if joined, two apart


@pytest.mark.parametrize("count", [2, 3, 11, 50])
def test_depths_are_even_and_shuffled_by_the_seed(count):
    places = spread(count, None, "a")
    assert sorted(place.depth for place in places) == pytest.approx([i / (count - 1) for i in range(count)])
    assert places == spread(count, None, "a")
    assert spread(count, 0.3, "a") == [Place(0.3, given=True)] * count


def test_several_pieces_have_parts_of_their_own():
    assert Place(0.5).depths(4) == (0.125, 0.375, 0.625, 0.875)
    assert Place(1.0).depths(2) == (0.5, 1.0)
    assert Place(0.5, given=True).depths(2) == (0.5, 0.75)


def test_needles_go_where_they_belong():
    writer = Writer()
    writer.add("> ")
    writer.add_pieces(["a", "b", "c", "d"], [(1.0, "END", 1), (0.0, "START", 0), (0.5, "MID", None)], " ")
    assert writer.text() == "> START a b MID c d END"
    assert [writer.text()[start:end] for start, end, _ in writer.evidence] == ["START", "END"]
    assert len(writer) == len(writer.text())
    only = Writer()
    only.add_pieces([], [(0.7, "x", 0)], "\n")
    assert only.text() == "x"


def test_spans_are_whole_words_in_the_evidence_for_an_answer():
    text = "a rat, pirate rat. rat"
    draft = Draft(text, "", "", ("rat", "pirate"), [Span(0, 18, 0), Span(19, 22, -1)])
    assert [(text[s:e], i) for s, e, i in draft.spans()] == [("rat", 0), ("pirate", 1), ("rat", 0)]


GROWTH = {
    "even": lambda n: n,
    "uneven": lambda n: 3 * n + n % 2,
    "fast": lambda n: n * n,
    "slow": lambda n: int(n**0.5),
    "late": lambda n: 5 if n < 40 else 2 * n,
}


@pytest.mark.parametrize("growth", GROWTH.values(), ids=GROWTH)
@pytest.mark.parametrize("most", [None, 37])
def test_the_largest_size_that_fits_is_found(growth, most):
    class Words:
        def __call__(self, text, **_):
            return {"input_ids": text.split()}

    def draft(size, place, key):
        return Draft("x " * growth(size), "", "", ("x",), [])

    (sample,) = fill(
        "t",
        draft,
        Words(),
        length=101,
        places=[Place(0.5)],
        seed=0,
        reserve=0,
        fewest=2,
        most=most,
        tokens_to_generate=1,
        metric="first_word",
    )
    sizes = [n for n in range(2, 20_000 if most is None else most + 1) if growth(n) <= 100]
    assert sample.tokens == growth(max(sizes))


def test_invented_words_and_keys_are_all_different():
    words = invented_words(random.Random(0))
    drawn = [next(words) for _ in range(2000)]
    assert len(set(drawn)) == 2000
    assert all(word.isalpha() and word.islower() for word in drawn)
    endless = keys(random.Random(0))
    made = [next(endless) for _ in range(len(ADJECTIVES) * len(NOUNS) // 2 + 50)]
    assert len(set(made)) == len(made)
    assert made[0].count("-") == 1
    assert made[-1].count("-") == 2


@pytest.mark.parametrize("listed", [ADJECTIVES, NOUNS])
def test_word_lists_have_no_duplicates(listed):
    assert len(set(listed)) == len(listed) > 200
    assert all(word.isalpha() and word.islower() for word in listed)


def test_prose_is_cut_into_sentences():
    text = 'One  line\nends. "Two" too! (Three) no. four?'
    assert sentences(text) == ["One line ends.", '"Two" too!', "(Three) no. four?"]
    texts = Texts(["A b c. D e.", "F."])
    assert texts.take(1, 5) == ["D e.", "F.", "A b"]
    assert texts.take(0, 14) == ["A b c.", "D e.", "F.", "A b c.", "D e.", "F.", "A b"]


def test_the_reference_is_prose_and_its_words_come_first():
    texts = Texts()
    assert texts.starts > 500
    text = " ".join(texts.sentences)
    assert ">>>" not in text
    assert "****" not in text
    short, long = (texts.words(count, random.Random(1)) for count in (10, 5000))
    assert long[:10] == short
    assert len(set(long)) == 5000


def test_digest_tells_texts_and_answers_apart(tokenizer):
    from kvsieve.tasks import needle

    one, two = needle.generate(tokenizer, 64, 2)
    assert digest([one, two]) != digest([two, one]) != digest([one])
    assert len(digest([])) == 64
