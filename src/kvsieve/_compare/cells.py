"""The record of a comparison: one row per cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import _rowlog
from .._rowlog import RowLog, filled

__all__ = ["FORMAT", "OUTPUTS", "PLAN", "CellLog", "log_name", "read_rows"]

FORMAT = 1
"""Version of the files in an output folder."""

PLAN = "plan.json"
OUTPUTS = ("detailed_results.json", "comparison_summary.json", "comparison.csv", "comparison.md", "comparison.png")


def log_name(part: tuple[int, int]) -> str:
    """File name of a shard's rows."""
    index, count = part
    return "cells.jsonl" if count == 1 else f"cells.shard-{index}-of-{count}.jsonl"


class CellLog(RowLog):
    """The rows of one shard.

    Args:
        folder: output folder.
        part: shard as (index, count).
        resume: see `RowLog`.
    """

    def __init__(self, folder: Path, part: tuple[int, int], resume: bool) -> None:
        super().__init__(folder / log_name(part), resume, (PLAN, *OUTPUTS))
        self.part = part

    def earlier(self) -> list[Path]:
        """Files of an earlier run. A shard owns its rows only: the others may be at work."""
        if self.part[1] > 1:
            return [self.path] if filled(self.path) else []
        shards = [file for file in sorted(self.folder.glob("cells*.jsonl")) if file != self.path and filled(file)]
        return [*super().earlier(), *shards]


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of all shards by cell key."""
    return _rowlog.read_rows(sorted(folder.glob("cells*.jsonl")))
