"""An endless stream: token after token, or a few at a time, into a cache that is full, until the time of a step and the
memory of the process have had every chance to grow."""

from __future__ import annotations

import statistics
import time

import torch

from kvsieve import SieveCache, get_policy

from . import resident
from .bench import Bench
from .lines import Line, mebibytes, number
from .timing import Spread

PARTS, CHUNK = 10, 16


def stream(bench: Bench) -> None:
    """Model S at a budget of 1k: one token per pass, and far more of them in chunks."""
    _measure(bench, bench.stream, 1)
    _measure(bench, bench.long_stream, CHUNK)


def _measure(bench: Bench, total: int, chunk: int) -> None:
    """`total` tokens, `chunk` at a time, after a warm-up of twice the budget."""
    size, _, model = bench.pair("S")
    budget, total = bench.tokens(1024), total // chunk
    warm_up = 2 * budget // chunk
    if total < 20 * PARTS:
        raise ValueError(
            f"a stream of {total} passes is too short to be divided; it takes {20 * PARTS} of {chunk} tokens"
        )
    cache = SieveCache(model, get_policy(bench.stream_method, budget=budget), positions=bench.stream_positions)
    generator = torch.Generator().manual_seed(8)
    seconds: list[float] = []
    memory: list[int] = []
    stored: set[int] = set()
    report_every = max(total // PARTS, 1)
    began = time.perf_counter()
    for index in range(warm_up + total):
        token = torch.randint(size.vocabulary, (1, chunk), generator=generator)
        start = bench.clock.now()
        with torch.no_grad():
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if index < warm_up:
            continue
        seconds.append(bench.clock.now() - start)
        done = len(seconds)
        if done % max(report_every // 10, 1) == 0:
            memory.append(resident.held())
            stored.add(cache.report()["bytes_held"])
        if done % report_every == 0:
            pace = chunk * (warm_up + done) / (time.perf_counter() - began)
            held = cache.report()["bytes_held"]
            print(
                f"  stream: {chunk * done} tokens, {pace:.0f} tokens/s, cache {mebibytes(held)}, "
                f"process {mebibytes(resident.held())}", flush=True,
            )  # fmt: skip
    part = total // PARTS
    first, last = statistics.median(seconds[:part]), statistics.median(seconds[-part:])
    parts = [statistics.median(seconds[i * part : (i + 1) * part]) / first for i in range(PARTS)]
    spread = Spread.of(parts)
    at_once = "one at a time" if chunk == 1 else f"{chunk} at a time"
    what = (
        f"stream of {chunk * total:,} tokens {at_once}, model S, {bench.stream_method} at {budget}, "
        f"{bench.stream_positions} positions"
    )
    bench.add(
        Line(
            "stream", f"{what}: step time of the last tenth over the first after warm-up", last / first,
            low=spread.low, high=spread.high, target=1.1,
            detail=f"{number(1000 * last, 'ms')} against {number(1000 * first, 'ms')}; quartiles over ten parts",
        )
    )  # fmt: skip
    tenth = max(len(memory) // PARTS, 1)
    early, late = statistics.median(memory[:tenth]), statistics.median(memory[-tenth:])
    bench.add(
        Line(
            "stream", f"{what}: memory of the process, last tenth over first", late / early, target=1.02,
            detail=f"{mebibytes(late)} against {mebibytes(early)}",
        )
    )  # fmt: skip
    bench.add(
        Line(
            "stream", f"{what}: different sizes of the cache after warm-up", float(len(stored)), unit="", target=1.0,
            detail=f"{mebibytes(max(stored))}",
        )
    )  # fmt: skip
