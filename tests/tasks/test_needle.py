"""Facts in prose for the bundled model, and the sandwich in San Francisco."""

from __future__ import annotations

import re

import pytest
import torch

from kvsieve import zoo
from kvsieve.errors import DataError
from kvsieve.tasks import needle
from kvsieve.tasks.ruler_sample import digest, token_spans


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return zoo.load("mini-lm")


@pytest.fixture(scope="module")
def tokenizer(model_and_tokenizer):
    return model_and_tokenizer[1]


@pytest.mark.parametrize("values", needle.VALUES)
@pytest.mark.parametrize("needles", [1, 4])
@pytest.mark.parametrize("ask", [True, False])
def test_samples_fit_and_hold_their_answer_once(tokenizer, values, needles, ask):
    samples = needle.generate(tokenizer, 200, 5, needles=needles, values=values, ask=ask)
    assert sorted(sample.depth for sample in samples) == [0, 0.25, 0.5, 0.75, 1]
    for sample in samples:
        assert sample.tokens == len(tokenizer(sample.text).input_ids)
        assert 200 - 12 < sample.tokens + sample.tokens_to_generate <= 200
        assert sample.task == f"needle_{values}_{needles}"
        (span,) = sample.spans
        assert sample.context[span.start : span.end] == sample.answers[0]
        (piece,) = sample.evidence
        statement = sample.context[piece.start : piece.end]
        assert statement == f"{sample.answer_prefix[1:]} {sample.answers[0]}."
        wording = statement.partition(sample.answers[0])[0].split()[0]
        assert sample.context.count(sample.answer_prefix[1:]) == 1
        assert (
            len(re.findall(rf"{wording}[a-z ]* [A-Z][a-z]+ (?:is|has) (?:[a-z]+|\d{{4}})\.", sample.context)) >= needles
        )
        assert (sample.question == "") is not ask
        assert sample.score(f" {sample.answers[0]}. And") == 1.0
        assert sample.score(" nothing") == 0.0


def test_words_are_one_token_each(tokenizer):
    for sample in needle.generate(tokenizer, 200, 5):
        (positions,) = token_spans(tokenizer, sample.text, sample.spans)
        assert len(positions) == 1
        assert tokenizer.decode(tokenizer(sample.text).input_ids[positions.start]).strip() == sample.answers[0]


def test_seeds_phrasings_and_depths_are_obeyed(tokenizer):
    one, again, other = (needle.generate(tokenizer, 150, 3, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert digest(one) != digest(other)
    (first,) = needle.generate(tokenizer, 150, 1, depth=0.0, phrasing="has")
    (last,) = needle.generate(tokenizer, 150, 1, depth=1.0, phrasing="secret")
    assert first.context.startswith("Remember that ")
    assert re.search(r"The secret word for \w+ is \w+\.$", last.context)
    assert last.question.startswith(" Tell me the secret word for ")


def test_a_grid_has_every_cell(tokenizer):
    samples = needle.grid(tokenizer, [120, 160], 3, per_cell=2)
    assert [(sample.length, sample.depth) for sample in samples] == [
        (length, depth) for length in (120, 160) for depth in (0, 0, 0.5, 0.5, 1, 1)
    ]
    assert len({sample.id for sample in samples}) == 12
    assert [sample.depth for sample in needle.grid(tokenizer, [120], [0.2, 0.9])] == [0.2, 0.9]
    starts = [sample.evidence[0].start / len(sample.context) for sample in samples]
    assert starts[0] == 0 < starts[2] < starts[4]


def test_the_bundled_model_finds_facts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    samples = needle.generate(tokenizer, 256, 20)
    right = 0.0
    for sample in samples:
        ids = torch.tensor([tokenizer(sample.text).input_ids])
        with torch.no_grad():
            best = int(model(ids, logits_to_keep=1).logits[0, -1].argmax())
        right += sample.score(tokenizer.decode([best]))
    assert right >= 16


TEXTS = ["Birds fly far. They come back in spring.", "Ants walk. They carry leaves to their nest."]


def test_kamradt_hides_one_sentence_at_every_depth(tokenizer):
    samples = needle.kamradt(tokenizer, [200, 260], 5, texts=TEXTS)
    assert [(sample.length, sample.depth) for sample in samples] == [
        (length, depth) for length in (200, 260) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert samples == needle.kamradt(tokenizer, [200, 260], 5, texts=TEXTS[::-1])
    for sample in samples:
        assert sample.tokens + 64 <= sample.length
        (piece,) = sample.evidence
        text = sample.context[piece.start : piece.end]
        assert text.startswith("The best thing to do in San Francisco is eat a sandwich")
        (span,) = sample.spans
        assert sample.context[span.start : span.end] == sample.answers[0]
        assert abs(piece.start / (len(sample.context) - len(text)) - sample.depth) < 0.12
        assert piece.start == 0 or sample.depth == 1 or sample.context[piece.start - 2] == "."
        assert sample.score(text) == 1.0
        assert sample.score("Sit in a park.") == pytest.approx(4 / 11)
    assert samples[0].context.partition("day. ")[2].startswith("Ants walk.")


def test_kamradt_spreads_several_needles_to_the_end(tokenizer):
    facts = ["Figs are good.", "Rye is good.", "Oats are good."]
    (sample,) = needle.kamradt(
        tokenizer, [300], [0.4], needles=facts, question="What is good?", answer_prefix="", answer="figs, rye and oats"
    )
    assert sample.depths == pytest.approx((0.4, 0.6, 0.8))
    assert [sample.context[start:end] for start, end, _ in sample.evidence] == facts
    assert sample.answer_prefix == ""
    assert sample.question == "\n\nWhat is good?"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (needle.generate, {"length": 20}, r"needle_word_1 needs a length of \d+ tokens or more"),
        (needle.generate, {"length": 0}, "length must be a whole number"),
        (needle.generate, {"count": 0}, "count must be a whole number"),
        (needle.generate, {"depth": -0.1}, "depth must be from 0"),
        (needle.generate, {"needles": 0}, "needles must be from 1 to 177, not 0"),
        (needle.generate, {"needles": 999}, "needles must be from 1 to 177"),
        (needle.generate, {"values": "pair"}, "values must be one of word, number, not 'pair'"),
        (needle.generate, {"phrasing": "x"}, "phrasing must be one of code, secret, has, or None"),
        (needle.generate, {"texts": []}, "texts holds no words"),
        (needle.grid, {"lengths": []}, "at least one length"),
        (needle.grid, {"depths": 1}, "depths must be 2 or more"),
        (needle.grid, {"depths": []}, "at least one depth"),
        (needle.grid, {"depths": [2.0]}, "depth must be from 0"),
        (needle.grid, {"per_cell": 0}, "count must be a whole number"),
        (needle.kamradt, {"lengths": []}, "at least one length, one needle and an answer"),
        (needle.kamradt, {"needles": []}, "at least one length, one needle and an answer"),
        (needle.kamradt, {"answer": " "}, "at least one length, one needle and an answer"),
        (needle.kamradt, {"texts": "x"}, "texts must be a list"),
        (needle.kamradt, {"tokens_to_generate": 0}, "tokens_to_generate must be"),
        (needle.kamradt, {"lengths": [80]}, "needle_kamradt needs a length of"),
    ],
)
def test_what_cannot_be_done_is_refused(tokenizer, function, arguments, message):
    given = {"length": 200, "count": 2} if function is needle.generate else {"lengths": [200]}
    with pytest.raises(DataError, match=message):
        function(tokenizer, **{**given, **arguments})
