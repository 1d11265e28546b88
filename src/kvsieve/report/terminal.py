"""What a running comparison shows: progress bars (in a log, the name of each method), then the table."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .._compare.watcher import Watcher
from .tables import HOW_TO_READ, terminal_table

if TYPE_CHECKING:
    from .._compare.plan import Plan

__all__ = ["MethodBar", "TerminalWatcher", "make_bar", "make_console", "print_summary"]

_Bar = TypeVar("_Bar", bound="MethodBar")


class MethodBar:
    """A progress bar that names the method at work (in a log: a line for each); a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = make_bar(console, 20)
        self._task: TaskID | None = None
        self._method = ""

    def __enter__(self: _Bar) -> _Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def open(self, about: str, what: str, total: int, finished: int) -> None:
        """Show what will be done; `what`: the pieces of work, as in "6 of 12 cells"."""
        self.console.print(about)
        if finished:
            self.console.print(f"{finished} of {total}{what} were finished before and are not done again")
        self._task = self._bar.add_task("starting", total=total, completed=finished)

    def started(self, method: str) -> None:
        """Name the method at work."""
        if method != self._method and not self.console.is_terminal:
            self.console.print(f"{method} ...", markup=False)
        self._method = method
        if self._task is not None:
            self._bar.update(self._task, description=method)

    def count(self, row: dict[str, Any], name: str) -> None:
        """Count a row; say at once when it failed."""
        if self._task is not None:
            self._bar.advance(self._task)
        if row["status"] != "ok":
            self.console.print(f"{row['method']} failed on {name}: {row['error']}", style="red", markup=False)


class TerminalWatcher(MethodBar, Watcher):
    """Draws the progress of a comparison."""

    def begin(self, plan: Plan, total: int, finished: int) -> None:
        """Show what will be done."""
        tokens = sum(sample.tokens.numel() for sample in plan.samples)
        about = (
            f"{len(plan.methods)} methods on {len(plan.samples)} texts ({tokens:,} tokens), model "
            f"{plan.settings.model_name}, {plan.identity['dtype']} on {plan.identity['device']}"
        )
        self.open(about, " cells", total, finished)

    def done(self, row: dict[str, Any]) -> None:
        """Count a cell."""
        self.count(row, row["sample"])


def make_bar(console: Console, width: int) -> Progress:
    """A progress bar; `width`: characters for the name of what is at work."""
    return Progress(
        TextColumn(f"{{task.description:<{width}}}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        expand=True,
        console=console,
    )


def make_console(stderr: bool = False) -> Console:
    """A console; wide where the output goes to a file, which does not wrap."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160, soft_wrap=True)


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """The table, how to read it, and the notes."""
    console.print(terminal_table(summary, console.width))
    console.print(HOW_TO_READ, markup=False)
    for note in summary["notes"]:
        console.print(f"- {note}", markup=False)
    failures = Counter(error for result in summary["results"] for error in result["errors"])
    if failures:
        console.print(
            f"{len(failures)} cells failed; the methods concerned have no numbers. --resume tries them again.",
            style="red",
        )
