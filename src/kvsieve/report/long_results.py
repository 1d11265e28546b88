"""What a run over long texts shows and leaves: progress, result files, pictures, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .._rowlog import jsonable, write_text
from ..errors import DataError
from ..tasks.earlier import earlier_results
from ..tasks.run import SUMMARY, Run, Watcher, load_run, missing, trace_path
from ..tasks.summary import summarise
from ..trace import Trace
from .long_page import report_page
from .score_tables import HOW_TO_READ, score_table, scores_csv, scores_markdown
from .terminal import MethodBar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE", "LongWatcher", "load_traces", "show_results", "write_results"]

PAGE = "report.html"
PICTURES = "pictures"
_SHOWN = 4
"""Traces on the page, unless there are more methods, which have one each; all of them stay in the folder."""


class LongWatcher(MethodBar, Watcher):
    """Draws the progress of a run over long texts."""

    def begin(self, run: Run, total: int, finished: int) -> None:
        """Show what will be done."""
        tokens = sum(len(item.prompt) for item in run.items)
        about = (
            f"{len(run.contenders)} methods on {len(run.items)} samples ({tokens:,} tokens), model {run.model_name}, "
            f"{run.identity['dtype']} on {run.identity['device']}"
        )
        self.open(about, "", total, finished)

    def done(self, row: dict[str, Any]) -> None:
        """Count a row."""
        self.count(row, row["id"])


def write_results(
    folder: Path, earlier: Path | None = None, *, pictures: bool = True
) -> tuple[list[Path], dict[str, Any]]:
    """Make all result files of a run's folder from its rows and traces; no model is loaded.

    Args:
        folder: what `perform` wrote.
        earlier: also write the file of the earlier LongBench script here.
        pictures: draw; without matplotlib nothing is drawn, and the page says so.

    Returns:
        The files, and the content of `summary.json`.

    Raises:
        DataError: there is no run here, or rows are missing.
    """
    plan, rows, seconds = load_run(folder)
    owed = missing(plan, rows)
    if owed:
        raise DataError(f"{owed} samples of {folder} have no row yet: finish the run with --resume first")
    summary: dict[str, Any] = jsonable(summarise(plan, rows, seconds))
    contents = {
        SUMMARY: json.dumps(summary, indent=1) + "\n",
        "summary.csv": scores_csv(summary),
        "summary.md": scores_markdown(summary),
    }
    files = [folder / name for name in contents]
    for name, content in contents.items():
        write_text(folder / name, content)

    def keep(name: str, figure: Figure) -> None:
        from .pictures import save

        safe = re.sub(r"[^\w.@-]+", "_", name)
        files.extend(save(figure, folder / PICTURES / f"{safe}.{kind}") for kind in ("png", "svg"))

    page = report_page(summary, _chosen(load_traces(folder, plan)), pictures=pictures, keep=keep)
    write_text(folder / PAGE, page)
    files.append(folder / PAGE)
    if earlier is not None:
        text = json.dumps(jsonable(earlier_results(plan, rows, seconds, summary)), indent=1) + "\n"
        write_text(earlier, text)
        files.append(earlier)
    return files, summary


def load_traces(folder: Path, plan: dict[str, Any]) -> list[Trace]:
    """The recorded traces of a run (`load_run`), by method and sample; what other runs left there is not read."""
    places = (trace_path(folder, one["label"], item["id"]) for one in plan["methods"] for item in plan["items"])
    return [Trace.load(file) for file in places if file.is_file()]


def show_results(console: Console, summary: dict[str, Any], files: list[Path]) -> None:
    """Table, notes and where the files are."""
    console.print(score_table(summary, console.width))
    console.print(HOW_TO_READ, markup=False, highlight=False)
    for note in summary["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)
    for one in summary["failures"]:
        console.print(f"failed: {one['method']} on {one['id']}: {one['error']}", style="red", markup=False)
    page = next(file for file in files if file.name == PAGE)
    console.print(f"Results: {', '.join(file.name for file in files if file.parent == page.parent)} in {page.parent}")


def _chosen(traces: list[Trace]) -> list[Trace]:
    """One trace of each method first, then more while there is room."""
    first: dict[str, Trace] = {}
    for trace in traces:
        first.setdefault(str(trace.about.get("method")), trace)
    chosen = list(first.values())
    others = [trace for trace in traces if not any(trace is one for one in chosen)]
    return chosen + others[: max(0, _SHOWN - len(chosen))]
