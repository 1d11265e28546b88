"""Questions from files in the format of SQuAD and HotpotQA."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from kvsieve import zoo
from kvsieve.errors import DataError
from kvsieve.tasks import ruler


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(zoo.path("mini-lm")))


SQUAD = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Elda is a river. It is 71 km long. It ends in the sea.",
                    "qas": [
                        {
                            "id": "a",
                            "question": "How long is the Elda?",
                            "answers": [
                                {"text": "71 km", "answer_start": 27},
                                {"text": "71", "answer_start": 27},
                                {"text": "71 km", "answer_start": 27},
                            ],
                        },
                        {"id": "b", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "The Orm is a river too.", "qas": []},
            ],
        },
        {"title": "Hills", "paragraphs": [{"context": f"Hill {i} is high.", "qas": []} for i in range(30)]},
    ]
}
HOTPOT = [
    {
        "_id": "a",
        "question": "Where was the author of Dust born?",
        "answer": "Lund",
        "supporting_facts": [["Dust", 0], ["Ann Ek", 1], ["Ann Ek", 7]],
        "context": [
            ["Dust", ["Dust is a book by Ann Ek.", " It is long."]],
            ["Ann Ek", ["Ann Ek writes.", " She was born in Lund."]],
            ["Mud", ["Mud is a book."]],
        ],
    },
    {
        "_id": "b",
        "question": "Are both books?",
        "answer": "no",
        "supporting_facts": [["Mud", 0]],
        "context": [["Mud", ["Mud is no book."]]],
    },
]


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_questions_can_come_from_a_file_like_squad(tokenizer, tmp_path):
    file = write(tmp_path / "s.json", SQUAD)
    samples = ruler.generate("qa_1", tokenizer, 256, 2, questions=file)
    for sample in samples:
        assert sample.question.endswith("Question: How long is the Elda?")
        assert sample.answers == ("71 km", "71")
        assert {sample.context[start:end] for start, end, _ in sample.evidence} == {"It is 71 km long."}
        assert [sample.context[start:end] for start, end, _ in sample.spans[:2]] == ["71", "71 km"]
        assert "The Orm is a river too." in sample.context
        assert sample.score("It is 71km, I think") == 1.0
    places = [sample.context.index("The Elda") / len(sample.context) for sample in samples]
    assert max(places) - min(places) > 0.2
    (whole,) = ruler.generate("qa_1", tokenizer, 2000, 1, questions=ruler.read_questions(file))
    assert whole.context.count("Document ") == 32


def test_questions_can_come_from_a_file_like_hotpot(tokenizer, tmp_path):
    file = write(tmp_path / "h.json", HOTPOT)
    first, second = ruler.generate("qa_2", tokenizer, 512, 2, questions=file)
    assert {first.context[start:end] for start, end, _ in first.evidence} == {
        "Dust is a book by Ann Ek.",
        "She was born in Lund.",
    }
    assert [first.context[start:end] for start, end, _ in first.spans] == ["Lund"]
    assert "Ann Ek\nAnn Ek writes. She was born in Lund." in first.context
    assert second.answers == ("no",)
    assert second.evidence
    assert second.spans == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ({"rows": []}, "neither SQuAD"),
        ({"data": []}, "no question with an answer"),
        ([], "no question with an answer"),
        ([{"_id": "a"}], r"malformed \(KeyError: 'context'\)"),
        ({"data": [{"paragraphs": [{"context": "x"}]}]}, r"malformed \(KeyError: 'qas'\)"),
    ],
)
def test_bad_question_files_are_refused(tokenizer, tmp_path, data, message):
    file = tmp_path / "q.json"
    if data is not None:
        write(file, data)
    with pytest.raises(DataError, match=message):
        ruler.generate("qa_1", tokenizer, 768, 1, questions=file)
