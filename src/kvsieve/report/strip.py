"""What a cache held as lines of block characters, for a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..trace import Trace
from .picture_data import answers_held, bin_edges, binned, layer_shares, moment, question, ranges, title

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["strip", "strip_lines"]

_BLOCKS, _ASCII = " ░▒▓█", " .:=#"
_NARROWEST = 8


def strip_lines(
    trace: Trace, *, width: int = 80, seen: int | None = None, layers: bool = True, ascii_only: bool | None = None
) -> list[str]:
    """Lines of at most `width` characters: one per layer (the first layer at the bottom), then a line of marks.

    A character stands for neighbouring positions: full only if every head held all of them, empty only if none held
    any, and three shades between.

    Args:
        trace: what was recorded.
        width: characters of a line, names included.
        seen: tokens read at the moment to show; by default when the answer was asked for.
        layers: False: one line for all layers together.
        ascii_only: by default where standard output cannot show block characters.

    Raises:
        DataError: a `width` without room, or `seen` out of range.
    """
    at = moment(trace, seen)
    shares = layer_shares(trace, at)
    names = [f"layer {i}" for i in trace.layers]
    if not layers:
        shares, names = shares.mean(axis=0, keepdims=True), ["all layers"]
    names = [name.rjust(max(map(len, names))) for name in names]
    room = width - len(names[0]) - len(" |") - len("| 100%")
    if room < _NARROWEST:
        raise DataError(f"a strip needs a width of {width - room + _NARROWEST} characters or more, not {width}")
    plain = not _can_show() if ascii_only is None else ascii_only
    characters, side = (_ASCII, "|") if plain else (_BLOCKS, "│")
    columns = min(room, at)
    lines = [_clip(f"{title(trace)}: {at:,} of {trace.tokens:,} tokens read, {shares.mean():.0%} held", width, plain)]
    for name, row in reversed(list(zip(names, shares, strict=True))):
        drawn = "".join(characters[level] for level in _levels(row, columns))
        lines.append(f"{name} {side}{drawn}{side} {row.mean():4.0%}")
    indent = " " * (len(names[0]) + 2)
    marks = _marks(trace, at, columns, "^" if plain else "▲")
    if marks.strip():
        lines.append(indent + marks.rstrip())
        lines += [
            indent + _clip(line, width - len(indent), plain) for line in _legend(trace, at, "^" if plain else "▲")
        ]
    return lines


def strip(
    trace: Trace, *, width: int = 80, seen: int | None = None, layers: bool = True, ascii_only: bool | None = None
) -> Text:
    """`strip_lines` for `rich`: what is held in blue, the answer in orange; nothing depends on the colours."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    for i, line in enumerate(strip_lines(trace, width=width, seen=seen, layers=layers, ascii_only=ascii_only)):
        one = Text(line + "\n", style="bold" if not i else "")
        start = line.find("│") if "│" in line else line.find("|")
        if i and line.rstrip().endswith("%"):
            one.stylize("#56b4e9", start + 1, len(line) - 6)
        elif i:
            one.stylize("#e69f00")
        text.append(one)
    text.rstrip()
    return text


def _levels(row: NDArray[np.float64], columns: int) -> list[int]:
    """From 0, none held, to 4, all held; the others in thirds."""
    shares = binned(row, columns)
    between = np.clip(np.ceil(shares * 3 - 1e-9), 1, 3)
    full = binned((row < 1).astype(np.float64), columns) == 0
    return [int(i) for i in np.where(full, 4, np.where(shares == 0, 0, between))]


def _marks(trace: Trace, at: int, columns: int, answer: str) -> str:
    edges = bin_edges(at, columns)
    line = [" "] * columns
    asks = question(trace)
    if asks is not None and asks < at:
        line[int(np.searchsorted(edges, asks, side="right")) - 1] = "?"
    for first, end in ranges(trace, "answers"):
        if first < at:
            low, high = np.searchsorted(edges, [first, min(end, at) - 1], side="right") - 1
            line[low : high + 1] = answer * int(high - low + 1)
    return "".join(line)


def _legend(trace: Trace, at: int, answer: str) -> list[str]:
    told = [
        f"{answer} answer at {first:,}: held whole by {held} of {heads} heads"
        for (first, _), held, heads in answers_held(trace, at)
    ]
    asks = question(trace)
    if asks is not None and asks < at:
        told.append(f"? question from {asks:,}")
    return told if len(told) <= 6 else [*told[:5], f"and {len(told) - 5} more"]


def _clip(line: str, width: int, plain: bool) -> str:
    dots = "..." if plain else "…"
    return line if len(line) <= width else line[: width - len(dots)] + dots


def _can_show() -> bool:
    try:
        (_BLOCKS + "│▲…").encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
