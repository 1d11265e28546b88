"""Results of long-context tasks as CSV, as Markdown and as a terminal table, all from `summary.json`."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from ..tasks.contenders import FULL
from .tables import markdown_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HOW_TO_READ", "about_run", "ordered", "score_table", "scores_csv", "scores_markdown"]

HOW_TO_READ = (
    "How to read it: scores go from 0 to 100; the interval is a 95 % bootstrap over samples; `change` is against the "
    "full cache on the same samples. `kept` and `cache held` are measured when the answer is asked for. `answer held` "
    "is the share of all heads of all layers that still held the whole answer then; of the wrong answers, `evicted` "
    "are those that fewer than half of the heads held, `ignored` those that were there and not used."
)
_COLUMNS = (
    "method", "keeps", "score", "95 % interval", "change", "95 % of change", "kept", "cache held", "answer held",
    "evicted", "ignored", "failed", "seconds",
)  # fmt: skip
_LEAST_NEEDED = ("seconds", "95 % of change", "keeps", "failed", "cache held", "95 % interval", "ignored", "evicted")
_CSV = (
    "method", "policy", "budget", "task", "length", "score", "score_low", "score_high", "delta", "delta_low",
    "delta_high", "samples", "failed", "kept_share", "tokens_kept", "prompt_tokens", "bytes_held", "bytes_full",
    "answer_held", "wrong_evicted", "wrong_held",
)  # fmt: skip
_TITLES = {"ruler": "Retrieval from long texts", "longbench": "LongBench", "visualize": "What was kept"}


def scores_csv(summary: dict[str, Any]) -> str:
    """One line per method, task and length, numbers in full precision, empty where there is none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for one in summary["results"]:
        low, high = one["interval"] or (None, None)
        delta_low, delta_high = one["delta_interval"] or (None, None)
        survival = one["survival"] or {}
        writer.writerow(
            one
            | {"score_low": low, "score_high": high, "delta_low": delta_low, "delta_high": delta_high}
            | {name: survival.get(name) for name in ("wrong_evicted", "wrong_held")}
            | {"answer_held": survival.get("share")}
        )
    return out.getvalue()


def scores_markdown(summary: dict[str, Any]) -> str:
    """The whole report: tables, how to read them, failures, notes, and what produced it."""
    head, rows = _tasks(summary)
    failures = [f"- {one['method']} failed on {one['id']}: {one['error']}" for one in summary["failures"]]
    parts = [
        f"# {_TITLES.get(summary['kind'], 'Results')}",
        markdown_table(_COLUMNS, [_cells(one) for one in ordered(summary)]),
        HOW_TO_READ,
        "## By task\n\n" + markdown_table(head, rows) if len(rows) > 1 else "",
        "\n".join(f"- {note}" for note in summary["notes"]),
        "## Failed samples\n\n" + "\n".join(failures) if failures else "",
        "\n".join(f"- {line}" for line in about_run(summary)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def about_run(summary: dict[str, Any]) -> list[str]:
    """What was run, on what, with which line."""
    run, hardware = summary["run"], summary["run"]["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    samples = sum(task["samples"] for task in summary["tasks"])
    tasks = ", ".join(task["name"] for task in summary["tasks"])
    profile = f", profile {run['profile']}" if "profile" in run else ""
    return [
        f"Model: {run['model']}, {run['dtype']}. {samples} samples of {tasks}; {run['mode']}, chunks of "
        f"{run['chunk_size']} tokens, {run['positions']} positions, seed {run['seed']}{profile}.",
        f"{versions}; {hardware['device']}, {hardware['cpus']} CPUs ({hardware['machine']}), {hardware['threads']} "
        "threads.",
        f"`{run['command']}`",
    ]


def score_table(summary: dict[str, Any], width: int) -> Table:
    """The main table for `rich`; where `width` characters are too few, the least needed columns are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    ranked = ordered(summary)
    lines = [list(_COLUMNS), *(_cells(one) for one in ranked)]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(_COLUMNS))]
    shown = [i for i in range(len(_COLUMNS)) if any(line[i] for line in lines[1:])]
    for name in _LEAST_NEEDED:
        if sum(widths[i] for i in shown) + 1 > width and _COLUMNS.index(name) in shown:
            shown.remove(_COLUMNS.index(name))
    table = Table(title=_TITLES.get(summary["kind"], "Results"), title_justify="left", box=SIMPLE_HEAD)
    for i in shown:
        table.add_column(_COLUMNS[i], justify="left" if i < 2 else "right", no_wrap=True)
    for line, one in zip(lines[1:], ranked, strict=True):
        style = "bold" if one["method"] == FULL else "red" if one["failed"] else ""
        table.add_row(*(Text(line[i]) for i in shown), style=style)
    return table


def ordered(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Methods for people: the full cache, then the others from best to worst."""
    first = [one for one in summary["overall"] if one["method"] == FULL]
    others = [one for one in summary["overall"] if one["method"] != FULL]
    return [*first, *sorted(others, key=lambda one: -(one["score"] if one["score"] is not None else -1.0))]


def _tasks(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Scores by task (and length) and method."""
    methods = [one["method"] for one in ordered(summary)]
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for one in summary["results"]:
        found.setdefault((one["task"], one["length"]), {})[one["method"]] = _number(one["score"], ".1f")
    rows = [
        [task if length is None else f"{task}, {length:,}", *(cells.get(name, "") for name in methods)]
        for (task, length), cells in found.items()
    ]
    return ["task", *methods], rows


def _cells(one: dict[str, Any]) -> list[str]:
    held = "" if one["bytes_held"] is None else f"{one['bytes_held'] / 2**20:.2f} MiB"
    return [
        one["method"],
        one["budget"],
        _number(one["score"], ".1f"),
        _span(one["interval"], ".1f"),
        _number(one["delta"], "+.1f"),
        _span(one["delta_interval"], "+.1f"),
        _number(one["kept_share"], ".1%"),
        held,
        _number(one["survival"], ".0%"),
        _number(one["wrong_evicted"], "d"),
        _number(one["wrong_held"], "d"),
        str(one["failed"]) if one["failed"] else "",
        _number(one["seconds"], ".1f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _span(values: list[float] | None, form: str) -> str:
    return "" if values is None else f"{_number(values[0], form)} to {_number(values[1], form)}"
