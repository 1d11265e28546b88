"""One video under one or several strategies as a page: the timeline, all lines, summaries and metrics in one HTML file.

The file needs nothing else and asks nothing of the network. It follows the light or dark scheme of the reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ._page_svg import Drawing, icon, off, seconds
from ._timeline import LOOKS, Band, Picture, Timeline, make_timeline
from .matching import Window
from .predictions import VideoPrediction
from .results import save
from .similarity import Similarity

__all__ = ["write_timeline_page"]

_METRICS = {
    "f1": "F1",
    "timing_f1": "timing F1",
    "precision": "precision",
    "recall": "recall",
    "avg_cache_size": "cache, mean tokens",
    "cache_bytes": "cache, most bytes",
    "cache_compressions": "compressions",
    "time_per_frame": "time per frame",
}
"""Names of `metrics_table` that the page shows, and what it calls them."""


def write_timeline_page(
    videos: Mapping[str, VideoPrediction],
    file: str | Path,
    *,
    frames: Sequence[Picture] | None = None,
    max_seq_len: int | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "Dialogue timeline",
    window: str | float | Sequence[float] | Window = "auto",
    similarity: str | Similarity = "token_f1",
    threshold: float = 0.5,
) -> Path:
    """Write one video under one or several strategies as one HTML file, and return where it is.

    A mark says on hover or focus what was said, when, what it was matched with, and how full the cache was; arrow keys
    go from mark to mark. Below are tables of all lines and summaries.

    Args:
        videos: by strategy, the same video's prediction.
        file: the page; missing folders are made.
        frames: of the stream, `[H, W, 3]` each, for the strip.
        max_seq_len: tokens that the cache may hold, drawn as a line.
        metrics: by strategy, the content of `<strategy>_metrics.json`, see `metrics_table`; shown as a table. They are
            of the whole run, not of this video alone.
        title: heading of the page.
        window: see `VideoPrediction.score`.
        similarity: likewise.
        threshold: likewise.

    Raises:
        DataError: see `make_timeline` and `thumbnails`.
        PolicyError, ScoreError: see `match`.
    """
    timeline = make_timeline(videos, window=window, similarity=similarity, threshold=threshold)
    video = timeline.video
    name = video.video_id if video.key == video.video_id else f"{video.video_id} ({video.key})"
    body = [
        f"<h1>{escape(title)}: {escape(name)}</h1><p class=soft>{escape(timeline.about)}</p>",
        _legend(max_seq_len),
        Drawing(timeline, max_seq_len).draw(frames),
        "<h2>Lines</h2>",
        *(_lines(timeline, band, only=len(timeline.bands) == 1) for band in timeline.bands),
        _summaries(timeline),
        _metrics_part(metrics or {}),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}: {escape(name)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
    )
    end = f'\n</main><div id="tip" hidden aria-hidden="true"></div><script>{_SCRIPT}</script></body></html>\n'
    # A lone surrogate, which JSON can hold and UTF-8 cannot, must not lose the page.
    return save(file, (page + "\n".join(part for part in body if part) + end).encode("utf-8", "replace"))


def _legend(limit: int | None) -> str:
    told = {"reference": "reference"} | {name: f"{name}: {look[2]}" for name, look in LOOKS.items()}
    told["drop"] = "compression of the cache"
    marks = "".join(f"<li>{icon(kind)}{escape(text)}</li>" for kind, text in told.items())
    line = "" if limit is None else f'<li><span class="dash"></span>max_seq_len {limit:,} tokens</li>'
    return f'<ul class="legend" aria-label="Legend">{marks}{line}</ul>'


def _lines(timeline: Timeline, band: Band, only: bool) -> str:
    if band.score is None:
        return f"<p><b>{escape(band.strategy)}</b> {escape(band.error)}</p>"
    rows = []
    for one in band.marks:
        wanted = None if one.reference is None else timeline.references[one.reference]
        rows.append(
            [
                seconds(one.time),
                "" if one.frame is None else str(one.frame),
                one.verdict,
                "" if one.verdict == "missed" else one.text,
                "" if wanted is None else f"{(one.reference or 0) + 1}: {wanted.text}",
                "" if one.delta is None else off(one.delta),
                "" if one.similarity is None else f"{one.similarity:.2f}",
                "" if one.tokens is None else f"{one.tokens:,}",
            ]
        )
    names = ("time", "frame", "verdict", "said", "reference", "off by", "similarity", "tokens in the cache")
    table = _table(f"All lines under {band.strategy}", names, rows, verdict=2)
    head = f"<summary><b>{escape(band.strategy)}</b> {escape(band.counts)}</summary>"
    return f"<details{' open' * only}>{head}{table}</details>"


def _summaries(timeline: Timeline) -> str:
    rows = [
        [band.strategy, seconds(one.time), str(one.frame), one.text, one.prompt]
        for band in timeline.bands
        for one in band.video.summaries
    ]
    head = ("strategy", "time", "frame", "summary", "asked for with")
    return f"<h2>Summaries</h2>{_table('What the model summed up', head, rows)}" if rows else ""


def _metrics_part(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    shown = [name for name in _METRICS if any(table.get(name) is not None for table in metrics.values())]
    rows = [[strategy, *(_number(name, table) for name in shown)] for strategy, table in metrics.items()]
    shares = {table["confidence"] for table in metrics.values() if isinstance(table.get("confidence"), (int, float))}
    about = "Metrics over all videos" + (f"; brackets: {shares.pop():.0%} intervals" if len(shares) == 1 else "")
    return f"<h2>Metrics</h2>{_table(about, ['strategy', *(_METRICS[name] for name in shown)], rows)}"


def _number(name: str, table: Mapping[str, Any]) -> str:
    value, ends = table.get(name), (table.get("intervals") or {}).get(name)
    if not isinstance(value, (int, float)):
        return "\u2013"
    if name == "cache_bytes":
        return f"{value / 2**20:,.2f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"
    if name == "time_per_frame":
        return f"{1000 * value:,.1f} ms"
    if name in ("avg_cache_size", "cache_compressions"):
        return f"{value:,.1f}" if value % 1 else f"{value:,.0f}"
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], verdict: int | None = None) -> str:
    """A table; the first column names its row. `verdict`: the column that gets a mark."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for row in rows:
        cells = [(icon(cell) if i == verdict else "") + escape(cell) for i, cell in enumerate(row)]
        short = [' class="short"' if len(cell) <= 24 else "" for cell in row]
        rest = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(short[1:], cells[1:], strict=True))
        lines.append(f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2126;--soft:#5c656e;--line:#ccd2d8;--shade:#f0f2f4;
--matched:#009e73;--mismatched:#d55e00;--redundant:#cc79a7;--missed:#000;--reference:#0072b2;--area:#56b4e940;--drop:#e69f00}
@media(prefers-color-scheme:dark){:root{--paper:#15181b;--ink:#e8ebee;--soft:#a0a9b2;--line:#3c444c;--shade:#22272c;
--missed:#fff;--reference:#56b4e9}}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:auto;padding:20px}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.15rem;
margin:28px 0 8px}.soft{color:var(--soft);margin:2px 0 12px}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0 0 14px;padding:0;font-size:13px}
.legend li{display:flex;align-items:center;gap:5px}.dash{width:22px;border-top:2px dashed var(--ink)}
.timeline{display:flex;border:1px solid var(--line);border-radius:8px;padding:14px 10px 6px}
.names{position:relative;flex:0 0 200px;font-size:12px}.name{position:absolute;left:0;width:185px;color:var(--soft);
line-height:1.35}.name b{display:block;color:var(--ink);font-size:14px;overflow-wrap:anywhere}
.tick{position:absolute;right:8px;color:var(--soft);font-size:11px;line-height:14px;background:var(--paper)}
.scroll{overflow-x:auto;min-width:0}.scroll svg{display:block}svg text{font-size:11px;fill:var(--ink)}
svg text.axis{text-anchor:middle;fill:var(--soft)}path{fill:none}.guide{stroke:var(--reference);stroke-dasharray:2 3;
opacity:.3}.shade{fill:var(--shade)}.stem,.base{stroke:var(--line)}.limit{stroke:var(--ink);stroke-dasharray:5 3}
.area{fill:var(--area)}.step{stroke:var(--reference)}.fall{stroke:var(--drop);stroke-width:2}.void{fill:var(--shade)}
.hit{fill:transparent}.mark{outline:none;cursor:default}.matched :not(.hit){fill:var(--matched)}
.mismatched :not(.hit){fill:var(--mismatched)}.redundant path{stroke:var(--redundant);stroke-width:3.5}
.missed rect{fill:none;stroke:var(--missed);stroke-width:1.5}.reference rect{fill:var(--reference)}
.drop path{fill:var(--drop)}.mark.lit .hit,.mark:focus .hit{stroke:var(--ink);stroke-width:1.5}
.icon{flex:none;vertical-align:-3px;margin-right:4px}
details{border-top:1px solid var(--line);padding:6px 0}summary{cursor:pointer;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%}caption{text-align:left;
color:var(--soft);padding:6px 0}th,td{text-align:left;vertical-align:top;padding:4px 12px 4px 0;
border-top:1px solid var(--line);font-variant-numeric:tabular-nums}th[scope=row]{font-weight:600}
.short,th[scope=row]{white-space:nowrap}td:not(.short){min-width:14em}
#tip{position:fixed;z-index:1;max-width:380px;padding:8px 11px;border-radius:6px;background:var(--ink);
color:var(--paper);font-size:13px;white-space:pre-line;overflow-wrap:anywhere;pointer-events:none}
"""
_SCRIPT = """
(() => {
  const tip = document.getElementById("tip"), marks = [...document.querySelectorAll("g.mark")];
  const light = ref => marks.forEach(one => one.classList.toggle("lit", !!ref && one.dataset.ref === ref));
  const hide = () => { tip.hidden = true; light(); };
  const show = mark => {
    const box = mark.getBoundingClientRect(), page = document.documentElement;
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const left = Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, page.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 0 ? above : box.bottom + 6) + "px";
    light(mark.dataset.ref);
  };
  document.querySelectorAll("g.row").forEach(row => {
    const own = [...row.querySelectorAll("g.mark")];
    own.forEach((mark, i) => {
      mark.tabIndex = i ? -1 : 0;
      mark.addEventListener("mouseenter", () => show(mark));
      mark.addEventListener("mouseleave", hide);
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("keydown", event => {
        const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: own.length - 1 }[event.key];
        if (event.key === "Escape") hide();
        if (own[next]) { event.preventDefault(); mark.tabIndex = -1; own[next].tabIndex = 0; own[next].focus(); }
      });
    });
  });
})();
"""
