"""A timeline as SVG, part of the page of `page`."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from ._timeline import LOOKS, Band, Mark, Picture, Timeline, captions, place_labels, shrunk, thumbnails

__all__ = ["Drawing", "icon", "off", "seconds"]

_LANE, _LETTER, _STRIP, _CACHE = 15, 6.4, 64, 52
"""Pixels: a line of text, a letter with room to spare, the strip of frames, the size of the cache."""
_SHAPES = {
    "matched": '<circle r="5"/>',
    "mismatched": '<path d="M0-6.5 6 0 0 6.5-6 0Z"/>',
    "redundant": '<path d="M-5-5 5 5M5-5-5 5"/>',
    "missed": '<rect x="-4" y="-4" width="8" height="8"/>',
    "reference": '<rect x="-4" y="-4" width="8" height="8"/>',
    "drop": '<path d="M-4.5-5H4.5L0 2Z"/>',
}


class Drawing:
    """The timeline as SVG, from the top down, with the names of its rows beside it. Lengths are pixels."""

    def __init__(self, timeline: Timeline, max_seq_len: int | None) -> None:
        self.timeline, self.limit = timeline, max_seq_len
        most = max(len(timeline.references), *(len(band.marks) for band in timeline.bands))
        self.wide = min(6000, max(1000, 16 * most))
        pad = 0.01 * (timeline.end - timeline.begin)
        self.first = timeline.begin - pad
        self.second = self.wide / (timeline.end - timeline.begin + 2 * pad)
        self.parts: list[str] = []
        self.names: list[str] = []
        self.y = 0.0

    def draw(self, frames: Sequence[Picture] | None) -> str:
        """The part of the page."""
        if frames is not None:
            self.strip(frames)
        top = self.y
        self.references()
        lanes = 2 if len(self.timeline.bands) <= 4 else 1
        for band, peak in zip(self.timeline.bands, self.timeline.tops(self.limit), strict=True):
            self.band(band, peak, lanes)
        guides = "".join(f"M{self.x(one.time)} {top + 10:g}V{self.y - 26:g}" for one in self.timeline.references)
        self.axis()
        size = f'width="{self.wide}" height="{self.y:g}" viewBox="0 0 {self.wide} {self.y:g}"'
        return (
            f'<div class="timeline"><div class="names">{"".join(self.names)}</div>'
            '<div class="scroll" tabindex="0" role="region" aria-label="Timeline, scrolls sideways">'
            f'<svg {size} role="group" aria-label="Timeline; arrow keys go from mark to mark">'
            f'<path class="guide" d="{guides}"/>{"".join(self.parts)}</svg></div></div>'
        )

    def x(self, time: float) -> str:
        """Where a time stands."""
        return f"{(time - self.first) * self.second:.1f}"

    def name(self, name: str, *about: str) -> None:
        """What the row that begins here is; lines end at commas only."""
        words = escape("".join(about).replace(" ", "\u00a0").replace(",\u00a0", ", "))
        self.names.append(f'<div class="name" style="top:{self.y:g}px"><b>{escape(name)}</b>{words}</div>')

    def strip(self, frames: Sequence[Picture]) -> None:
        """Frames side by side."""
        small = thumbnails(self.timeline, frames, self.second, _STRIP)
        for left, right, picture in small:
            data = base64.b64encode(_png(shrunk(picture, 2 * _STRIP))).decode()
            size = f'width="{(right - left) * self.second:.1f}" height="{_STRIP}"'
            self.parts.append(
                f'<image x="{self.x(left)}" y="{self.y:g}" {size} href="data:image/png;base64,{data}" role="img" '
                f'aria-label="Frame at {seconds((left + right) / 2)}"/>'
            )
        self.name("frames", f"{len(small)} of {len(frames):,}")
        self.y += _STRIP + 14

    def references(self) -> None:
        """The row of references."""
        wanted = self.timeline.references
        self.name("references", f"{len(wanted)} to say")
        texts = [(one.time, captions(one.text, i)) for i, one in enumerate(wanted, 1)]
        low = self.labels(texts, range(len(wanted))[::-1], 4)
        marks = [
            _mark("reference", self.x(one.time), low + 11, f"reference {i} at {seconds(one.time)}\n{one.text}", i)
            for i, one in enumerate(wanted, 1)
        ]
        self.parts.append(f'<g class="row" role="group" aria-label="references">{"".join(marks)}</g>')
        self.y = low + 34

    def band(self, band: Band, top: int, lanes: int) -> None:
        """The two rows of a strategy."""
        if band.score is None:
            self.name(band.strategy, "failed")
            self.parts.append(
                f'<rect class="void" y="{self.y:g}" width="{self.wide}" height="36"/>'
                f'<text x="12" y="{self.y + 22:g}">{escape(captions(band.error)[0])}</text>'
            )
            self.y += 64
            return
        rate = band.score.rates()["f1"]
        self.name(band.strategy, "" if rate is None else f"F1 {rate:.2f}, ", band.counts)
        low = self.labels(*band.captions(), lanes)
        shades = "".join(
            f"M{self.x(first)} {low:g}H{self.x(last)}v34H{self.x(first)}Z" for first, last in self.timeline.windows()
        )
        marks = [
            _mark(
                one.verdict, self.x(one.time), low + (26 if one.verdict == "missed" else 11),
                _told(self.timeline, one), None if one.reference is None else one.reference + 1,
            )
            for one in band.marks
        ]  # fmt: skip
        self.parts.append(
            f'<path class="shade" d="{shades}"/><g class="row" role="group" '
            f'aria-label="{escape(band.strategy)}: what was said">{"".join(marks)}</g>'
        )
        self.y = low + 40
        self.cache(band, top)
        self.y += _CACHE + 26

    def cache(self, band: Band, top: int) -> None:
        """Tokens in the cache."""
        bottom = self.y + _CACHE

        def y(tokens: float) -> str:
            return f"{bottom - tokens / top * (_CACHE - 4):.1f}"

        line = f'<path class="base" d="M0 {bottom:g}H{self.wide}"/>'
        if self.limit is not None:
            line += f'<path class="limit" d="M0 {y(self.limit)}H{self.wide}"/>'
        if band.cache:
            last = self.x(band.cache[-1][0] + 1 / self.timeline.video.fps)
            steps = "".join(f"H{self.x(time)}V{y(tokens)}" for time, tokens in band.cache) + f"H{last}"
            start = self.x(band.cache[0][0])
            line += f'<path class="area" d="M{start} {bottom:g}{steps}V{bottom:g}Z"/>'
            line += f'<path class="step" d="M{start} {y(band.cache[0][1])}{steps}"/>'
        elif not band.drops:
            line += f'<text x="12" y="{self.y + 30:g}">the size of the cache was not recorded</text>'
        for time, before, after in band.drops:
            line += f'<path class="fall" d="M{self.x(time)} {y(before)}V{y(after)}"/>'
        marks = [
            _mark(
                "drop",
                self.x(time),
                float(y(after)),
                f"compression at {seconds(time)}\n{before:,} to {after:,} tokens",
            )
            for time, before, after in band.drops
        ]
        label = f"{escape(band.strategy)}: tokens in the cache"
        self.parts.append(f'{line}<g class="row" role="group" aria-label="{label}">{"".join(marks)}</g>')
        tick = self.limit if self.limit and top < 1.6 * self.limit else top
        self.names.append(f'<div class="tick" style="top:{float(y(tick)) - 8:g}px">{tick:,}</div>')
        self.names.append(f'<div class="tick" style="top:{bottom - 9:g}px">0 tokens</div>')

    def labels(self, texts: Sequence[tuple[float, Sequence[str]]], order: Sequence[int], lanes: int) -> float:
        """Texts above the marks of a row that begins here; returns where the marks begin."""
        items = [((time - self.first) * self.second, ways) for time, ways in texts]
        placed = place_labels(items, order, lanes, self.wide, _width, 8)
        low = self.y + _LANE * max([2, *(lane + 1 for *_, lane in placed.values())])
        for item, (text, left, lane) in placed.items():
            high = low - lane * _LANE
            if lane:
                self.parts.append(f'<path class="stem" d="M{items[item][0]:.1f} {low:g}V{high - 4:g}"/>')
            self.parts.append(f'<text x="{left:.1f}" y="{high - 4:g}">{escape(text)}</text>')
        return low

    def axis(self) -> None:
        """Seconds below all rows."""
        span = self.timeline.end - self.timeline.begin
        rough = span / (self.wide / 110)
        steps = [factor * 10.0**power for power in range(-3, 7) for factor in (1, 2, 5)]
        step = next((one for one in steps if one >= rough), steps[-1])
        first = int(self.timeline.begin / step + 0.999999)
        for i in range(first, int(self.timeline.end / step + 1e-6) + 1):
            place = self.x(i * step)
            self.parts.append(
                f'<path class="base" d="M{place} {self.y - 16:g}v5"/>'
                f'<text class="axis" x="{place}" y="{self.y + 3:g}">{i * step:g} s</text>'
            )
        self.y += 16


def _mark(kind: str, x: str, y: float, told: str, reference: int | None = None) -> str:
    lit = "" if reference is None else f' data-ref="{reference}"'
    return (
        f'<g class="mark {kind}" tabindex="0" role="img" aria-label="{escape(told)}"{lit} '
        f'transform="translate({x} {y:g})"><circle class="hit" r="9"/>{_SHAPES[kind]}</g>'
    )


def _told(timeline: Timeline, mark: Mark) -> str:
    """What a mark says when it is pointed at."""
    lines = [f"{mark.verdict} at {seconds(mark.time)}: {LOOKS[mark.verdict][2]}"]
    if mark.verdict != "missed":
        lines.append(f"said: {mark.text}")
    if mark.reference is not None:
        one = timeline.references[mark.reference]
        lines.append(f"reference {mark.reference + 1} at {seconds(one.time)}: {one.text}")
    if mark.delta is not None and mark.similarity is not None:
        lines.append(f"{off(mark.delta)}, similarity {mark.similarity:.2f}")
    if mark.tokens is not None:
        lines.append(f"{mark.tokens:,} tokens in the cache")
    return "\n".join(lines)


def icon(kind: str) -> str:
    size = 'width="16" height="16" viewBox="-8 -8 16 16"'
    return f'<svg class="icon mark {kind}" {size} aria-hidden="true">{_SHAPES[kind]}</svg>'


def seconds(time: float) -> str:
    return f"{time:.1f} s"


def off(delta: float) -> str:
    return "on time" if abs(delta) < 0.05 else f"{abs(delta):.1f} s {'late' if delta > 0 else 'early'}"


def _width(text: str) -> float:
    """At most so many pixels; letters of East Asia are twice as wide."""
    return sum(_LETTER if ord(letter) < 0x1100 else 2 * _LETTER for letter in text)


def _png(picture: Picture) -> bytes:
    """A picture `[H, W, 3]` as PNG, without a library for pictures, which is not there in every installation."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = picture.shape[:2]
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(picture))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
