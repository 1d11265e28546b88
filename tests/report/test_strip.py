"""The strip for a terminal."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from kvsieve.errors import DataError
from kvsieve.report.strip import strip, strip_lines
from kvsieve.trace import Trace


def make(tokens: int = 12, **about) -> Trace:
    """Layer 0 holds the last half, in layer 5 one of three heads holds the first third and all the last third."""
    left = np.full((2, 3, tokens), tokens, dtype=np.int32)
    left[0, :, tokens // 2 :] = 0
    left[1, 0, : tokens // 3] = 0
    left[1, :, -(tokens // 3) :] = 0
    return Trace(left, np.array([tokens // 2, tokens], dtype=np.int32), (0, 5), {"method": "m", **about})


def test_one_line_per_layer_first_layer_last():
    lines = strip_lines(make(answers=[[8, 10]], question=11), ascii_only=False, width=60)
    assert lines[0] == "m: 12 of 12 tokens read, 47% held"
    assert lines[1] == "layer 5 \u2502\u2591\u2591\u2591\u2591    \u2588\u2588\u2588\u2588\u2502  44%"
    assert lines[2] == "layer 0 \u2502      \u2588\u2588\u2588\u2588\u2588\u2588\u2502  50%"
    assert lines[3] == "                 \u25b2\u25b2 ?"
    assert [line.strip() for line in lines[4:]] == [
        "\u25b2 answer at 8: held whole by 6 of 6 heads",
        "? question from 11",
    ]


def test_ascii_and_all_layers_in_one():
    lines = strip_lines(make(), ascii_only=True, layers=False)
    assert all(line.isascii() for line in lines)
    assert lines[1:] == ["all layers |....  ::####|  47%"]


def test_a_bin_is_full_or_empty_only_if_all_of_it_is():
    trace = make(1200)
    trace.left[0, :, :] = 1200
    trace.left[0, 0, 5] = 0
    trace.left[1, :, :] = 0
    trace.left[1, 2, 7] = 1200
    first, second = (line.split("|")[1] for line in strip_lines(trace, ascii_only=True, width=30)[1:3])
    assert first == "=" + "#" * (len(first) - 1)
    assert second == "." + " " * (len(second) - 1)


@pytest.mark.parametrize("width", [40, 63, 120])
def test_no_line_is_too_wide(width):
    trace = make(1000, id="n" * 200, answers=[[3, 600], [700, 705]], question=990)
    assert max(map(len, strip_lines(trace, width=width, ascii_only=False))) <= width
    with pytest.raises(DataError, match="width of 23 characters or more, not 10"):
        strip_lines(trace, width=10, ascii_only=True)


def test_falls_back_where_the_encoding_has_no_blocks(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert "".join(strip_lines(make())).isascii()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert not "".join(strip_lines(make())).isascii()


def test_colours_change_no_character():
    trace = make(answers=[[8, 10]])
    text = strip(trace, width=50, ascii_only=False)
    assert text.plain.splitlines() == strip_lines(trace, width=50, ascii_only=False)
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=50).print(text)
    assert "\x1b[" in out.getvalue()
