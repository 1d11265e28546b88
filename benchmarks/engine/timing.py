"""Times that are compared within one run: the candidates take turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds of a piece of work: of the processor (all threads of this process), or by the wall.

    Attributes:
        kind: `"cpu"`: what other programs take does not count; only for one thread, where it is the time the work
            would take on a quiet machine. `"wall"`: everything counts.
        cuda: whether to wait for the GPU before looking at the clock.
    """

    kind: str = "wall"
    cuda: bool = False

    def now(self) -> float:
        """The time now."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.kind == "cpu" else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long `work` takes."""
        began = self.now()
        work()
        return self.now() - began


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """Seconds of every candidate in every round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> float:
        """Median seconds of a candidate."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Seconds of a candidate over those of another one in the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread.of([mine / max(theirs, 1e-12) for mine, theirs in pairs])


def take_turns(candidates: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Comparison:
    """Let every candidate measure itself (seconds) once per round, in turns, forwards and backwards alternately. The
    `warm_up` first rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for index in range(warm_up + rounds):
        for name in names if index % 2 == 0 else reversed(names):
            took = candidates[name]()
            if index >= warm_up:
                seconds[name].append(took)
    return Comparison(seconds)
