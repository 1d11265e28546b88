"""Text shaded by survival: the right shade for every token, at the first moment and in the data for all others."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html import unescape

import numpy as np
import pytest

from kvsieve.errors import DataError
from kvsieve.report import shading
from kvsieve.report.picture_data import steps_of
from kvsieve.report.shading import level, shaded_terminal, shaded_text
from kvsieve.trace import Trace

WORDS = ["", "A", " <b>", " &", " cat", " sat", "."]
"""The first is a special token."""


def make(**about) -> Trace:
    """Two layers of two heads read seven tokens in three passes; the last token is the model's."""
    left = np.zeros((2, 2, 7), dtype=np.int32)
    left[:, :, 1] = 4
    left[0, 0, 2] = 6
    left[0, :, 3] = 6
    left[1, 0, 3] = 4
    ends = np.cumsum([len(word) for word in WORDS]).tolist()
    told = {
        "method": "m", "text": "".join(WORDS), "answers": [[4, 5]], "evidence": [[3, 6]], "asked": 6, "question": 5,
        "offsets": [[end - len(word), end] for word, end in zip(WORDS, ends, strict=True)],
    }  # fmt: skip
    return Trace(left, np.array([4, 6, 7], dtype=np.int32), (0, 1), told | about)


def spans(html: str) -> list[tuple[list[str], str]]:
    body = re.search(r'<div class="text"[^>]*>(.*)</div><script', html, re.DOTALL)
    assert body is not None
    found = re.findall(r'<span class="([^"]*)">([^<]*)</span>', body.group(1))
    return [(kind.split(), unescape(text)) for kind, text in found]


def data(html: str) -> dict:
    found = re.search(r'<script type="application/json">(.*?)</script>', html)
    assert found is not None
    return json.loads(found.group(1))


@pytest.mark.parametrize(
    ("held", "heads", "shade"),
    [(0, 8, 0), (1, 8, 1), (7, 8, 7), (8, 8, 8), (1, 1000, 1), (999, 1000, 7), (3, 4, 6), (1, 3, 3)],
)
def test_levels(held, heads, shade):
    assert level(held, heads) == shade


def test_every_token_has_its_shade_and_marks_when_asked():
    kinds = [kind for kind, _ in spans(shaded_text(make()))]
    assert [kind[0] for kind in kinds] == ["s8", "s0", "s6", "s2", "s8", "s8", "u"]
    marks = [set(kind[1:]) for kind in kinds]
    assert marks == [set(), set(), set(), {"e"}, {"a", "af", "al", "e"}, {"e", "q"}, {"g", "gf"}]


def test_the_moment_decides():
    shades = [kind[0] for kind, _ in spans(shaded_text(make(), seen=4))]
    assert shades == ["s8", "s0", "s8", "s6", "u", "u", "u"]
    # The state after the last recorded pass up to there, not one that nobody recorded.
    assert [kind[0] for kind, _ in spans(shaded_text(make(), seen=5))] == shades
    with pytest.raises(DataError, match="the first forward pass was recorded at 4 tokens"):
        shaded_text(make(), seen=3)
    with pytest.raises(DataError, match="1 to 7 tokens read, not at 8"):
        shaded_text(make(), seen=8)


def test_text_is_whole_and_escaped():
    html = shaded_text(make(id="<script>"))
    assert "<b>" not in html
    assert "<script>" not in html.replace("<script type", "")
    assert "".join(text for _, text in spans(html)) == "\u25c7" + "".join(WORDS)


def test_data_for_the_slider_says_when_each_head_let_go():
    trace = make()
    told = data(shaded_text(trace))
    assert (told["seen"], told["start"], told["asked"], told["layers"]) == ([4, 6, 7], 1, 6, [0, 1])
    assert (told["columns"], told["heads"], told["pieces"]) == (4, 4, [1] * 7)
    columns = np.frombuffer(zlib.decompress(base64.b64decode(told["left"])), dtype="<u2").reshape(7, 4)
    for k, seen in enumerate(trace.seen):
        held = (columns > k).reshape(7, 2, 2).transpose(1, 2, 0)
        np.testing.assert_array_equal(held[..., :seen], trace.held(int(seen))[..., :seen])


def test_tokens_of_one_character_share_a_span():
    trace = make(
        text="A\u4f60B", offsets=[[0, 0], [0, 1], [1, 2], [1, 2], [1, 2], [2, 3], [3, 3]], answers=[], evidence=[]
    )
    html = shaded_text(trace)
    assert [text for _, text in spans(html)] == ["\u25c7", "A", "\u4f60", "B", "\u25c7"]
    assert data(html)["pieces"] == [1, 1, 3, 1, 1]
    # 3 + 1 + 4 of 12 pairs of token and head.
    assert spans(html)[2][0][0] == f"s{level(8, 12)}"


def test_long_texts_get_fewer_spans():
    count = 400
    left = np.zeros((1, 2, count), dtype=np.int32)
    left[:, :, 100:300] = count
    about = {"text": "x" * count, "offsets": [[i, i + 1] for i in range(count)], "answers": [[150, 152]]}
    trace = Trace(left, np.array([200, count], dtype=np.int32), (0,), about)
    pieces = data(shaded_text(trace, most_spans=20))["pieces"]
    assert pieces == [100, 50, 2, 148, 100]
    assert [kind[0] for kind, _ in spans(shaded_text(trace, most_spans=20))] == ["s8", "s0", "s0", "s0", "s8"]

    left[0, 0] = np.where(np.arange(count) % 2, count, 0)
    html = shaded_text(trace, most_spans=20)
    assert len(spans(html)) <= 22
    assert sum(data(html)["pieces"]) == count
    assert spans(html)[0][0][0] == f"s{level(3, 4)}"
    assert "shaded together" in html


def test_many_heads_are_ranked_and_what_all_or_none_held_stays_exact(monkeypatch):
    monkeypatch.setattr(shading, "_MOST_NUMBERS", 100)
    rng = np.random.default_rng(0)
    left = rng.choice([0, 20, 30], size=(4, 10, 30)).astype(np.int32)
    left[:, :, 3], left[:, :, 4] = 30, 0
    left[0, 0, 3], left[0, 0, 4] = 0, 20
    about = {"text": "x" * 30, "offsets": [[i, i + 1] for i in range(30)]}
    trace = Trace(left, np.array([20, 30], dtype=np.int32), (0, 1, 2, 3), about)
    html = shaded_text(trace)
    told = data(html)
    assert (told["columns"], told["layers"], told["heads"]) == (17, [], 40)
    columns = np.frombuffer(zlib.decompress(base64.b64decode(told["left"])), dtype="<u2").reshape(30, 17)
    steps = steps_of(trace).reshape(40, 30)
    np.testing.assert_array_equal(columns.max(axis=1), steps.max(axis=0))
    np.testing.assert_array_equal(columns.min(axis=1), steps.min(axis=0))
    assert np.abs((columns > 1).mean(axis=1) - trace.share()).max() < 1 / 16
    assert "rounded" in html
    assert [spans(html)[i][0][0] for i in (3, 4)] == ["s1", "s7"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "record it with text="),
        ({"offsets": None}, "record it with text="),
        ({"offsets": [[0, 1]]}, "must be 7 ranges"),
        ({"offsets": [[0, 99]] * 7}, "within its text of"),
        ({"answers": [[6, 8]]}, "answers of a trace must lie within"),
        ({"question": 7}, "the question of a trace"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    with pytest.raises(DataError, match=message):
        shaded_text(make(**change))


def test_terminal_shows_what_was_read():
    text = shaded_terminal(make())
    assert text.plain == "".join(WORDS[:6])
    styles = {text.plain[one.start : one.end]: str(one.style) for one in text.spans}
    assert styles == {
        "A": "bright_black", " <b>": "blue", " &": "blue underline", " cat": "bold blue reverse underline",
        " sat": "bold blue underline",
    }  # fmt: skip
