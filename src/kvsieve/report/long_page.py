"""A run of long-context tasks as one HTML file: results, pictures and what single texts lost.

The file needs nothing else and asks nothing of the network. It follows the light or dark scheme of the reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..trace import Trace
from .long_page_tables import failures, main_table, run_about, task_table
from .picture_data import answers_held, title
from .plots import has_matplotlib
from .shading import shaded_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["inline_svg", "report_page"]

_TITLES = {"ruler": "Long-context tasks", "longbench": "LongBench", "visualize": "What the cache held"}
_MODES = {
    "query-agnostic": "query-agnostic: the cache was compressed before the question was seen",
    "query-aware": "query-aware: the question was part of what the cache could see when it let tokens go",
}
_HOW = (
    "Every method answered the same samples. <b>Score</b> runs from 0 to 100, higher is better; brackets are bootstrap "
    "intervals. <b>Change</b> is the score minus that of the full cache on the same samples. <b>Cache held</b> is "
    "measured in bytes of stored keys and values, not computed from the budget. <b>Answer held</b> is the share of "
    "heads, over all layers, that still held the whole answer when it was asked for. Wrong answers are counted as "
    "<b>evicted</b> if fewer than half of the heads still held the answer, and as <b>ignored</b> if at least half did."
)
_COLOURS = {"#1c2126": "var(--ink)", "#000000": "var(--ink)", "#59626b": "var(--soft)", "#0072b2": "var(--link)",
            "#d55e00": "var(--answer)", "#fdfdfd": "var(--paper)"}  # fmt: skip


def report_page(
    summary: dict[str, Any],
    traces: Iterable[Trace] = (),
    *,
    pictures: bool = True,
    keep: Callable[[str, Figure], None] | None = None,
) -> str:
    """The page.

    Args:
        summary: of a run, with `run`, `tasks`, `results`, `overall`, `failures` and `notes`.
        traces: recorded texts to show; those without `text` and `offsets` are shown without their text. If `about`
            holds `sink_tokens` or `recent_tokens`, these boundaries are drawn.
        pictures: False, or without matplotlib, the pictures are left out, and the page says so.
        keep: called with a name for a file and every picture that was drawn.

    Raises:
        DataError: a trace whose parts do not fit together.
    """
    run, shown = summary["run"], list(traces)
    head = f"{_TITLES.get(summary['kind'], 'Results')}: {run['model']}"
    draw = _Pictures(pictures, keep)
    parts = [f"<h1>{escape(head)}</h1>", run_about(run, _MODES)]
    if summary["overall"]:
        parts += ["<h2>Results</h2>", main_table(summary), f"<p>{_HOW}</p>"]
    if summary["results"]:
        parts.append(task_table(summary))
    parts.append(_result_pictures(summary, draw))
    if shown:
        parts += ["<h2>What single texts lost</h2>", *(_trace(one, i, draw) for i, one in enumerate(shown))]
    parts += [draw.missing(), failures(summary), _notes(summary["notes"])]
    here = Path(__file__)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(head)}</title><style>\n{here.with_name('page_template.css').read_text(encoding='utf-8')}</style>"
        "</head>\n<body><main>\n"
    )
    script = here.with_name("page_template.js").read_text(encoding="utf-8")
    end = f'\n</main><div id="tip" role="status" hidden></div>\n<script>\n{script}</script></body></html>\n'
    # A lone surrogate, which JSON can hold and UTF-8 cannot, must not lose the page.
    return (page + "\n".join(part for part in parts if part) + end).encode("utf-8", "replace").decode()


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """SVG that can stand next to others in a page: its names made unique, its ink that of the page.

    Args:
        svg: as written by `to_svg`.
        prefix: begins all names in it.
        label: what a screen reader says.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", svg)
    for colour, name in _COLOURS.items():
        svg = re.sub(colour, name, svg, flags=re.IGNORECASE)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


class _Pictures:
    """Draws pictures if it can, and remembers which it could not."""

    def __init__(self, wanted: bool, keep: Callable[[str, Figure], None] | None) -> None:
        self.able, self.keep = wanted and has_matplotlib(), keep
        self.wanted = wanted
        self.left_out: list[str] = []
        self.number = 0

    def draw(self, file: str, name: str, caption: str, make: Callable[[], Figure]) -> str:
        """One picture with its caption; nothing if it cannot be drawn."""
        if not self.able:
            self.left_out.append(name)
            return ""
        from .pictures import to_svg

        self.number += 1
        figure = make()
        if self.keep is not None:
            self.keep(file, figure)
        svg = inline_svg(to_svg(figure, transparent=True), f"p{self.number}", f"{name}. {caption}")
        return (
            f'<figure><div class="wide picture" tabindex="0" role="region" aria-label="{escape(name)}">{svg}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def missing(self) -> str:
        """What the page lacks, and what to do about it."""
        if not self.left_out:
            return ""
        names = ", ".join(dict.fromkeys(self.left_out))
        why = "pictures were not wanted" if not self.wanted else "matplotlib is not installed"
        do = (
            ""
            if not self.wanted
            else " Install it with <code>pip install 'kvsieve[plot]'</code> and write the page again."
        )
        return f'<p class="soft">Left out, as {why}: {escape(names)}.{do}</p>'


def _result_pictures(summary: dict[str, Any], draw: _Pictures) -> str:
    from . import picture_results as results

    parts = []
    scored = [one for one in summary["overall"] if one["score"] is not None and one["bytes_full"]]
    if len(scored) > 1:
        parts.append(
            draw.draw(
                "quality_against_bytes",
                "Quality against memory",
                "Each point is a method: how much of the full cache\u2019s bytes it held, and its score with its "
                "bootstrap interval. The dashed line is the full cache.",
                lambda: results.quality_against_bytes(summary),
            )
        )
    if any(one["by_depth"] for one in summary["results"]):
        parts.append(
            draw.draw(
                "depth_by_length",
                "Depth by length",
                "Number and colour are the score. The bar in a cell is the share of heads that still held the answer: "
                "a low score with a long bar was kept and ignored; in a hatched cell no head held it.",
                lambda: results.depth_by_length(summary),
            )
        )
    if any(one["survival"] and one["survival"]["answerable"] for one in summary["results"]):
        parts.append(
            draw.draw(
                "survival_by_layer",
                "Survival by layer",
                "Share of the heads of each layer that still held the whole answer when it was asked for.",
                lambda: results.survival_by_layer(summary),
            )
        )
    found = "".join(parts)
    return f"<h2>Pictures</h2>{found}" if found else ""


def _trace(trace: Trace, index: int, draw: _Pictures) -> str:
    name = title(trace)
    from . import pictures

    parts = [_verdict(trace)]
    try:
        parts.append(shaded_text(trace))
    except DataError:
        if trace.about.get("text") is not None and trace.about.get("offsets") is not None:
            raise
        parts.append('<p class="soft">The text of this sample was not recorded.</p>')
    sink, recent = trace.about.get("sink_tokens"), trace.about.get("recent_tokens")
    parts.append(
        draw.draw(
            f"layers_{index}_{trace.about.get('method')}",
            f"What each layer held: {name}",
            "Original positions from left to right, layers from the bottom up, when the answer was asked for.",
            lambda: pictures.layers_by_positions(trace, sink_tokens=sink, recent_tokens=recent),
        )
    )
    parts.append(
        draw.draw(
            f"lifetime_{index}_{trace.about.get('method')}",
            f"Lifetime: {name}",
            "From left to right the text is read; each row is a position, and its colour the share of heads that held "
            "it after each recorded forward pass.",
            lambda: pictures.lifetime(trace),
        )
    )
    score = trace.about.get("score")
    tail = "" if score is None else f' <span class="soft">score {100 * float(score):.0f}</span>'
    return f"<details{' open' * (not index)}><summary><b>{escape(name)}</b>{tail}</summary>{''.join(parts)}</details>"


def _verdict(trace: Trace) -> str:
    """Was the answer held, and was it given?"""
    about, found = trace.about, answers_held(trace)
    lines = []
    expected, said = about.get("expected"), about.get("answer")
    if expected:
        wanted = [str(one) for one in expected] if isinstance(expected, (list, tuple)) else [str(expected)]
        lines.append(
            f"Expected {_quoted(wanted)}" + (f", said {_quoted([str(said)])}" if said is not None else "") + "."
        )
    for (first, _), held, heads in found[:5]:
        gone = "was gone from every head" if not held else f"was held whole by {held} of {heads} heads"
        lines.append(f"The answer at position {first:,} {gone} when it was asked for.")
    if len(found) > 5:
        lines.append(f"There are {len(found) - 5} more places with the answer.")
    score = about.get("score")
    if score is not None and float(score) < 1 and len(found) == 1:
        _, held, heads = found[0]
        lines.append("This counts as evicted." if 2 * held < heads else "This counts as ignored.")
    if not lines:
        return ""
    bad = " bad" * (score is not None and float(score) < 1)
    return f'<p class="verdict{bad}">{" ".join(lines)}</p>'


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"\u201c{escape(word.strip())}\u201d" for word in words)


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<h2>Notes</h2><ul class="notes">{items}</ul>' if items else ""
