"""The timeline says of every line what it was worth, and the picture and the page show all of it."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from kvsieve.dialogue import RunnerNumbers, Summary, Utterance, VideoPrediction, metrics_table
from kvsieve.dialogue.page import write_timeline_page
from kvsieve.dialogue.timeline import LOOKS, captions, draw_timeline, make_timeline, place_labels, thumbnails
from kvsieve.errors import DataError, KvsieveError

REFERENCES = (
    Utterance(14.0, "all finished", 28),
    Utterance(2.0, "take the red bar", 4),
    Utterance(6.0, "now the blue ring", 12),
    Utterance(11.0, "turn it over", 22),
)
NASTY = "<script>alert('$x^2$ & \"more\"')</script>"
EVENT = {
    "kind": "compression", "frame_idx_in_stream": 20, "timestamp_in_stream": 10.0, "strategy": "drop_middle",
    "tokens_before": 180, "tokens_after": 93, "bytes_before": 368640, "bytes_after": 190464, "seconds": 0.0012,
}  # fmt: skip
VIDEO = VideoPrediction(
    "toy-7",
    fps=2.0,
    frames=32,
    spoken=(
        Utterance(2.5, "take the red bar", 5),
        Utterance(6.0, NASTY, 12),
        Utterance(8.8, "hello there", 17),
        Utterance(14.0, "all finished", 28),
    ),
    references=REFERENCES,
    summaries=(Summary(10.0, 20, "red <b>bar</b> is in", "sum up"),),
    events=(EVENT, {"kind": "other", "text": "of no size"}),
    cache_tokens=tuple([80 + 5 * i for i in range(20)] + [93 + 5 * i for i in range(12)]),
)
QUIET = replace(VIDEO, spoken=(), summaries=(), events=(), cache_tokens=())
FAILED = VideoPrediction("toy-7", 2.0, 0, status="failed", error="out of <memory>")
ALL = {"drop_middle": VIDEO, "quiet": QUIET, "snapkv": FAILED}
FRAMES = np.random.default_rng(0).integers(0, 255, (32, 12, 16, 3), np.uint8)


def many(strategies: int, frames: int) -> dict[str, VideoPrediction]:
    """A long video with a reference at every tenth frame; every third line is wrong."""
    wanted = tuple(Utterance(i / 2, f"step {i} of the long list is done", i) for i in range(5, frames, 10))
    said = tuple(replace(one, text="no" if i % 3 == 0 else one.text) for i, one in enumerate(wanted))
    tokens = tuple(50 + i % 100 for i in range(frames))
    events = tuple(
        {"timestamp_in_stream": i / 2, "tokens_before": 150, "tokens_after": 50} for i in range(100, frames, 100)
    )
    video = VideoPrediction("long", 2.0, frames, said, wanted, events=events, cache_tokens=tokens)
    return {f"strategy_{i}": video for i in range(strategies)}


def test_every_line_has_its_verdict() -> None:
    timeline = make_timeline(ALL)
    band, quiet, failed = timeline.bands
    assert [one.text for one in timeline.references] == [REFERENCES[i].text for i in (1, 2, 3, 0)], "by time"
    assert [(one.time, one.verdict, one.reference, one.delta, one.tokens) for one in band.marks] == [
        (2.5, "matched", 0, 0.5, 105),
        (6.0, "mismatched", 1, 0.0, 140),
        (8.8, "mismatched", 2, pytest.approx(-2.2), 165),
        (14.0, "matched", 3, 0.0, 133),
    ]
    assert band.counts == "2 matched, 2 mismatched, 0 redundant, 0 missed"
    assert band.score is not None
    assert (band.score.matched, band.score.redundant, band.score.missed) == (2, 2, 2), "the metrics count both sides"
    assert [(one.verdict, one.reference, one.text) for one in quiet.marks] == [
        ("missed", i, one.text) for i, one in enumerate(timeline.references)
    ]
    assert (failed.score, failed.marks, failed.error) == (None, (), "failed: out of <memory>")
    assert (timeline.start, timeline.begin, timeline.end) == (0.0, 0.0, 16.0)


def test_window_similarity_and_threshold_decide() -> None:
    narrow = make_timeline({"a": VIDEO}, window=0.25).bands[0]
    assert [one.verdict for one in narrow.marks] == [
        "missed", "redundant", "mismatched", "redundant", "missed", "matched",
    ]  # fmt: skip
    assert make_timeline({"a": VIDEO}, threshold=0).bands[0].counts.startswith("4 matched")
    assert make_timeline({"a": VIDEO}, similarity=lambda said, wanted: 0.0).bands[0].counts.startswith("0 matched, 4")
    with_set = {"a": replace(VIDEO, dataset="assembly101", spoken=(Utterance(10.2, "all finished", 20),))}
    assert make_timeline(with_set).bands[0].counts == "1 matched, 0 mismatched, 0 redundant, 3 missed"


def test_one_line_to_one_reference() -> None:
    twice = replace(VIDEO, spoken=(Utterance(2.0, "what", 4), Utterance(2.5, "so", 5), Utterance(3.0, "red bar", 6)))
    marks = [one for one in make_timeline({"a": twice}).bands[0].marks if one.verdict != "missed"]
    assert [one.verdict for one in marks] == ["redundant", "redundant", "matched"]
    assert marks[0].reference is None


def test_cache_sizes_and_drops() -> None:
    timeline = make_timeline(ALL)
    assert timeline.bands[0].cache[:2] == ((0.0, 80), (0.5, 85))
    assert timeline.bands[0].drops == ((10.0, 180, 93),), "an event without sizes is no drop"
    without_time = replace(VIDEO, events=({**EVENT, "timestamp_in_stream": None},))
    assert make_timeline({"a": without_time}).bands[0].drops == ((10.0, 180, 93),)
    assert timeline.tops() == [180, 180, 180]
    assert timeline.tops(200) == [200, 200, 200]
    large = replace(VIDEO, cache_tokens=(9000,) * 32)
    assert make_timeline({"full": large, "a": VIDEO, "b": QUIET}).tops(170) == [9000, 180, 180]


def test_a_clip_begins_where_its_first_frame_is() -> None:
    later = [Utterance(one.time + 100, one.text, one.frame) for one in VIDEO.spoken[:2]]
    clip = replace(
        VIDEO, spoken=tuple(later), references=tuple(replace(one, time=one.time + 100.3) for one in REFERENCES),
        events=(), summaries=(),
    )  # fmt: skip
    assert make_timeline({"a": clip}).start == 100.0
    silent = make_timeline({"a": replace(clip, spoken=())})
    assert silent.start == 100.0, "a reference lies anywhere within its frame"
    assert silent.bands[0].cache[0] == (100.0, 80)
    assert make_timeline({"a": replace(VIDEO, spoken=(), references=(), summaries=(), events=())}).start == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "toy-7/1"}, "a and b are not about the same video: key is 'toy-7' and 'toy-7/1'"),
        ({"fps": 4.0}, "fps is 2.0 and 4.0"),
        ({"frames": 30}, "frames is 32 and 30"),
        ({"references": REFERENCES[:3]}, "references differ"),
    ],
)
def test_other_videos_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    videos = {"a": VIDEO, "b": replace(VIDEO, **change)}
    for write in (draw_timeline, write_timeline_page):
        with pytest.raises(DataError, match=message):
            write(videos, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no video was given"):
        make_timeline({})
    with pytest.raises(DataError, match="fps must be above 0"):
        make_timeline({"a": replace(VIDEO, fps=0.0)})
    with pytest.raises(DataError, match=r"drawn as \.png or \.svg"):
        draw_timeline(ALL, tmp_path / "a.pdf")
    for frames in ([], FRAMES.astype(float), FRAMES[..., 0]):
        for write in (draw_timeline, write_timeline_page):
            with pytest.raises(DataError, match="frames must be uint8"):
                write(ALL, tmp_path / "a.png", frames=frames)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(KvsieveError, match=r"kvsieve\[plot\]"):
        draw_timeline(ALL, tmp_path / "a.png")
    assert write_timeline_page(ALL, tmp_path / "a.html", frames=FRAMES).exists()


def test_captions_get_shorter() -> None:
    assert captions("a\n b", 3) == ["3: a b", "3"]
    assert captions("a") == ["a"]
    ways = captions("word " * 30, 12)
    assert [len(way) for way in ways] == sorted((len(way) for way in ways), reverse=True)
    assert ways[0].endswith("\u2026")
    assert ways[-1] == "12"


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_labels_never_overlap(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    items = [
        (float(at), captions("word " * int(rng.integers(1, 20)), i)) for i, at in enumerate(rng.uniform(0, 500, 60))
    ]
    placed = place_labels(items, range(60)[::-1], lanes, 500, lambda text: 3.0 * len(text), 4)
    assert len(placed) >= 5 * lanes
    boxes = [(lane, left, left + 3 * len(text), items[i][0]) for i, (text, left, lane) in placed.items()]
    for i, (lane, left, right, stem) in enumerate(boxes):
        assert 0 <= left < right <= 500
        for other, a, b, _ in boxes[:i] + boxes[i + 1 :]:
            assert other != lane or right + 4 <= a or b + 4 <= left
            assert other >= lane or not a - 4 < stem < b + 4, "no stem runs through a text"


def test_what_is_wrong_gets_room_first() -> None:
    items, order = make_timeline(ALL).bands[0].captions()
    assert [items[i][1][-1] for i in order] == ["3", "2", "4", "1"]


def test_thumbnails_stand_at_their_times() -> None:
    timeline = make_timeline(ALL)
    shown = thumbnails(timeline, FRAMES, 10.0, 12.0)
    assert len(shown) == 9, "16 s at 10 a second hold nine pictures of 16"
    for left, right, picture in shown:
        assert right - left == pytest.approx(1.6)
        assert np.array_equal(picture, FRAMES[int((left + right) / 2 * 2)])
    assert all(one[1] < other[0] for one, other in pairwise(shown))
    assert len(thumbnails(timeline, FRAMES[:1], 10.0, 12.0)) == 1


def test_picture_shows_every_verdict(tmp_path: Path) -> None:
    file = draw_timeline(ALL, tmp_path / "deep" / "a.png", frames=FRAMES, max_seq_len=180)
    assert [one.name for one in file.parent.iterdir()] == ["a.png"]
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1680
    for verdict in ("matched", "mismatched", "redundant"):
        colour = [int(LOOKS[verdict][0][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - colour).sum(-1) == 0).sum() > 20
    assert len({look[0] for look in LOOKS.values()}) == len({look[1] for look in LOOKS.values()}) == len(LOOKS)


def test_svg_holds_the_texts_and_is_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for name in ("a.svg", "b.svg"):
        texts.append(draw_timeline(ALL, tmp_path / name, frames=FRAMES, max_seq_len=180).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    for wanted in (
        "toy-7", "32 frames at 2 per second", "drop_middle", "quiet", "snapkv", "F1 0.50", "1: take the red bar",
        "4: all finished", "failed: out of &lt;memory&gt;", "max_seq_len 180", "seconds of the video", "4 lines to say",
        "2: &lt;script&gt;alert('$x^2$", "the size of the cache was not recorded", "0 redundant, 4 missed",
    ):  # fmt: skip
        assert wanted in texts[0], wanted


@pytest.mark.parametrize(("strategies", "frames"), [(1, 20), (9, 60), (2, 2000)])
def test_any_size_can_be_drawn(tmp_path: Path, strategies: int, frames: int) -> None:
    videos = many(strategies, frames)
    file = draw_timeline(videos, tmp_path / "a.svg", max_seq_len=150)
    text = file.read_text(encoding="utf-8")
    assert all(name in text for name in videos)
    assert ("and 1" in text) == (frames == 2000), "so many references are not listed in full"
    assert write_timeline_page(videos, tmp_path / "a.html").stat().st_size > 10_000


def test_odd_texts_and_odd_videos(tmp_path: Path) -> None:
    odd = replace(
        VIDEO, video_id="\u4f60\u597d $x", key="k", spoken=(Utterance(99.0, "\u4f60\u597d $a_b$ \ud800 \x00", None),)
    )
    assert draw_timeline({"a" * 80: odd}, tmp_path / "a.png").stat().st_size > 5000
    assert "\u4f60\u597d" in write_timeline_page({"a" * 80: odd}, tmp_path / "a.html").read_text(encoding="utf-8")
    assert make_timeline({"a": odd}).end == 99.0
    ElementTree.parse(draw_timeline({"a": odd}, tmp_path / "a.svg"))
    empty = {"a": FAILED, "b": replace(FAILED, error="")}
    assert "the reason was not recorded" in draw_timeline(empty, tmp_path / "b.svg").read_text(encoding="utf-8")
    write_timeline_page(empty, tmp_path / "b.html")
    nothing = {"a": replace(VIDEO, spoken=(), references=())}
    draw_timeline(nothing, tmp_path / "c.png")
    write_timeline_page(nothing, tmp_path / "c.html")


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def having(self, name: str, word: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if word in (attrs.get(name) or "").split()]


def written(tmp_path: Path, **options: Any) -> tuple[str, Page]:
    text = write_timeline_page(ALL, tmp_path / "a.html", **options).read_text(encoding="utf-8")
    return text, Page(text)


def test_page_holds_every_line_escaped(tmp_path: Path) -> None:
    text, page = written(tmp_path, frames=FRAMES, max_seq_len=180, title="A <title>")
    for line in [one.text for one in (*VIDEO.spoken, *REFERENCES, *VIDEO.summaries)]:
        assert any(line in one for one in page.texts), line
    assert text.count("<script>") == 1, "the page's own"
    assert "alert('" not in text
    assert "<memory>" not in text
    assert "A &lt;title&gt;: toy-7" in text
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text), "asks for nothing"
    assert "prefers-color-scheme:dark" in text


def test_page_can_be_used_from_the_keyboard_and_read_aloud(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    marks = [one for one in page.having("class", "mark") if one.get("role") == "img"]
    assert len(marks) == 4 + 4 + 4 + 1, "references, lines, missed references and a drop"
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in marks)
    told = [one["aria-label"] or "" for one in page.having("class", "mismatched") if one.get("role") == "img"]
    assert told == [
        f"mismatched at 6.0 s: right time, other content\nsaid: {NASTY}\nreference 2 at 6.0 s: now the blue ring\n"
        "on time, similarity 0.00\n140 tokens in the cache",
        "mismatched at 8.8 s: right time, other content\nsaid: hello there\nreference 3 at 11.0 s: turn it over\n"
        "2.2 s early, similarity 0.00\n165 tokens in the cache",
    ]
    assert [one["data-ref"] for one in page.having("class", "missed") if one.get("role") == "img"] == list("1234")
    drops = [one["aria-label"] for one in page.having("class", "drop") if one.get("role") == "img"]
    assert drops == ["compression at 10.0 s\n180 to 93 tokens"]
    names = [tag for tag, _ in page.tags]
    assert names.count("details") == names.count("summary") == 2
    assert names.count("table") == names.count("caption") == names.count("thead") == 3
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")


def test_page_shows_frames_as_pictures(tmp_path: Path) -> None:
    tall = np.repeat(np.repeat(FRAMES, 20, 1), 20, 2)
    for frames, size in ((FRAMES, (16, 12)), (tall, (320, 240)), (np.repeat(tall, 2, 1), (106, 160))):
        _, page = written(tmp_path, frames=frames)
        pictures = [attrs["href"] or "" for tag, attrs in page.tags if tag == "image"]
        assert len(pictures) > 3
        first = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
        assert first.size == size
        assert first.mode == "RGB"
    _, page = written(tmp_path, frames=FRAMES)
    pictures = [attrs["href"] or "" for tag, attrs in page.tags if tag == "image"]
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2])))) for one in pictures]
    assert all(any(np.array_equal(one, frame) for frame in FRAMES) for one in shown)


def test_page_shows_the_metrics_of_every_strategy(tmp_path: Path) -> None:
    runner = RunnerNumbers(7, 1234.5, 0.0123, 100.0, 3 * 2**20)
    tables = {"drop_middle": metrics_table([VIDEO.score()] * 3, runner), "<odd>": metrics_table([QUIET.score()])}
    _, page = written(tmp_path, metrics=tables)
    for wanted in (
        "Metrics over all videos; brackets: 95% intervals", "F1", "timing F1", "0.500 [0.500, 0.500]",
        "1.000 [1.000, 1.000]", "1,234.5", "3.00 MiB", "7", "12.3 ms", "0.000", "<odd>", "\u2013",
    ):  # fmt: skip
        assert wanted in page.texts, wanted
    _, without = written(tmp_path, metrics={"a": {"f1": 0.25, "intervals": {"f1": [0.2, 0.3]}}})
    assert "0.250 [0.200, 0.300]" in without.texts
    assert "recall" not in without.texts, "no column without a number"
    assert "Metrics" not in written(tmp_path)[1].texts
