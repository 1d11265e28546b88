"""Items: where the question begins, where the answers stand, what is scored."""

from __future__ import annotations

import pytest

from kvsieve import zoo
from kvsieve.errors import DataError
from kvsieve.tasks import needle, ruler
from kvsieve.tasks.demo import DEMO_TASKS, longbench_samples
from kvsieve.tasks.items import choice_item, longbench_item, plain_item, procedural_item, until
from kvsieve.tasks.longbench import get_task
from kvsieve.tasks.longbench_v2 import ChoiceQuestion
from kvsieve.tasks.records import Sample

TEMPLATE = "{{ bos_token }}<u>{{ messages[0]['content'] }}</u><a>"


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load("mini-lm")[1]


def _words(tokenizer, item, span):
    return tokenizer.decode(list(item.prompt[span[0] : span[1]]))


def _sample(**more):
    given = {"context": "The river Ode is long. Alice has 12 cats.", "input": "How long is it?", "answers": ("Ode",)}
    return Sample(**({"id": "1", "dataset": "qasper", **given} | more))


@pytest.mark.parametrize("chat", [False, True])
def test_parts_of_a_procedural_sample(tokenizer, chat):
    tokenizer.chat_template = TEMPLATE
    for sample in needle.generate(tokenizer, 200, 4, needles=3):
        item = procedural_item(sample, tokenizer, chat=chat)
        begin = "<|bos|><u>" if chat else ""
        assert item.text.startswith(begin + sample.context)
        assert item.text.endswith(sample.answer_prefix)
        assert ("</u><a>" in item.text) is chat
        assert tokenizer.decode(list(item.question)) == item.text[item.text.index(sample.question) :]
        assert item.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in item.prompt[1:]
        ((low, high, which),) = item.answers
        assert which == 0
        assert _words(tokenizer, item, (low, high)).strip() == sample.answers[0]
        ((low, high, _),) = item.evidence
        assert sample.answers[0] in _words(tokenizer, item, (low, high))
        assert high <= len(item.context)
        assert len(item.offsets) == len(item.prompt)
        assert item.score(f" {sample.answers[0]}.") == 1.0
        assert not item.every


def test_models_that_think_aloud_are_asked_not_to(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}<a>{% if enable_thinking %}<think>{% endif %}"
    (sample,) = needle.generate(tokenizer, 200, 1)
    assert "<think>" not in procedural_item(sample, tokenizer, chat=True).text
    assert longbench_item(get_task("qasper"), _sample(), tokenizer, None, chat=True).text.endswith("<a>")


def test_where_all_answers_are_wanted(tokenizer):
    item = procedural_item(ruler.generate("niah_multivalue", tokenizer, 700, 1)[0], tokenizer)
    assert item.every
    assert sorted({which for *_, which in item.answers}) == [0, 1, 2, 3]


def test_the_question_of_longbench_begins_behind_the_context(tokenizer):
    task = get_task("qasper")
    item = longbench_item(task, _sample(), tokenizer, None)
    assert item.text.index(tokenizer.decode(list(item.question)).strip()) > item.text.index("12 cats.")
    assert "How long is it?" in tokenizer.decode(list(item.question))
    assert "12 cats." in tokenizer.decode(list(item.context))
    assert item.context + item.question == tuple(tokenizer(item.text).input_ids)
    ((low, high, which),) = item.answers
    assert which == 0
    assert _words(tokenizer, item, (low, high)).strip() == "Ode"
    whole = longbench_item(task, _sample(), tokenizer, None, split=False)
    assert whole.prompt == item.prompt
    assert whole.question == ()
    assert whole.answers == item.answers
    assert item.max_new_tokens == 128
    assert item.score("ode") == 1.0


@pytest.mark.parametrize("name", ["narrativeqa", "trec", "gov_report", "lcc", "repobench-p", "passage_count", "lsht"])
@pytest.mark.parametrize("profile", ["fixed", "official"])
def test_every_template_has_a_seam(tokenizer, name, profile):
    sample = _sample(dataset=name, classes=("Ode",))
    item = longbench_item(get_task(name), sample, tokenizer, None, profile=profile)
    seam = item.offsets[len(item.context)][0]
    assert item.text[:seam].rstrip().endswith("12 cats.")
    assert "12 cats." not in item.text[seam:]


def test_answers_are_looked_for_in_the_context_alone(tokenizer):
    """The question names what it asks about, and instructions show the form of an answer."""
    which = _sample(context="Ode ran. Tom sat.", input="Who ran, Ode or Tom?", answers=("Ode",))
    for split in (True, False):
        item = longbench_item(get_task("qasper"), which, tokenizer, None, split=split)
        assert len(item.answers) == 1
        assert item.offsets[item.answers[0][0]][0] < item.text.index("Tom sat.")
    paragraphs = "段落10: 一。段落2: 二。段落29: 三。"
    sample = _sample(dataset="passage_retrieval_zh", context=paragraphs, input="二", answers=("段落2",))
    item = longbench_item(get_task("passage_retrieval_zh"), sample, tokenizer, None, split=False)
    ((low, high, _),) = item.answers
    place = item.text.index("段落2:")
    assert item.offsets[low][0] <= place < item.offsets[high - 1][1] <= place + 5
    ready = _sample(context="", prompt="Ode ran. Who ran? Answer:")
    assert longbench_item(get_task("qasper"), ready, tokenizer, None, split=False).answers == ()


def test_answers_that_say_little_are_not_looked_for(tokenizer):
    task = get_task("qasper")
    assert longbench_item(task, _sample(answers=("No",)), tokenizer, None).answers == ()
    assert longbench_item(task, _sample(answers=("yes",)), tokenizer, None).answers == ()
    assert longbench_item(task, _sample(answers=("absent",)), tokenizer, None).answers == ()
    assert longbench_item(task, _sample(context="cat " * 30, answers=("cat",)), tokenizer, None).answers == ()
    assert longbench_item(task, _sample(context="cats", answers=("cat",)), tokenizer, None).answers == ()
    assert longbench_item(get_task("gov_report"), _sample(dataset="gov_report"), tokenizer, None).answers == ()


def test_chinese_answers_are_found_inside_sentences(tokenizer):
    sample = _sample(dataset="multifieldqa_zh", context="他住在北京市。", answers=("北京市",))
    item = longbench_item(get_task("multifieldqa_zh"), sample, tokenizer, None)
    ((low, high, _),) = item.answers
    start, end = item.offsets[low][0], item.offsets[high - 1][1]
    assert "北京市" in item.text[start:end]


def test_no_seam_is_said(tokenizer):
    task = get_task("qasper")
    ready = _sample(context="", prompt="All of it. Answer:")
    with pytest.raises(DataError, match="complete prompt"):
        longbench_item(task, ready, tokenizer, None)
    assert longbench_item(task, ready, tokenizer, None, split=False).question == ()
    with pytest.raises(DataError, match="question was cut"):
        longbench_item(task, _sample(input="why " * 300), tokenizer, 60)


def test_generation_ends_where_nothing_counts_any_more(tokenizer):
    sample = _sample(dataset="trec", classes=("Ode", "Nile"))
    item = longbench_item(get_task("trec"), sample, tokenizer, None, stop=".", max_new_tokens=8)
    assert item.finished("Ode.")
    assert item.finished("Ode\nNile")
    assert not item.finished("Ode")
    assert item.max_new_tokens == 8
    assert item.score("Ode. Nile") == 1.0
    assert until("a.b.c", ".") == "a"
    assert until("a.b", None) == "a.b"
    official = longbench_item(get_task("samsum"), _sample(dataset="samsum"), tokenizer, None, profile="official")
    assert official.stop_token_ids == (tokenizer.encode("\n", add_special_tokens=False)[-1],)


def test_choices(tokenizer):
    question = ChoiceQuestion("q", "A text $Q$.", "Which?", ("w", "x", "y", "z"), "C", "easy", "short")
    item = choice_item(question, tokenizer, None)
    assert item.score("The correct answer is (C).") == 1.0
    assert item.score("The correct answer is (A)") == 0.0
    assert "Which?" in tokenizer.decode(list(item.question))
    assert "A text $Q$." in tokenizer.decode(list(item.context))


def test_demo_samples_are_answerable(tokenizer):
    for name in DEMO_TASKS:
        for sample in longbench_samples(name, tokenizer, 3, length=400):
            item = longbench_item(get_task(name), sample, tokenizer, None, stop=".")
            assert item.score(f" {sample.answers[0]}. More") == 1.0
            assert item.answers
            assert tokenizer.decode(list(item.prompt)).endswith(sample.input)


def test_plain_text_is_cut(tokenizer):
    item = plain_item("t", "One two three four five six.", tokenizer, 4)
    assert len(item.prompt) == 4
    assert item.text == "One two three"[: len(item.text)]
    assert item.score is None
    with pytest.raises(DataError, match="too little"):
        plain_item("t", "", tokenizer, 4)
