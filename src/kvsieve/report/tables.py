"""A comparison as CSV, as Markdown and as a terminal table, all from `comparison_summary.json`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HOW_TO_READ", "markdown_table", "ranked", "terminal_table", "to_csv", "to_markdown"]

HOW_TO_READ = (
    "How to read it: `change` is what a method costs in perplexity against the full cache (lower is better), with a "
    "bootstrap interval over texts of the change in %; `removed` and `cache held` (all texts together) are measured at "
    "the end of each text, `keys seen` is how many keys a query sees on average."
)

_COLUMNS = (
    "method", "kind", "perplexity", "change", "change %", "95 % interval", "removed", "cache held", "keys seen", "mode",
    "seconds",
)  # fmt: skip
_LEAST_NEEDED = ("mode", "95 % interval", "change", "seconds", "keys seen", "cache held", "kind")
_CSV = (
    "method", "kind", "asked", "status", "perplexity", "ppl_delta", "ppl_delta_pct", "ppl_delta_pct_low",
    "ppl_delta_pct_high", "compression_ratio", "bytes_held", "bytes_full", "mean_visible_keys", "mode", "chunk_size",
    "seconds",
)  # fmt: skip


def ranked(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Results for people: the baseline, then the others from best to worst, failed ones last."""
    first, *others = summary["results"]

    def place(result: dict[str, Any]) -> tuple[bool, float]:
        value = math.inf if result["perplexity"] is None else float(result["perplexity"])
        return result["status"] != "ok", math.inf if math.isnan(value) else value

    return [first, *sorted(others, key=place)]


def to_csv(summary: dict[str, Any]) -> str:
    """One line per method, numbers in full precision, empty where there is none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in summary["results"]:
        low, high = result["ppl_delta_pct_interval"] or (None, None)
        writer.writerow(result | {"ppl_delta_pct_low": low, "ppl_delta_pct_high": high})
    return out.getvalue()


def to_markdown(summary: dict[str, Any]) -> str:
    """The whole report: table, how to read it, notes, and what produced it."""
    run = summary["run"]
    rows = [_cells(result) for result in ranked(summary)]
    errors = [f"- {result['method']} failed: {error}" for result in summary["results"] for error in result["errors"]]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    hardware = run["hardware"]
    about = [
        f"- Model: {run['model']}, {run['dtype']}. Data: {run['data']}, {run['samples']} texts of at most "
        f"{run['max_length']} tokens. Chunk size {run['chunk_size']}, seed {run['seed']}.",
        f"- {versions}; {hardware['device']}, {hardware['cpus']} CPUs ({hardware['machine']}), {hardware['threads']} "
        "threads.",
        f"- `{run['command']}`",
    ]
    parts = [
        "# Comparison of eviction methods",
        markdown_table(_COLUMNS, rows),
        HOW_TO_READ,
        "\n".join(f"- {note}" for note in summary["notes"]),
        "\n".join(errors),
        "\n".join(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the second are aligned to the right where they hold numbers."""
    numeric = [all(row[i][:1] in "0123456789+-(" for row in rows if row[i]) for i in range(len(head))]
    lines = [head, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def terminal_table(summary: dict[str, Any], width: int) -> Table:
    """The same table for `rich`; where `width` characters are too few, the least needed columns are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    lines = [list(_COLUMNS), *(_cells(result) for result in ranked(summary))]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(_COLUMNS))]
    shown = list(range(len(_COLUMNS)))
    for name in _LEAST_NEEDED:
        if sum(widths[i] for i in shown) + 1 > width:
            shown.remove(_COLUMNS.index(name))
    table = Table(title="What each method costs", title_justify="left", box=SIMPLE_HEAD)
    for i in shown:
        left = _COLUMNS[i] in ("method", "kind", "mode")
        table.add_column(_COLUMNS[i], justify="left" if left else "right", no_wrap=True)
    for line, result in zip(lines[1:], ranked(summary), strict=True):
        style = "bold" if result is summary["results"][0] else "red" if result["status"] != "ok" else ""
        table.add_row(*(Text(line[i]) for i in shown), style=style)
    return table


def _cells(result: dict[str, Any]) -> list[str]:
    kind = "full cache" if result["kind"] == "none" else result["kind"]
    if result["asked"] is not None:
        kind += f" {result['asked']:g}"
    if result["status"] != "ok":
        return [result["method"], kind, "failed", *[""] * (len(_COLUMNS) - 3)]
    low_high = result["ppl_delta_pct_interval"]
    mode = result["mode"].replace("_", " ")
    return [
        result["method"],
        kind,
        _number(result["perplexity"], ".3f"),
        _number(result["ppl_delta"], "+.3f"),
        _number(result["ppl_delta_pct"], "+.1f"),
        f"{_number(low_high[0], '+.1f')} to {_number(low_high[1], '+.1f')}" if low_high else "",
        f"{result['compression_ratio']:.1%}",
        f"{result['bytes_held'] / 2**20:.2f} MiB",
        f"{result['mean_visible_keys']:.0f}",
        mode if result["chunk_size"] == 1 else f"{mode} {result['chunk_size']}",
        f"{result['seconds']:.1f}",
    ]


def _number(value: float | str | None, form: str) -> str:
    if value is None:
        return ""
    value = float(value)
    return format(value, form) if math.isfinite(value) and abs(value) < 1e6 else f"{value:.3g}"
