"""One line of the table: what was measured, how it spreads, what it should have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Line:
    """One measured number.

    Attributes:
        section: name of the group, as `--only` takes it.
        what: what was measured.
        value: median; `None` where nothing was measured.
        unit: `"x"` for a ratio.
        low, high: quartiles over the repeats, where there are repeats.
        target: the value to reach; `None` for lines that only inform.
        at_least: whether more is better.
        detail: the absolute numbers behind a ratio, and anything needed to read it.
        peer: the same of the peer, in words.
        reason: why nothing was measured, or what failed.
        failed: whether an error is the reason.
    """

    section: str
    what: str
    value: float | None = None
    unit: str = "x"
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_least: bool = False
    detail: str = ""
    peer: str = ""
    reason: str = ""
    failed: bool = False

    @property
    def status(self) -> str:
        """`"met"`, `"missed"`, `"not measured"`, `"failed"`, or `"-"` where there is no target."""
        if self.failed:
            return "failed"
        if self.value is None:
            return "not measured"
        if self.target is None:
            return "-"
        return "met" if (self.value >= self.target if self.at_least else self.value <= self.target) else "missed"

    @property
    def shown(self) -> str:
        """The value with its quartiles."""
        if self.value is None:
            return "-"
        text = number(self.value, self.unit)
        if self.low is not None and self.high is not None:
            text += f" ({number(self.low)} to {number(self.high)})"
        return text

    @property
    def aim(self) -> str:
        """The target in words."""
        if self.target is None:
            return ""
        return f"at {'least' if self.at_least else 'most'} {number(self.target, self.unit)}"

    @property
    def notes(self) -> str:
        """Everything else, in one cell."""
        peer = f"peer: {self.peer}" if self.peer else ""
        return "; ".join(part for part in (self.reason, self.detail, peer) if part)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the status included."""
        return asdict(self) | {"status": self.status}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Line:
        """Inverse of `to_dict`."""
        return cls(**{name: value for name, value in found.items() if name != "status"})


def number(value: float, unit: str = "") -> str:
    """Three digits and the unit: `0.67x`, `12.3 ms`."""
    if value == 0 or abs(value) >= 100:
        text = f"{value:.0f}"
    else:
        text = f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return text + (unit if unit in ("", "x") else f" {unit}")


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds."""
    return number(1000 * seconds, "ms")


def mebibytes(count: float) -> str:
    """Bytes as MiB."""
    return number(count / 2**20, "MiB")


def plain(line: Line) -> str:
    """For the terminal."""
    aim = f"  [{line.aim}]" if line.aim else ""
    notes = f"  {line.notes}" if line.notes else ""
    return f"{line.status:<13}{line.section:<12}{line.what}: {line.shown}{aim}{notes}"


def table(lines: Sequence[Line]) -> str:
    """For a Markdown page."""
    rows = ["| | measured | value (quartiles) | target | |", "|---|---|---|---|---|"]
    for line in lines:
        cells = (line.status, line.what, line.shown, line.aim, line.notes)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def tally(lines: Sequence[Line]) -> str:
    """How many targets are met."""
    counts = {name: sum(line.status == name for line in lines) for name in ("met", "missed", "not measured", "failed")}
    return ", ".join(f"{count} {name}" for name, count in counts.items())
