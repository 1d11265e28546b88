"""The text that a cache read, shaded by what the cache held of it: a part of an HTML page, and for a terminal."""

from __future__ import annotations

import base64
import json
import zlib
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..trace import Trace
from .picture_data import bin_edges, moment, question, ranges, steps_of, title

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["LEVELS", "MOST_SPANS", "level", "shaded_terminal", "shaded_text"]

LEVELS = 8
"""Shades: 0 is held by no head, 8 by every head, 1 to 7 are the eighths between."""
MOST_SPANS = 20_000
"""Pieces of text that are shaded by themselves; in a longer text neighbours share a piece."""
_MOST_NUMBERS = 4_000_000
"""Beyond this a page holds for each token when 17 heads let it go: the first, the last, and between them in equal steps
of rank. So what all or none held stays exact."""
_RANKS = 17
_SPECIAL = "\u25c7"


def level(held: int, heads: int) -> int:
    """The shade, 0 to `LEVELS`, of a token that `held` of `heads` heads hold."""
    if held <= 0 or held >= heads:
        return LEVELS if held > 0 else 0
    return min(LEVELS - 1, -(-LEVELS * held // heads))


def shaded_text(trace: Trace, *, seen: int | None = None, most_spans: int = MOST_SPANS) -> str:
    """A `<figure>` with the text, a slider over the recorded forward passes and a legend.

    Every token is a `<span>`; its class `s0` to `s8` is the share of the heads of all layers that held it (see
    `level`), `u` that it was not read yet. Answer tokens are `a`, evidence is `e`, what the model said is `g`. It
    needs the style and script of `page_template.css` and `page_template.js`; without the script it shows one moment.

    Args:
        trace: recorded with `text` and `offsets`.
        seen: tokens read at the moment that is shown first; by default when the answer was asked for. The last
            recorded forward pass up to there is taken.
        most_spans: with more tokens, neighbours that every head let go at the same time become one piece; where that
            is not enough, a piece is a fixed number of neighbours, shaded by their mean.

    Raises:
        DataError: the trace has no text, parts that do not fit together, or nothing recorded up to `seen`.
    """
    at = moment(trace, seen)
    pieces = _pieces(trace, most_spans)
    start = int(np.searchsorted(trace.seen, at, side="right")) - 1
    if start < 0:
        raise DataError(f"the first forward pass was recorded at {int(trace.seen[0])} tokens, after {at}")
    shown = int(trace.seen[start])
    columns, layers = _columns(trace)
    held = (columns > start).sum(axis=1)
    body, cursor, text = [], 0, str(trace.about["text"])
    offsets = trace.about["offsets"]
    marks = _classes(trace)
    edges = {name: {r[i] - i for r in ranges(trace, "answers")} for i, name in enumerate(("af", "al"))}
    for first, end in pairwise(pieces):
        read = min(end, shown) - first
        kind = f"s{level(int(held[first : first + read].sum()), read * columns.shape[1])}" if read > 0 else "u"
        names = [kind, *marks[first]]
        names += [name for name, places in edges.items() if (first if name == "af" else end - 1) in places]
        low, high = min(o[0] for o in offsets[first:end]), max(o[1] for o in offsets[first:end])
        if high > low:
            body.append(escape(text[cursor:low]))
            inner = escape(text[max(cursor, low) : high])
            cursor = max(cursor, high)
        else:
            inner = _SPECIAL
        body.append(f'<span class="{" ".join(names)}">{inner}</span>')
    body.append(escape(text[cursor:]))
    width = 2 if len(trace.seen) < 2**16 else 4
    data = {
        "seen": trace.seen.tolist(), "start": start, "asked": trace.about.get("asked"), "columns": columns.shape[1],
        "heads": trace.left.shape[0] * trace.left.shape[1], "layers": layers, "pieces": np.diff(pieces).tolist(),
        "bytes": width, "left": base64.b64encode(zlib.compress(columns.astype(f"<u{width}").tobytes(), 9)).decode(),
    }  # fmt: skip
    name, told = escape(title(trace)), []
    if len(body) - 1 < trace.tokens // 2:
        told.append("Neighbouring tokens are shaded together, by their mean.")
    if not layers:
        told.append("Shares between none and all are rounded.")
    about = f"<figcaption>{' '.join(told)}</figcaption>" if told else ""
    return (
        f'<figure class="shaded" aria-label="The text, shaded by what the cache held: {name}">{_slider(trace, start)}'
        f"{_legend(trace)}"
        f'<div class="text" tabindex="0" role="group" aria-label="Text of {trace.tokens:,} tokens; arrow keys go from '
        f'token to token">{"".join(body)}</div>'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>{about}</figure>'
    )


def shaded_terminal(trace: Trace, *, seen: int | None = None) -> Text:
    """The text for `rich`: bold blue is held by every head, blue by some, grey by none; the answer is reversed.

    Raises:
        DataError: as `shaded_text`.
    """
    from rich.text import Text

    at = moment(trace, seen)
    pieces = _pieces(trace, trace.tokens + 1)
    held, heads = trace.held(at).sum(axis=(0, 1)), trace.left.shape[0] * trace.left.shape[1]
    text, cursor, marks = Text(), 0, _classes(trace)
    words = str(trace.about["text"])
    for first, end in pairwise(pieces):
        low, high = trace.about["offsets"][first][0], max(o[1] for o in trace.about["offsets"][first:end])
        if high <= low or first >= at:
            continue
        shade = level(int(held[first:end].sum()), heads * (end - first))
        style = "bright_black" if not shade else "bold blue" if shade == LEVELS else "blue"
        style += " reverse" * ("a" in marks[first]) + " underline" * ("e" in marks[first])
        text.append(words[cursor:low])
        text.append(words[max(cursor, low) : high], style=style)
        cursor = max(cursor, high)
    return text


def _pieces(trace: Trace, most: int) -> list[int]:
    """Where pieces begin, and the end. A token that has no characters of its own belongs to the piece before it."""
    text, offsets = trace.about.get("text"), trace.about.get("offsets")
    if not isinstance(text, str) or offsets is None:
        raise DataError("this trace has no text: record it with text=... and offsets=... to see the text shaded")
    if len(offsets) != trace.tokens or any(not 0 <= a <= b <= len(text) for a, b in offsets):
        raise DataError(f"offsets of a trace must be {trace.tokens} ranges within its text of {len(text)} characters")
    ends = np.maximum.accumulate(np.array([0] + [b for _, b in offsets]))[:-1]
    starts = np.array([b > end or a == b for (a, b), end in zip(offsets, ends, strict=True)])
    starts[0] = True
    if starts.sum() > most:
        changed = np.zeros_like(starts)
        changed[1:] = (trace.left[..., 1:] != trace.left[..., :-1]).any(axis=(0, 1))
        marks = _classes(trace)
        edge = np.array([not i or marks[i] != marks[i - 1] for i in range(trace.tokens)])
        grouped = starts & (changed | edge)
        if grouped.sum() > most:
            regular = np.zeros_like(starts)
            regular[bin_edges(trace.tokens, most)[:-1]] = True
            grouped = starts & (regular | edge)
        starts = grouped
    return [*np.flatnonzero(starts).tolist(), trace.tokens]


def _classes(trace: Trace) -> list[tuple[str, ...]]:
    """The marks of every token, whatever the cache held."""
    names: list[list[str]] = [[] for _ in range(trace.tokens)]
    for name, kind in (("answers", "a"), ("evidence", "e")):
        for i in sorted({i for first, end in ranges(trace, name) for i in range(first, end)}):
            names[i].append(kind)
    asks = question(trace)
    if asks is not None:
        names[asks].append("q")
    said = moment(trace)
    for i in range(said, trace.tokens):
        names[i].append("g")
    if said < trace.tokens:
        names[said].append("gf")
    return [tuple(one) for one in names]


def _columns(trace: Trace) -> tuple[NDArray[np.int32], list[int]]:
    """`[S, columns]`: steps without the token, one column per head, layers outermost, and the layers' numbers.

    If that is too much for a page: the heads of `_RANKS` ranks, and no layers.
    """
    steps = steps_of(trace).transpose(2, 0, 1)
    steps = steps.reshape(len(steps), -1)
    if steps.size <= _MOST_NUMBERS:
        return steps, list(trace.layers)
    ranks = np.arange(_RANKS) * (steps.shape[1] - 1) // (_RANKS - 1)
    return np.sort(steps, axis=1)[:, ranks], []


def _slider(trace: Trace, start: int) -> str:
    asked = trace.about.get("asked")
    button = "" if asked is None else '<button type="button">when asked</button>'
    return (
        '<div class="moment"><label>tokens read <input type="range" min="0" '
        f'max="{len(trace.seen) - 1}" value="{start}" step="1" disabled></label>'
        f"<output>{int(trace.seen[start]):,} of {trace.tokens:,}</output>{button}</div>"
    )


def _legend(trace: Trace) -> str:
    told = "".join(f'<span class="s{i}">{"" if i else "none"}{"all" * (i == LEVELS)}</span>' for i in range(LEVELS + 1))
    parts = [f'<span class="ramp">{told}</span> heads that hold it']
    names = {"answers": '<span class="a af al">answer</span>', "evidence": '<span class="e">evidence</span>'}
    parts += [shown for name, shown in names.items() if ranges(trace, name)]
    parts.append('<span class="u">not read yet</span>')
    items = "".join(f"<li>{part}</li>" for part in parts)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'
