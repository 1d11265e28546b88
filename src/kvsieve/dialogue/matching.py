"""Which spoken line answers which reference line: an exact one-to-one assignment inside a window of time."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError, PolicyError
from .records import Utterance
from .similarity import Similarity, get_similarity

__all__ = ["UNIFORM", "WINDOWS", "Matching", "Pair", "Window", "assign", "get_window", "match"]

TIME_WEIGHT = 0.3
TIME_POWER = 1.5
"""Being off by the whole reach of the window costs `TIME_WEIGHT`; the power is above 1, so that pairs do not cross."""
_UNIT = 1_000_000_000
"""Costs are counted in billionths, as whole numbers, so that sums and comparisons are exact."""
_ROUNDING = 1e-6
"""Seconds a window is wider than it says, for times that were rounded."""


@dataclass(frozen=True)
class Window:
    """Where the reference for a spoken line may lie.

    Attributes:
        earliest: seconds from the spoken line to the earliest reference, 0 or below: how late one may speak, negated.
        latest: seconds from the spoken line to the latest reference, 0 or above: how early one may speak.
    """

    earliest: float
    latest: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.earliest) and math.isfinite(self.latest) and self.earliest <= 0 <= self.latest):
            raise PolicyError(
                f"a window reaches from 0 s or below to 0 s or above, not from {self.earliest} to {self.latest}"
            )

    @property
    def reach(self) -> float:
        """The longer side, in seconds."""
        return max(-self.earliest, self.latest)

    def holds(self, delta: float) -> bool:
        """Whether a reference `delta` seconds after the spoken line counts."""
        return self.earliest - _ROUNDING <= delta <= self.latest + _ROUNDING


UNIFORM = Window(-2.5, 2.5)
"""The window where no data set says otherwise."""
WINDOWS = {
    "uniform": UNIFORM,
    "narration": Window(-2.5, 2.5),
    "ego4d": Window(-4.0, 8.5),
    "epickitchens": Window(-1.5, 3.0),
    "holoassist": Window(-1.5, 2.5),
    "egoexolearn": Window(-2.0, 3.5),
    "assembly101": Window(-2.0, 4.0),
    "wtag": Window(-3.0, 6.0),
}
"""The windows that the data sets of the ProAssist study (arXiv 2506.05904) are scored with, by name."""


def get_window(window: str | float | Sequence[float] | Window = "auto", dataset: str = "") -> Window:
    """The window meant.

    Args:
        window: `"auto"` for the data set's own, `UNIFORM` where it has none; a name of `WINDOWS`; seconds to both
            sides; or the two ends, as in `Window`.
        dataset: name of the data set; capitals do not matter.

    Raises:
        PolicyError: an unknown name, or ends that no window has.
    """
    if isinstance(window, Window):
        return window
    if isinstance(window, str):
        if window == "auto":
            return WINDOWS.get(dataset.lower(), UNIFORM)
        if window not in WINDOWS:
            names = ", ".join(WINDOWS)
            raise PolicyError(f"there is no window named {window!r}; it must be auto, {names}, or seconds")
        return WINDOWS[window]
    if isinstance(window, (int, float)) and not isinstance(window, bool):
        return Window(-float(window), float(window))
    if not isinstance(window, Sequence) or len(window) != 2:
        raise PolicyError(f"a window has two ends in seconds, not {window!r}")
    return Window(float(window[0]), float(window[1]))


@dataclass(frozen=True)
class Pair:
    """A spoken line and the reference it answers.

    Attributes:
        spoken: index among the spoken lines.
        reference: index among the references.
        delta: seconds by which the spoken line comes after the reference; below 0 it comes early.
        similarity: of the two texts, in [0, 1].
    """

    spoken: int
    reference: int
    delta: float
    similarity: float


@dataclass(frozen=True)
class Matching:
    """All pairs, in the order of their references' times, and who stayed alone.

    Attributes:
        pairs: one-to-one.
        missed: indices of references that nothing answers.
        redundant: indices of spoken lines that answer nothing.
    """

    pairs: tuple[Pair, ...]
    missed: tuple[int, ...]
    redundant: tuple[int, ...]


def match(
    spoken: Sequence[Utterance],
    references: Sequence[Utterance],
    *,
    window: Window = UNIFORM,
    similarity: str | Similarity = "token_f1",
    threshold: float = 0.5,
    rejection: float | None = None,
) -> Matching:
    """Pair spoken lines with references, one to one, the best way there is.

    A pair is allowed if the reference lies in the window around the spoken line and the texts are similar enough. It
    costs `(1 - similarity) + 0.3 * (|delta| / reach) ** 1.5`, the terms of the ProAssist study (arXiv 2506.05904).
    Among all allowed assignments those with the most pairs are taken, among these the one with the least cost. So one
    more spoken line never loses a pair, and a pair that costs nothing counts like any other. The order in which the
    lines are given does not matter; equal costs are decided by time, then text.

    Args:
        spoken: what was said, in any order.
        references: what was to be said, in any order.
        window: see `Window`.
        similarity: a name of `list_similarities`, or a function, see `Similarity`.
        threshold: the least similarity of a pair, in [0, 1]; 0 matches by time alone, whatever is said.
        rejection: the price of a reference that stays alone; the sum of all costs is then the least possible, and no
            pair costs more than this. By default any pair is better than none.

    Raises:
        PolicyError: threshold or rejection outside its range, or an unknown similarity.
        ScoreError: the similarity returned something other than a number in [0, 1] per pair.
    """
    if not 0 <= threshold <= 1:
        raise PolicyError(f"threshold must be from 0 to 1, not {threshold}")
    if rejection is not None and not 0 <= rejection < math.inf:
        raise PolicyError(f"rejection must be 0 or more, not {rejection}")
    said, wanted = _sorted(spoken), _sorted(references)
    times = [spoken[i].time for i in said]
    near: list[tuple[int, int]] = []
    for row, j in enumerate(wanted):
        first = bisect_left(times, references[j].time - window.latest - _ROUNDING)
        last = bisect_right(times, references[j].time - window.earliest + _ROUNDING)
        near += [(row, column) for column in range(first, last)]
    values = get_similarity(similarity)(
        [spoken[said[column]].text for _, column in near], [references[wanted[row]].text for row, _ in near]
    )
    costs: list[dict[int, int]] = [{} for _ in wanted]
    similarities: dict[tuple[int, int], float] = {}
    for (row, column), value in zip(near, values, strict=True):
        if value >= threshold:
            off = abs(times[column] - references[wanted[row]].time) / window.reach if window.reach else 0.0
            costs[row][column] = round(_UNIT * (1 - value + TIME_WEIGHT * min(off, 1.0) ** TIME_POWER))
            similarities[row, column] = value
    if rejection is None:
        price = 2 * _UNIT * (min(len(said), len(wanted)) + 1)
    else:
        price = round(_UNIT * rejection)
    pairs = tuple(
        Pair(
            said[column],
            wanted[row],
            times[column] - references[wanted[row]].time,
            similarities[row, column],
        )
        for row, column in assign(costs, price)
    )
    answered = {pair.reference for pair in pairs}
    useful = {pair.spoken for pair in pairs}
    return Matching(
        pairs,
        tuple(j for j in wanted if j not in answered),
        tuple(i for i in said if i not in useful),
    )


def assign(costs: Sequence[Mapping[int, float] | Sequence[float]], rejection: float) -> list[tuple[int, int]]:
    """Give every row a column of its own, or leave it alone at a price, so that the sum is the least possible.

    Shortest augmenting paths over reduced costs, one row at a time (Jonker and Volgenant 1987), with a private column
    of cost `rejection` for every row, so a full assignment always exists. Exact for whole numbers of any size; with
    floats it is as good as their sums. The same input always gives the same pairs.

    Args:
        costs: for every row, what each column costs: a mapping from column to cost, where a column that is not in it
            is not allowed, or a sequence with the costs of columns 0, 1, ... A cost of 0 is a cost like any other.
        rejection: what a row that stays alone costs.

    Returns:
        `(row, column)` in the order of rows. No pair costs more than `rejection`.

    Raises:
        DataError: a cost that is not a finite number, or a column below 0.
    """
    rows = [_checked(row, i, rejection) for i, row in enumerate(costs)]
    of_row: dict[int, float] = {}
    of_column: dict[int, float] = {}
    owner: dict[int, int] = {}
    taken: dict[int, int] = {}
    for new in range(len(rows)):
        of_row[new] = 0
        done, parent, end = _shortest_path(new, rows, of_row, of_column, owner)
        length = done[end]
        for column, distance in done.items():
            if column in owner:
                of_column[column] = of_column.get(column, 0) - (length - distance)
                of_row[owner[column]] += length - distance
        of_row[new] += length
        while True:
            row = parent[end]
            before = taken.get(row)
            owner[end], taken[row] = row, end
            if before is None:
                break
            end = before
    return [(row, taken[row]) for row in range(len(rows)) if taken[row] >= 0]


def _shortest_path(
    new: int,
    rows: Sequence[Mapping[int, float]],
    of_row: Mapping[int, float],
    of_column: Mapping[int, float],
    owner: Mapping[int, int],
) -> tuple[dict[int, float], dict[int, int], int]:
    """From a row to the nearest column that nobody owns: distances of the columns passed, the row before each, and
    that column."""
    done: dict[int, float] = {}
    best: dict[int, float] = {}
    parent: dict[int, int] = {}
    heap: list[tuple[float, bool, int]] = []
    row = new
    so_far: float = 0
    while True:
        for column, cost in rows[row].items():
            if column in done:
                continue
            distance = so_far + cost - of_row[row] - of_column.get(column, 0)
            if column not in best or distance < best[column]:
                best[column], parent[column] = distance, row
                heapq.heappush(heap, (distance, column < 0, column))
        while True:
            so_far, _, column = heapq.heappop(heap)
            if column not in done:
                break
        done[column] = so_far
        if column not in owner:
            return done, parent, column
        row = owner[column]


def _checked(row: Mapping[int, float] | Sequence[float], index: int, rejection: float) -> dict[int, float]:
    """The costs of a row, its private column, below 0, included."""
    out = dict(row) if isinstance(row, Mapping) else dict(enumerate(row))
    for column, cost in out.items():
        if column < 0 or not math.isfinite(cost):
            raise DataError(f"row {index}: column {column} costs {cost}; columns count from 0, costs are finite")
    out = {column: cost for column, cost in out.items() if cost <= rejection}
    out[-1 - index] = rejection
    return out


def _sorted(utterances: Sequence[Utterance]) -> list[int]:
    """Indices in the order of time, then text."""
    return sorted(range(len(utterances)), key=lambda i: (utterances[i].time, utterances[i].text))
