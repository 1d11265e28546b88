"""Tables of the page of a long-context run, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ..tasks.contenders import FULL

__all__ = ["failures", "main_table", "run_about", "task_table"]

_DASH = "\u2013"


class Cell(NamedTuple):
    """What a cell shows (HTML) and the number it is sorted by; None sorts last."""

    shown: str
    value: float | None = None


def run_about(run: Mapping[str, Any], modes: Mapping[str, str]) -> str:
    """What was run, as a list of terms."""
    hardware, versions = run.get("hardware") or {}, run.get("versions") or {}
    told = {
        "command": f"<code>{escape(str(run['command']))}</code>",
        "model": escape(f"{run['model']}, {run['dtype']} on {run['device']}"),
        "mode": escape(modes.get(run["mode"], str(run["mode"]))),
        "fed": escape(f"{run['chunk_size']} tokens at a time") if run.get("chunk_size") else "",
        "profile": escape(str(run.get("profile") or "")),
        "longest text": f"{run['max_length']:,} tokens" if run.get("max_length") else "",
        "seed": escape(str(run["seed"])),
        "versions": escape(", ".join(f"{name} {version}" for name, version in versions.items())),
        "hardware": escape(_machine(hardware)) if hardware else "",
        "started": escape(str(run.get("started") or "")),
    }
    return f'<dl class="run">{"".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in told.items() if v)}</dl>'


def _machine(hardware: Mapping[str, Any]) -> str:
    threads = f"{hardware['threads']} thread" + "s" * (hardware["threads"] != 1)
    return f"{hardware['device']}, {hardware['cpus']} CPUs ({hardware['machine']}), {threads}"


def main_table(summary: Mapping[str, Any]) -> str:
    """One row per method, the full cache first; a click on a name sorts."""
    rows = summary["overall"]
    head = {
        "score": lambda r: _with_range(r["score"], r["interval"], ".1f"),
        "change": lambda r: _with_range(r["delta"], r["delta_interval"], "+.1f"),
        "cache held": _held,
        "tokens/head": lambda r: _number(r["tokens_kept"], ",.0f"),
        "answer held": lambda r: _percent(r["survival"]),
        "evicted": lambda r: _number(r["wrong_evicted"], ",d"),
        "ignored": lambda r: _number(r["wrong_held"], ",d"),
        "samples": lambda r: _number(r["samples"], ",d"),
        "failed": lambda r: _number(r["failed"], ",d"),
        "seconds": lambda r: _number(r["seconds"], ",.1f"),
    }
    caption = "All tasks and lengths together"
    counts = {r["samples"] for r in rows}
    if len(counts) == 1:
        del head["samples"]
        caption += f"; {counts.pop():,} samples for every method"
    if not any(r["failed"] for r in rows):
        del head["failed"]
    for name, key in (("answer held", "survival"), ("evicted", "wrong_evicted"), ("ignored", "wrong_held")):
        if all(r[key] is None for r in rows):
            del head[name]
    lines = [(r["method"], r.get("budget") or "", [make(r) for make in head.values()]) for r in rows]
    return _table(caption, list(head), lines)


def task_table(summary: Mapping[str, Any]) -> str:
    """Scores, one column per task and length, folded away."""
    keys = list(dict.fromkeys((r["task"], r["length"]) for r in summary["results"]))
    methods = list(dict.fromkeys(r["method"] for r in summary["results"]))
    found = {(r["method"], r["task"], r["length"]): r["score"] for r in summary["results"]}
    names = [task if length is None else f"{task} {length:,}" for task, length in keys]
    lines = [(name, "", [_number(found.get((name, *key)), ".1f") for key in keys]) for name in methods]
    metrics = "; ".join(f"{t['name']}: {t['metric']}, {t['samples']:,} samples" for t in summary["tasks"])
    about = f'<p class="soft">{escape(metrics)}</p>' if metrics else ""
    table = _table("Score by task and length", names, lines)
    return f"<details><summary>Score by task and length</summary>{table}{about}</details>"


def failures(summary: Mapping[str, Any]) -> str:
    """Samples without an answer, if there are any."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(f["method"]))}</th><td class="words">{escape(str(f["task"]))}</td>'
        f'<td class="words">{escape(str(f["id"]))}</td><td class="words">{escape(str(f["error"]))}</td></tr>'
        for f in summary["failures"]
    )
    if not rows:
        return ""
    head = "".join(f'<th scope="col" class="name">{name}</th>' for name in ("method", "task", "sample", "error"))
    return (
        '<h2>Failed samples</h2><div class="wide" tabindex="0" role="region" aria-label="Failed samples"><table>'
        f"<caption>Each of these counts 0 in the score of its method</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _table(caption: str, names: Sequence[str], lines: Sequence[tuple[str, str, list[Cell]]]) -> str:
    """A sortable table; the full cache's row stays on top."""
    top = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in names)
    bodies: dict[bool, list[str]] = {True: [], False: []}
    for name, budget, cells in lines:
        told = "full cache" if name == FULL else str(name)
        if budget and str(budget) not in told:
            told += f" {budget}"
        row = "".join(
            f'<td data-value="{"" if c.value is None else format(float(c.value), ".10g")}">{c.shown}</td>'
            for c in cells
        )
        bodies[name == FULL].append(f'<tr><th scope="row">{escape(told)}</th>{row}</tr>')
    first = f'<tbody class="first">{"".join(bodies[True])}</tbody>' if bodies[True] else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="sortable">'
        f'<caption>{escape(caption)}</caption><thead><tr><th scope="col" class="name">'
        f'<button type="button">method</button></th>{top}</tr></thead>{first}'
        f"<tbody>{''.join(bodies[False])}</tbody></table></div>"
    )


def _number(value: float | None, form: str) -> Cell:
    return Cell(_DASH) if value is None else Cell(format(value, form).replace("-", "\u2212"), value)


def _with_range(value: float | None, interval: Sequence[float] | None, form: str) -> Cell:
    cell = _number(value, form)
    if value is None or not interval:
        return cell
    ends = " to ".join(format(end, form).replace("-", "\u2212") for end in interval)
    return Cell(f'{cell.shown}<span class="range">[{ends}]</span>', value)


def _percent(value: float | None) -> Cell:
    return Cell(_DASH) if value is None else Cell(f"{100 * value:.1f} %", value)


def _held(row: Mapping[str, Any]) -> Cell:
    value, full = row["bytes_held"], row["bytes_full"]
    if value is None or not full:
        return Cell(_DASH)
    size = f"{value / 2**20:,.2f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"
    return Cell(f'{100 * value / full:.1f} %<span class="range">{size}</span>', value / full)
