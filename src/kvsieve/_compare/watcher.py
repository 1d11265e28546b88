"""Who is told how a run gets on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["Watcher"]


class Watcher:
    """Told what happens; this one does not care. `kvsieve.report.terminal` has one that draws."""

    def begin(self, plan: Plan, total: int, finished: int) -> None:
        """Cells in this run's shard, and how many of them were there already."""

    def started(self, method: str) -> None:
        """A cell of this method is being worked on."""

    def done(self, row: dict[str, Any]) -> None:
        """A cell has ended, well or not."""
