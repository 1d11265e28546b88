"""An endless stream: one token after another into a cache that is full, until the time of a step and the memory of the
process have had every chance to grow."""

from __future__ import annotations

import statistics
import time

import torch

from kvsieve import SieveCache, get_policy

from . import resident
from .bench import Bench
from .lines import Line, mebibytes, number
from .timing import Spread

PARTS = 10


def stream(bench: Bench) -> None:
    """Model S at a budget of 1k; warm-up is twice the budget."""
    size, _, model = bench.pair("S")
    budget, total = bench.tokens(1024), bench.stream
    warm_up = 2 * budget
    if total < 20 * PARTS:
        raise ValueError(f"a stream of {total} tokens is too short to be divided; give --stream-tokens {20 * PARTS}")
    cache = SieveCache(model, get_policy(bench.stream_method, budget=budget), positions=bench.stream_positions)
    generator = torch.Generator().manual_seed(8)
    seconds: list[float] = []
    memory: list[int] = []
    stored: set[int] = set()
    report_every = max(total // PARTS, 1)
    began = time.perf_counter()
    for index in range(warm_up + total):
        token = torch.randint(size.vocabulary, (1, 1), generator=generator)
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
            pace = (warm_up + done) / (time.perf_counter() - began)
            held = cache.report()["bytes_held"]
            print(
                f"  stream: {done} tokens, {pace:.0f} tokens/s, cache {mebibytes(held)}, "
                f"process {mebibytes(resident.held())}", flush=True,
            )  # fmt: skip
    part = total // PARTS
    first, last = statistics.median(seconds[:part]), statistics.median(seconds[-part:])
    parts = [statistics.median(seconds[i * part : (i + 1) * part]) / first for i in range(PARTS)]
    spread = Spread.of(parts)
    what = f"stream of {total} tokens, model S, {bench.stream_method} at {budget}, {bench.stream_positions} positions"
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
