"""Middle truncation and chat wrappers, with tokenizers small enough to count by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsieve.errors import DataError, PolicyError
from kvsieve.tasks.longbench import TASKS
from kvsieve.tasks.longbench_encoding import encode_prompt
from kvsieve.tasks.records import Sample

BOS = 256


class Bytes:
    """One token per byte and one before the text; "ab" is a single token, so cutting it apart changes the count."""

    bos_token = "<s>"
    chat_template: str | None = "given"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [BOS] if add_special_tokens else []
        for i, part in enumerate(text.split("<s>")):
            ids += ([BOS] if i else []) + self._merged(part)
        return {"input_ids": ids}

    @staticmethod
    def _merged(text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split("ab")):
            ids += ([300] if i else []) + list(part.encode())
        return ids

    def decode(
        self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        out = b""
        for one in ids:
            if one == BOS:
                out += b"" if skip_special_tokens else b"<s>"
            else:
                out += b"ab" if one == 300 else bytes([one])
        return out.decode(errors="replace")

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<s>[U]{turns[0]['content']}[A]"


TOKENIZER = Bytes()
TEXT = "0123456789"


@pytest.mark.parametrize("profile", ["official", "fixed"])
@pytest.mark.parametrize("limit", [None, 11, 12])
def test_a_prompt_that_fits_stays(profile: str, limit: int | None) -> None:
    out = encode_prompt(TEXT, TOKENIZER, limit, profile=profile)
    assert out.text == TEXT
    assert out.ids == (BOS, *TEXT.encode())
    assert (out.tokens, out.truncated, out.wrapped) == (11, False, False)


@pytest.mark.parametrize(
    ("limit", "version", "text"),
    [
        # 11 tokens, the first of which is no text: 5 from the left are BOS 0123, 5 from the right are 56789.
        (10, 1, "012356789"),
        # int(9 / 2) = 4 from either end.
        (9, 1, "0126789"),
        (2, 1, "9"),
        # int(1 / 2) = 0: nothing from the left, and ids[-0:] is everything.
        (1, 1, TEXT),
        # 9 // 2 = 4 from the left, -9 // 2 = -5, so 5 from the right.
        (9, 2, "01256789"),
        (10, 2, "012356789"),
        # Nothing from the left, 1 from the right.
        (1, 2, "9"),
    ],
)
def test_truncation_as_published(limit: int, version: int, text: str) -> None:
    out = encode_prompt(TEXT, TOKENIZER, limit, profile="official", version=version)
    assert out.text == text
    assert out.ids == (BOS, *text.encode())
    assert (out.tokens, out.truncated) == (11, text != TEXT)


def test_published_truncation_may_come_out_too_long() -> None:
    # 12 tokens: BOS, "a b" apart, ... The halves are BOS x a and b y z, which join to "ab", one token less; with the
    # wrapper's 6 it is longer than the limit.
    out = encode_prompt("xa______byz", TOKENIZER, 6, chat=True, profile="official")
    assert out.text == "<s>[U]xabyz[A]"
    assert len(out.ids) == 1 + 3 + 4 + 3
    assert out.wrapped


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        # 10 tokens of text beside BOS: 9 for a limit of 10, of which the first end gets 5.
        (10, "012346789"),
        (9, "01236789"),
        (3, "09"),
    ],
)
def test_truncation_of_the_fixed_profile(limit: int, text: str) -> None:
    out = encode_prompt(TEXT, TOKENIZER, limit)
    assert out.text == text
    assert out.ids == (BOS, *text.encode())
    assert (len(out.ids), out.truncated) == (limit, True)


def test_the_wrapper_is_counted_in_the_fixed_profile() -> None:
    # BOS and 3 + 3 signs leave 5 for the text.
    out = encode_prompt(TEXT, TOKENIZER, 12, chat=True)
    assert out.text == "<s>[U]01289[A]"
    assert len(out.ids) == 12
    assert out.ids.count(BOS) == 1
    own = encode_prompt(TEXT, TOKENIZER, 8, chat=lambda text: f"[{text}]")
    assert own.text == "[01289]"
    assert own.ids == (BOS, *b"[01289]")


def test_no_room() -> None:
    with pytest.raises(DataError, match="max_length=8 leaves no room for the prompt beside the chat wrapper"):
        encode_prompt(TEXT, TOKENIZER, 8, chat=True)
    with pytest.raises(PolicyError, match="max_length must be 1 or more, not 0"):
        encode_prompt(TEXT, TOKENIZER, 0)
    with pytest.raises(PolicyError, match="version must be 1 or 2, not 3"):
        encode_prompt(TEXT, TOKENIZER, 8, version=3)
    with pytest.raises(PolicyError, match="profile must be one of"):
        encode_prompt(TEXT, TOKENIZER, 8, profile="new")


def test_a_tokenizer_without_a_chat_template() -> None:
    plain = Bytes()
    plain.chat_template = None
    with pytest.raises(PolicyError, match="the tokenizer has no chat template; give chat=False, or a function"):
        encode_prompt(TEXT, plain, 8, chat=True)


def test_characters_cut_in_two() -> None:
    # Three bytes each: 6 of 12 are kept, whole characters; 4 of 12 are 2 and 2 bytes, of which no character is left.
    text = "\u4e00\u4e01\u4e02\u4e03"
    assert encode_prompt(text, TOKENIZER, 7).text == "\u4e00\u4e03"
    assert encode_prompt(text, TOKENIZER, 5).text == ""
    assert "\ufffd" in encode_prompt(text, TOKENIZER, 5, profile="official").text


def test_characters_cut_in_two_by_a_tokenizer_that_falls_back_to_bytes() -> None:
    class Fallback(Bytes):
        def decode(self, ids: list[int], *args: Any, **kwargs: Any) -> str:
            text = super().decode(ids, *args, **kwargs)
            return "\ufffd" * len(ids) if "\ufffd" in text else text

    # 16 bytes of 24 are 8 and 8: two characters and 2 bytes from either end, of which the characters stay.
    text = "".join(chr(0x4E00 + i) for i in range(8))
    assert encode_prompt(text, Fallback(), 17).text == text[:2] + text[-2:]
    assert set(encode_prompt(text, Fallback(), 17, profile="official").text) == {"\ufffd"}


def test_a_text_that_is_broken_already_keeps_its_marks() -> None:
    text = "\ufffd" * 6
    assert encode_prompt(text, TOKENIZER, 7).text == text[:2]


@given(st.text("abx\u4e00", max_size=40), st.integers(3, 50), st.booleans())
def test_never_above_the_limit(text: str, limit: int, chat: bool) -> None:
    whole = len(encode_prompt(text, TOKENIZER, None, chat=chat).ids)
    limit += 7 * chat
    out = encode_prompt(text, TOKENIZER, limit, chat=chat)
    assert len(out.ids) <= limit
    assert out.truncated == (whole > limit)


def test_tasks_decide_about_the_wrapper() -> None:
    sample = Sample(id="s", dataset="d", context="C", input="Q", answers=("x",))
    for name, task in TASKS.items():
        out: Any = task.encode(sample, TOKENIZER, None, chat=True)
        assert out.wrapped == task.chat == (name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
        assert out.text.startswith("<s>[U]") == task.chat
    short = TASKS["qasper"].encode(sample, TOKENIZER, 100, profile="official")
    assert short.truncated
    assert short.tokens == len(TOKENIZER(TASKS["qasper"].prompt(sample, "official"))["input_ids"])
