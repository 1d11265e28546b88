"""The RULER tasks: sizes, depths, seeds, spans and what is refused."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from kvsieve import zoo
from kvsieve.errors import DataError
from kvsieve.tasks import ruler
from kvsieve.tasks.ruler_text import NOISE

LENGTH, COUNT = 900, 4


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(zoo.path("mini-lm")))


@pytest.fixture(scope="module")
def made(tokenizer):
    return {task: ruler.generate(task, tokenizer, LENGTH, COUNT) for task in ruler.list_tasks()}


@pytest.mark.parametrize("task", ruler.list_tasks())
def test_sizes_never_exceed_and_are_what_they_say(made, tokenizer, task):
    for sample in made[task]:
        assert sample.tokens == len(tokenizer(sample.text).input_ids)
        assert sample.tokens + sample.tokens_to_generate <= sample.length
        parts = (sample.question, sample.answer_prefix)
        apart = [len(tokenizer(part, add_special_tokens=False).input_ids) for part in parts]
        assert len(tokenizer(sample.context).input_ids) + sum(apart) == sample.tokens


@pytest.mark.parametrize(
    ("task", "unit"),
    [
        ("niah_single_1", 32),  # a line of noise
        ("niah_single_2", 12),  # a word
        ("niah_multikey_2", 45),  # a needle
        ("vt", 32),
        ("fwe", 25),  # one more in all may be one more of several words
        ("cwe", 30),
        ("qa_1", 190),  # a document
    ],
)
def test_samples_are_as_full_as_their_steps_allow(made, task, unit):
    assert all(sample.length - sample.tokens - sample.tokens_to_generate < unit for sample in made[task])


@pytest.mark.parametrize("task", ruler.list_tasks())
def test_seeds_decide(made, tokenizer, task):
    samples = made[task]
    again = ruler.generate(task, tokenizer, LENGTH, COUNT)
    assert again == samples
    other = ruler.generate(task, tokenizer, LENGTH, COUNT, seed=43)
    assert ruler.digest(again) == ruler.digest(samples) != ruler.digest(other)
    assert not {sample.text for sample in samples} & {sample.text for sample in other}
    assert len({sample.text for sample in samples}) == COUNT
    assert len({sample.id for sample in (*samples, *other)}) == 2 * COUNT


@pytest.mark.parametrize("task", ruler.list_tasks())
def test_spans_hold_the_answers_and_evidence_holds_the_spans(made, task):
    for sample in made[task]:
        assert {span.answer for span in sample.spans} == set(range(len(sample.answers)))
        for span in sample.spans:
            assert sample.context[span.start : span.end] == sample.answers[span.answer]
            assert any(piece.start <= span.start and span.end <= piece.end for piece in sample.evidence)
        assert list(sample.spans) == sorted(sample.spans)
        assert list(sample.evidence) == sorted(sample.evidence)


@pytest.mark.parametrize("task", ruler.list_tasks())
def test_token_spans_map_back_to_the_answers(made, tokenizer, task):
    for sample in made[task]:
        ids = tokenizer(sample.text).input_ids
        for span, positions in zip(sample.spans, ruler.token_spans(tokenizer, sample.text, sample.spans), strict=True):
            answer = sample.answers[span.answer]
            text = tokenizer.decode(ids[positions.start : positions.stop])
            assert answer in text
            assert len(text) <= len(answer) + 4
            inner = tokenizer.decode(ids[positions.start + 1 : positions.stop])
            assert answer not in inner


@pytest.mark.parametrize("task", ruler.list_tasks())
def test_the_context_does_not_say_what_is_asked(made, task):
    for sample in made[task]:
        assert sample.prompt == sample.context + sample.question
        assert sample.text == sample.prompt + sample.answer_prefix
        assert sample.question.startswith("\n")
        assert sample.question not in sample.context or task == "cwe"


@pytest.mark.parametrize("task", [task for task in ruler.list_tasks() if ruler.TASKS[task].has_depth])
def test_depths_are_spread_evenly_and_are_where_the_evidence_is(made, task):
    samples = made[task]
    pieces = len(samples[0].depths)
    expected = [(i / (COUNT - 1) + piece) / pieces for piece in range(pieces) for i in range(COUNT)]
    assert sorted(depth for sample in samples for depth in sample.depths) == pytest.approx(sorted(expected))
    assert [sample.depth for sample in samples] != sorted(sample.depth for sample in samples)
    for sample in samples:
        before = 0 if task != "vt" else sample.context.rindex("Memorize and track")
        whole = len(sample.context) - before
        for depth, piece in zip(sample.depths, sample.evidence, strict=True):
            assert (piece.start - before) / whole == pytest.approx(depth, abs=0.35)
    nearest = min(samples, key=lambda sample: sample.depth)
    furthest = max(samples, key=lambda sample: sample.depths[-1])
    assert nearest.evidence[0].start - before < whole / 3
    assert furthest.evidence[-1].end > len(furthest.context) - 400


def test_a_given_depth_is_kept(tokenizer):
    first, last = (ruler.generate("niah_single_1", tokenizer, 768, 3, depth=depth) for depth in (0.0, 1.0))
    for sample in first:
        assert sample.context.split("\n")[1].startswith("One of the special magic numbers")
    for sample in last:
        assert sample.context.split("\n")[-1].startswith("One of the special magic numbers")
    several = ruler.generate("niah_multivalue", tokenizer, 768, 2, depth=0.2)
    assert all(sample.depths == pytest.approx((0.2, 0.4, 0.6, 0.8)) for sample in several)


def test_one_sample_stands_in_the_middle(tokenizer):
    (sample,) = ruler.generate("niah_single_1", tokenizer, 768, 1)
    assert sample.depths == (0.5,)


def test_tokens_can_be_kept_free(tokenizer):
    (sample,) = ruler.generate("niah_single_2", tokenizer, 768, 1, reserve=100)
    assert 768 - 128 - 100 - 12 < sample.tokens <= 768 - 128 - 100


def test_the_table_has_the_published_tasks_and_sizes():
    generated = {task: ruler.TASKS[task].tokens_to_generate for task in ruler.list_tasks()}
    assert generated == {
        **{task: 128 for task in ruler.list_tasks() if task.startswith("niah")},
        **{"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32},
    }
    assert len(generated) == 13
    metrics = {task: ruler.TASKS[task].metric for task in ruler.list_tasks()}
    assert {task for task, metric in metrics.items() if metric == "string_match_part"} == {"qa_1", "qa_2"}


def test_needles_have_the_published_wording(made):
    sample = made["niah_single_1"][0]
    (value,) = sample.answers
    key = re.search(r"for ([a-z]+-[a-z]+) is: ", sample.context).group(1)
    assert sample.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert f"\nOne of the special magic numbers for {key} is: {value}." in sample.context
    assert sample.question == f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    assert sample.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    lines = Counter(sample.context.split("\n")[1:])
    assert len(lines) == 2
    assert lines[NOISE] > 5
    assert re.fullmatch(r"[1-9]\d{6}", value)


def test_several_needles_are_asked_for_in_the_plural(made):
    sample = made["niah_multiquery"][0]
    assert sample.context.startswith("Some special magic numbers are hidden within the following text.")
    assert re.match(
        r"\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the provided text\?",
        sample.question,
    )
    assert sample.answer_prefix.endswith(" mentioned in the provided text are")
    assert len(sample.answers) == len(sample.evidence) == 4
    assert len(re.findall(r"special magic numbers for", made["niah_multikey_1"][0].context)) == 4


def test_uuids_are_version_4_and_haystacks_of_needles_have_different_keys(made):
    sample = made["niah_multikey_3"][0]
    found = re.findall(r"for (\S+) is: (\S+)\.", sample.context)
    assert len(found) == len(sample.context.split("\n")) - 1
    everything = [one for pair in found for one in pair]
    assert len(set(everything)) == len(everything)
    form = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert all(form.fullmatch(one) for one in everything)


def test_variables_form_a_chain_in_order(made):
    for sample in made["vt"]:
        value = re.search(r"assigned the value (\d+) in", sample.question).group(1)
        steps = [sample.context[start:end] for start, end, _ in sample.evidence]
        assert steps[0] == f"VAR {sample.answers[0]} = {value}"
        for earlier, later, step in zip(sample.answers, sample.answers[1:], steps[1:], strict=False):
            assert step == f"VAR {later} = VAR {earlier} "
        assert len(steps) == 5
        assert sample.context.count("Memorize and track the chain(s)") == 2
        assert re.search(r"they are: ([A-Z]{3} ){4}[A-Z]{3}\nMemorize", sample.context)
        assert f"5 variables are assgined the value {value}, they are: " in sample.answer_prefix


def test_more_chains_are_not_asked_for(tokenizer):
    (sample,) = ruler.generate("vt", tokenizer, 1500, 1, num_chains=2, num_hops=2)
    assert len(sample.answers) == 3
    assert len(re.findall(r"VAR [A-Z]{5} =", sample.context)) == 6


@pytest.mark.parametrize(("length", "often", "seldom"), [(1100, 6, 1), (4096, 30, 3)])
def test_common_words_occur_as_often_as_published(tokenizer, length, often, seldom):
    (sample,) = ruler.generate("cwe", tokenizer, length, 1)
    listed = sample.context.rpartition("Memorize the ones that appear most often.\n")[2]
    entries = re.findall(r"(\d+)\. (\S+)", listed)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    assert set(counts.values()) == {often, seldom}
    assert len(sample.spans) == 10 * often
    assert sample.depths == ()
    assert sample.depth is None


def test_frequent_words_follow_their_ranks(made):
    for sample in made["fwe"]:
        text = sample.context.partition("coded words. ")[2]
        (dots, _), *ranked = Counter(text.split()).most_common(5)
        assert dots == "..."
        assert tuple(word for word, _ in ranked[:3]) == sample.answers
        assert ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in sample.answers)


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_documents_answer_the_question_in_one_place(made, task):
    for sample in made[task]:
        numbers = [int(number) for number in re.findall(r"^Document (\d+):$", sample.context, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(sample.evidence) == len(sample.depths) == (1 if task == "qa_1" else 2)
        name = re.search(r"of ([A-Z][a-z]+)|(?:does|did) ([A-Z][a-z]+) |where (\w+ \w+) was", sample.question)
        name = next(group for group in name.groups() if group)
        holding = [text for text in sample.context.split("\n\n") if name in text]
        assert len(holding) == 1
        if task == "qa_2":
            step = next(piece for piece in sample.evidence if piece.answer == -1)
            assert sample.context[step.start : step.end].startswith("The place of birth was ")
            town = re.search(r"birth was (\w+),", holding[0]).group(1)
            (told,) = (text for text in sample.context.split("\n\n") if f"\n{town}\n" in text)
            assert sample.answers[0] in told
        else:
            assert sample.answers[0] in holding[0]


def test_prose_is_the_callers(tokenizer):
    texts = [" ".join(f"The {animal} sleeps in tree number {i}." for i in range(40)) for animal in ("owl", "cat")]
    (sample,) = ruler.generate("niah_single_2", tokenizer, 512, 1, texts=texts)
    hay = sample.context.partition("\n")[2].replace(sample.context[slice(*sample.evidence[0][:2])], "")
    assert set(re.findall("[a-z]{3,}", hay)) <= {"the", "owl", "cat", "sleeps", "tree", "number"}


def test_prose_starts_again_when_it_runs_out(tokenizer):
    (sample,) = ruler.generate("niah_single_2", tokenizer, 1024, 1, texts=["One short sentence. Another one."])
    assert sample.tokens > 1024 - 128 - 8


def test_words_are_invented_when_texts_have_no_more(tokenizer):
    (sample,) = ruler.generate("cwe", tokenizer, 4000, 1, texts=["nothing"])
    words = re.findall(r"\d+\. (\S+)", sample.context.rpartition("most often.\n")[2])
    assert len(set(words)) == len(words) - 50


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("niah", {}, r"no RULER task 'niah'; there are: niah_single_1, .*qa_2"),
        ("vt", {"hops": 2}, r"vt has no parameter 'hops'; it has: num_chains, num_hops"),
        ("vt", {"num_hops": 0}, "num_hops must be 1 or more, not 0"),
        ("vt", {"num_chains": 0}, "num_chains must be 1 or more"),
        ("vt", {"example_lines": -1}, "example_lines must be 0 or more"),
        ("cwe", {"num_cw": 0}, "num_cw must be 1 or more"),
        ("cwe", {"freq_ucw": 0}, "freq_ucw must be 1 or more"),
        ("cwe", {"freq_cw": 3}, "freq_cw must be 4 or more"),
        ("fwe", {"alpha": 1.0}, "alpha must be above 1"),
        ("fwe", {"coded_wordlen": 2}, "coded_wordlen must be 4 or more"),
        ("qa_1", {"hops": 3}, "hops must be 1 or 2"),
        ("niah_single_1", {"type_haystack": "hay"}, "type_haystack must be one of noise, essay, needle, not 'hay'"),
        ("niah_single_1", {"type_needle_k": "x"}, "type_needle_k must be one of words, numbers, uuids"),
        ("niah_single_1", {"type_needle_v": "x"}, "type_needle_v must be one of"),
        ("niah_single_1", {"num_needle_q": 0}, "num_needle_q must be 1 or more"),
        ("niah_single_1", {"length": 0}, "length must be a whole number of 1 or more, not 0"),
        ("niah_single_1", {"length": 99.5}, "length must be a whole number"),
        ("niah_single_1", {"count": 0}, "count must be a whole number of 1 or more"),
        ("niah_single_1", {"reserve": -1}, "reserve must be a whole number of 0 or more"),
        ("niah_single_1", {"depth": 1.5}, "depth must be from 0, the start, to 1, the end"),
        ("cwe", {"depth": 0.5}, "cwe has its answers everywhere"),
        ("fwe", {"depth": 0.5}, "fwe has its answers everywhere"),
        ("vt", {"questions": "x.json"}, "vt asks no questions about documents"),
        ("niah_single_2", {"texts": "one text"}, "texts must be a list of texts"),
        ("niah_single_2", {"texts": [" ", ""]}, "texts holds no words"),
    ],
)
def test_what_cannot_be_done_is_refused(tokenizer, task, arguments, message):
    with pytest.raises(DataError, match=message):
        ruler.generate(task, tokenizer, **{"length": 768, "count": 2, **arguments})


@pytest.mark.parametrize("task", ruler.list_tasks())
def test_a_length_that_is_too_short_is_refused_with_one_that_is_enough(tokenizer, task):
    with pytest.raises(DataError, match=rf"{task} needs a length of \d+ tokens or more with this tokenizer") as error:
        ruler.generate(task, tokenizer, 100, 3)
    enough = int(re.search(r"length of (\d+)", str(error.value)).group(1))
    samples = ruler.generate(task, tokenizer, enough, 3)
    assert max(sample.tokens + sample.tokens_to_generate for sample in samples) == enough
    with pytest.raises(DataError, match="needs a length"):
        ruler.generate(task, tokenizer, enough - 1, 3)


def test_what_is_kept_free_counts_too(tokenizer):
    with pytest.raises(DataError, match=r"\(30 to generate, 700 kept free\)"):
        ruler.generate("vt", tokenizer, 1024, 1, reserve=700)
