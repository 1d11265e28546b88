"""The page of a run: complete, self-contained, escaped, usable without matplotlib."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from kvsieve.errors import DataError
from kvsieve.report import long_page
from kvsieve.report.long_page import inline_svg, report_page
from kvsieve.trace import Trace

VOID = {"meta", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that tags close in order; collects names, links and the words of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.values: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href") and value]
        if tag == "tr":
            self.rows.append([])
            self.values.append([])
        if tag in ("th", "td") and self.rows:
            self.rows[-1].append("")
            self.values[-1].append(given.get("data-value"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if ("td" in self.open or "th" in self.open) and self.rows:
            self.rows[-1][-1] += text


def method(name: str, score: float | None, held: int, **other):
    return {
        "method": name, "policy": name, "budget": "" if name == "full" else "0.25", "score": score,
        "interval": None if score is None else [score - 5, score + 5], "delta": None if name == "full" else -50.0,
        "delta_interval": None if name == "full" else [-60.0, -40.0], "kept_share": held / 2**21, "tokens_kept": 1000.4,
        "bytes_held": held, "bytes_full": 2**21, "survival": 0.125, "wrong_evicted": 3, "wrong_held": 1, "samples": 9,
        "failed": 0, "seconds": 1.25,
    } | other  # fmt: skip


def result(name: str, score: float):
    cells = [{"depth": depth, "score": score, "survival": 0.5, "samples": 1} for depth in (0.0, 1.0)]
    survival = {"answerable": 2, "held": 1, "share": 0.5, "by_layer": [0.5, 0.5], "wrong_evicted": 1, "wrong_held": 0}
    return method(name, score, 2**20) | {"task": "needle", "length": 512, "by_depth": cells, "survival": survival}


@pytest.fixture
def summary():
    run = {
        "command": "kvsieve ruler --x '<i>'", "model": "mini-lm", "dtype": "float32", "device": "cpu", "seed": 42,
        "hardware": {"device": "cpu", "cpus": 2, "machine": "x86_64", "threads": 1}, "versions": {"kvsieve": "0.1.0"},
        "mode": "query-agnostic", "chunk_size": 64, "profile": None, "max_length": 2048,
    }  # fmt: skip
    overall = [method("full", 90.0, 2**21), method("snapkv", 40.0, 2**19), method("h<2>o", None, 2**18, failed=9)]
    return {
        "format": 1, "kind": "ruler", "run": run, "tasks": [{"name": "needle", "metric": "first_word", "samples": 9}],
        "results": [result("full", 90.0), result("snapkv", 40.0)], "overall": overall,
        "failures": [{"method": "h<2>o", "task": "needle", "id": "needle-1", "error": "ScoreError: <nan>"}],
        "notes": ["a <note>"],
    }  # fmt: skip


@pytest.fixture
def trace():
    left = np.zeros((2, 2, 6), dtype=np.int32)
    left[:, :, 1:3] = 5
    left[0, 0, 2] = 0
    about = {
        "method": "snapkv", "budget": "0.25", "id": "needle-512-0", "text": "a<b>c&", "expected": ["b"], "answer": " x",
        "score": 0.0,
        "offsets": [[i, i + 1] for i in range(6)], "answers": [[2, 3]], "evidence": [[1, 4]], "asked": 5, "question": 4,
        "sink_tokens": 1, "recent_tokens": 2,
    }  # fmt: skip
    return Trace(left, np.array([3, 5, 6], dtype=np.int32), (0, 1), about)


def test_page_asks_nothing_of_the_network_and_is_well_formed(summary, trace):
    text = report_page(summary, [trace, trace])
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"<!DOCTYPE[^>]*>", "", text))
    assert "default-src 'none'" in text
    assert "prefers-color-scheme:dark" in text
    for raw in ("<i>", "<b>c", "h<2>o", "<nan>", "a <note>"):
        assert raw not in text
    assert all(given.get("aria-label") for tag, given in page.tags if tag == "svg")
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 2 * 2
    assert "sink: first 1" in text
    assert "recent: last 2" in text


def test_table_has_the_full_cache_first_and_numbers_to_sort_by(summary):
    page = Page(report_page(summary, pictures=False))
    head, full, snapkv, broken = page.rows[:4]
    assert [name.strip() for name in head[:4]] == ["method", "score", "change", "cache held"]
    assert "failed" in head
    assert full[:4] == ["full cache", "90.0[85.0 to 95.0]", "\u2013", "100.0 %2.00 MiB"]
    assert snapkv[:3] == ["snapkv 0.25", "40.0[35.0 to 45.0]", "\u221250.0[\u221260.0 to \u221240.0]"]
    assert snapkv[3] == "25.0 %512.0 KiB"
    assert page.values[2][1:4] == ["40", "-50", "0.25"]
    assert page.values[3][1] == ""
    assert broken[0] == "h<2>o 0.25"
    assert "samples" not in [name.strip() for name in head]
    text = report_page(summary, pictures=False)
    assert "All tasks and lengths together; 9 samples for every method" in text
    assert text.index('<tbody class="first">') < text.index("snapkv 0.25")
    assert ["needle", "needle-1", "ScoreError: <nan>"] in [row[1:] for row in page.rows]


def test_it_says_what_was_run(summary):
    text = report_page(summary, pictures=False)
    for part in (
        "kvsieve ruler --x &#x27;&lt;i&gt;&#x27;",
        "before the question was seen",
        "2,048 tokens",
        "1 thread<",
        "kvsieve 0.1.0",
    ):
        assert part in text
    assert "profile" not in text


def test_a_trace_says_what_became_of_the_answer(summary, trace):
    text = report_page(summary, [trace], pictures=False)
    assert "Expected \u201cb\u201d, said \u201cx\u201d." in text
    assert "at position 2 was held whole by 1 of 4 heads when it was asked for. This counts as evicted." in text
    trace.left[0, 1, 2] = 0
    assert "held whole by 2 of 4 heads when it was asked for. This counts as ignored." in report_page(
        summary, [trace], pictures=False
    )
    trace.left[:, :, 2] = 5
    assert "was gone from every head" in report_page(summary, [trace], pictures=False)


def test_without_matplotlib_it_says_what_is_missing(summary, trace, monkeypatch):
    monkeypatch.setattr(long_page, "has_matplotlib", lambda: False)
    text = report_page(summary, [trace])
    Page(text)
    assert "<svg" not in text
    assert "Quality against memory, Depth by length, Survival by layer" in text
    assert "pip install &#x27;kvsieve[plot]&#x27;" in text or "pip install 'kvsieve[plot]'" in text
    assert 'class="s1' in text or 'class="s2' in text


def test_a_run_without_results_is_traces_alone(summary, trace):
    quiet = summary | {"kind": "visualize", "overall": [], "results": [], "failures": [], "notes": []}
    text = report_page(quiet, [trace])
    page = Page(text)
    assert not page.rows
    assert "<h2>Results" not in text
    assert [given["aria-label"][:8] for tag, given in page.tags if tag == "svg"] == ["What eac", "Lifetime"]
    assert text == report_page(quiet, [trace])


def test_a_trace_without_text_is_shown_without_it_and_a_wrong_one_is_refused(summary, trace):
    bare = Trace(trace.left, trace.seen, trace.layers, {"method": "m"})
    text = report_page(summary, [bare], pictures=False)
    assert "was not recorded" in text
    wrong = Trace(trace.left, trace.seen, trace.layers, {"text": "abc", "offsets": [[0, 1]]})
    with pytest.raises(DataError, match="must be 6 ranges"):
        report_page(summary, [wrong], pictures=False)


def test_svg_names_are_made_unique():
    svg = '<?xml?><svg><defs><path id="a"/></defs><use xlink:href="#a"/><g clip-path="url(#a)" style="fill: #1C2126"/>'
    assert inline_svg(svg + "</svg>", "p1", 'x"y') == (
        '<svg role="img" aria-label="x&quot;y"><defs><path id="p1-a"/></defs><use xlink:href="#p1-a"/>'
        '<g clip-path="url(#p1-a)" style="fill: var(--ink)"/></svg>'
    )
