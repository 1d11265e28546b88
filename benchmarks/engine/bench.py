"""What every group of measurements is handed: sizes, repeats, the clock, the peer, and the list its lines go to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from . import models, resident
from .lines import Line, number, plain
from .models import Size
from .peer import Peer, PeerError
from .timing import Clock, Comparison, Spread, take_turns

SHRINK = 8
"""`--quick` divides lengths and budgets by this."""


@dataclass
class Bench:
    """Settings of one run, and what it has found.

    Attributes:
        quick: tiny sizes, to see that everything works.
        repeats: rounds in which the candidates take turns.
        threads: of torch, where a measure does not ask for one.
        timed_by: `"cpu"`, `"wall"`, or `"auto"` for what `clock_for` chooses.
        peer: kvpress, or the reason why it is not there.
        stream, long_stream: tokens of the endless streams, one at a time and in chunks.
        stream_method, stream_positions: its policy.
    """

    quick: bool
    repeats: int
    threads: int
    timed_by: str
    peer: Peer
    stream: int = 20_000
    long_stream: int = 1_000_000
    stream_method: str = "h2o"
    stream_positions: str = "original"
    lines: list[Line] = field(default_factory=list)

    @property
    def clock(self) -> Clock:
        """How time is taken, with as many threads as there are now."""
        return clock_for(self.threads, self.timed_by)

    def size(self, name: str) -> Size:
        """A model's shape."""
        return (models.QUICK if self.quick else models.SIZES)[name]

    def tokens(self, count: int) -> int:
        """A length or a budget."""
        return count // SHRINK if self.quick else count

    def pair(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[Size, LlamaForCausalLM, LlamaForCausalLM]:
        """The shape, a stock model, and a model over the same weights to put a `SieveCache` on."""
        size = self.size(name)
        stock = models.build(size, dtype)
        return size, stock, models.twin(stock)

    def add(self, line: Line) -> None:
        """Print a line and keep it."""
        self.lines.append(line)
        print(plain(line), flush=True)

    def ratio(
        self, section: str, what: str, found: Comparison, name: str, base: str, *, steps: int = 1, detail: str = "",
        **more: Any,
    ) -> None:  # fmt: skip
        """Add the line that says how `name` compares with `base`; `steps` is how many steps one time stands for."""
        spread = found.ratio(name, base)
        times = f"{_ms(found.time(name) / steps)} against {_ms(found.time(base) / steps)}"
        detail = f"{times}; {detail}" if detail else times
        self.add(Line(section, what, spread.median, low=spread.low, high=spread.high, detail=detail, **more))

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """What runs inside has one thread, and so has the peer."""
        before = self.threads
        self._set(1)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, threads: int) -> None:
        self.threads = threads
        torch.set_num_threads(threads)
        self.peer.set(threads, self.clock)

    def alone(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case of `memory` in a fresh process and return how far its memory rose."""
        environment = os.environ | resident.ENVIRONMENT | {"PYTHONPATH": _path()}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        found = subprocess.run(
            [sys.executable, "-m", f"{__package__}.memory", json.dumps(case)], env=environment, text=True,
            stdout=subprocess.PIPE, check=False,
        )  # fmt: skip
        if found.returncode:
            raise RuntimeError(f"measuring memory of {case} ended with status {found.returncode}")
        result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return result


class PeerPair:
    """A candidate for `take_turns` that asks the peer for two times at once: with its press, and without."""

    def __init__(self, peer: Peer, do: str, **request: Any) -> None:
        self.peer, self.do, self.request = peer, do, request
        self.pressed: list[float] = []
        self.plain: list[float] = []

    def __call__(self) -> float:
        reply = self.peer.ask(self.do, **self.request)
        self.pressed.append(reply["press"])
        self.plain.append(reply["plain"])
        return float(reply["press"])

    def ratio(self, warm_up: int = 2) -> Spread:
        """With its press over without, leaving out the first call, which prepares the case, and the first round."""
        return Spread.of([a / b for a, b in zip(self.pressed[warm_up:], self.plain[warm_up:], strict=True)])

    @property
    def words(self) -> str:
        """`0.68x its own dynamic cache`."""
        return f"{number(self.ratio().median, 'x')} of its own plain run"


def with_peer(
    bench: Bench, candidates: dict[str, Any], pair: PeerPair | None, rounds: int | None = None
) -> tuple[Comparison, str]:
    """`take_turns` with the peer among the candidates where it can answer; its result in words, or why there is
    none."""
    rounds = rounds or bench.repeats
    if pair is None:
        return take_turns(candidates, rounds), ""
    try:
        pair()  # prepares the case, and tells whether the peer can run it
    except PeerError as error:
        return take_turns(candidates, rounds), f"not measured ({error})"
    found = take_turns({**candidates, "peer": pair}, rounds)
    return found, pair.words


def clock_for(threads: int, timed_by: str = "auto", cuda: bool = False) -> Clock:
    """With one thread the processor's time, which other programs disturb little; else the wall's."""
    if timed_by == "auto":
        timed_by = "cpu" if threads == 1 and not cuda else "wall"
    return Clock(timed_by, cuda)


def _ms(seconds: float) -> str:
    return number(1000 * seconds, "ms")


def _path() -> str:
    return str(Path(__file__).resolve().parents[1])
