"""The same on a GPU, at the shapes of Llama-3-8B with random weights: 8k to 128k tokens in bfloat16.

Peak memory is what torch has allocated. Without a GPU every line says that it was not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaForCausalLM

from kvsieve import SieveCache, get_policy
from kvsieve.attention import attention_mass

from .bench import Bench
from .decode import full_to
from .fill import fill_sieve, fill_stock, removing, steps
from .lines import Line, mebibytes
from .models import DTYPES, SIZES, Size, build, short, token_ids, twin
from .prefill import prompt
from .timing import Clock, Comparison, take_turns

LENGTHS = (8192, 32768, 131072)
NO_GPU = "no GPU"
WITH_MASS = "GPU, attention with mass against attention alone"
BATCHED = "GPU, tokens per second with 25 % kept, batch 8, over the full dynamic cache"


def gpu(bench: Bench) -> None:
    """All lines, or why there are none."""
    if not torch.cuda.is_available():
        bench.add(Line("gpu", f"{WITH_MASS}, 32k bfloat16", target=1.6, reason=NO_GPU))
        bench.add(Line("gpu", f"{BATCHED}, 32k bfloat16", target=2.0, at_least=True, reason=NO_GPU))
        bench.add(Line("gpu", "GPU, decode, prefill and memory at 8k to 128k bfloat16", reason=NO_GPU))
        return
    size = SIZES["llama3-8b"]
    bench.add(Line("gpu", f"device: {torch.cuda.get_device_name()}", reason="for the record"))
    measure(bench, size, "cuda", Clock("wall", cuda=True), [bench.tokens(n) for n in LENGTHS])


def measure(bench: Bench, size: Size, device: str, clock: Clock, lengths: list[int], batch: int = 8) -> None:
    """All lines on one device; `lengths[1]` is where the targets are."""
    dtype = DTYPES["bfloat16"]
    for length in lengths:
        attention(bench, size, device, clock, length, target=1.6 if length == lengths[1] else None)
    stock = build(size, dtype, device)
    managed = twin(stock)
    for length in lengths:
        decode(bench, size, stock, managed, device, clock, length)
    throughput(bench, size, stock, managed, device, clock, lengths[1], batch)
    for length in lengths:
        # counting every query's attention is quadratic: at 128k it would take longer than everything else together
        names = ("h2o", "snapkv") if length in lengths[:2] else ("snapkv",)
        prefill(bench, size, stock, managed, device, clock, length, names)


def attention(bench: Bench, size: Size, device: str, clock: Clock, length: int, target: float | None) -> None:
    """One layer's causal attention over a prompt, alone and with the mass that every key receives."""
    generator = torch.Generator(device).manual_seed(9)
    shape = (1, size.heads, length, size.head_dim)
    options: dict[str, Any] = {"generator": generator, "dtype": DTYPES["bfloat16"], "device": device}
    q = torch.randn(shape, **options)
    k, v = (torch.randn(1, size.kv_heads, *shape[2:], **options) for _ in range(2))

    def alone() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def with_mass() -> tuple[torch.Tensor, torch.Tensor]:
        return alone(), attention_mass(q, k, causal_offset=0)

    found = take_turns({"alone": lambda: clock.seconds(alone), "mass": lambda: clock.seconds(with_mass)}, bench.repeats)
    bench.ratio("gpu", f"{WITH_MASS}, {short(length)} bfloat16", found, "mass", "alone", target=target)


def decode(
    bench: Bench, size: Size, stock: LlamaForCausalLM, managed: LlamaForCausalLM, device: str, clock: Clock, length: int
) -> None:
    """A decode step of one sequence in four states of the cache, against the full dynamic cache."""
    dtype, count = DTYPES["bfloat16"], 4
    theirs = DynamicCache(config=stock.config)
    fill_stock(theirs, size, length, dtype, device=device)
    states: dict[str, SieveCache] = {}
    for name, policy in (
        ("no eviction", get_policy("full")),
        ("knorm, 25 % kept", removing("knorm", size, 0.75)),
        ("adakv_snapkv, 25 % kept", removing("adakv_snapkv", size, 0.75)),
    ):
        states[name] = SieveCache(managed, policy)
        fill_sieve(states[name], size, length, dtype, device=device)
    budget = max(length // 16, 64)
    states[f"h2o, {budget} held"] = full_to(
        managed, size, get_policy("h2o", budget=budget), length, dtype, device=device
    )
    found = _turns(bench, clock, count, {"dynamic": (stock, theirs)} | {n: (managed, c) for n, c in states.items()})
    for name in states:
        what = f"GPU, decode step, {name}, {short(length)} bfloat16, against the full dynamic cache"
        bench.ratio("gpu", what, found, name, "dynamic", steps=count)


def throughput(
    bench: Bench, size: Size, stock: LlamaForCausalLM, managed: LlamaForCausalLM, device: str, clock: Clock,
    length: int, batch: int,
) -> None:  # fmt: skip
    """Tokens per second of a batch, three quarters of the cache gone."""
    dtype, count = DTYPES["bfloat16"], 4
    theirs, mine = DynamicCache(config=stock.config), SieveCache(managed, removing("knorm", size, 0.75))
    fill_stock(theirs, size, length, dtype, batch=batch, device=device)
    fill_sieve(mine, size, length, dtype, batch=batch, device=device)
    found = _turns(bench, clock, count, {"dynamic": (stock, theirs), "knorm": (managed, mine)})
    speed = found.ratio("dynamic", "knorm")
    pace = [batch * count / found.time(name) for name in ("knorm", "dynamic")]
    bench.add(
        Line(
            "gpu", f"{BATCHED}, {short(length)} bfloat16", speed.median, low=speed.low, high=speed.high, target=2.0,
            at_least=True, detail=f"{pace[0]:.0f} against {pace[1]:.0f} tokens per second",
        )
    )  # fmt: skip


def prefill(
    bench: Bench, size: Size, stock: LlamaForCausalLM, managed: LlamaForCausalLM, device: str, clock: Clock,
    length: int, names: tuple[str, ...],
) -> None:  # fmt: skip
    """A prompt with some methods against a prompt with none."""
    ids = token_ids(size, length).to(device)
    policies = {name: removing(name, size, 0.5) for name in names}
    plain = partial(prompt, stock, ids, None)
    pressed = {name: partial(prompt, managed, ids, policy) for name, policy in policies.items()}
    work = {"plain": plain, **pressed}
    found = take_turns({name: partial(clock.seconds, each) for name, each in work.items()}, min(bench.repeats, 3))
    for name in policies:
        peaks = [
            _peak(device, pressed[name]),
            _peak(device, plain),
        ]
        memory = f"peak memory {mebibytes(peaks[0])} against {mebibytes(peaks[1])}" if device == "cuda" else ""
        what = f"GPU, prefill of {short(length)} with {name}, bfloat16, against plain prefill"
        bench.ratio("gpu", what, found, name, "plain", detail=memory)


def _turns(bench: Bench, clock: Clock, count: int, caches: dict[str, tuple[LlamaForCausalLM, Any]]) -> Comparison:
    def burst(model: LlamaForCausalLM, cache: Any) -> Callable[[], float]:
        return lambda: clock.seconds(lambda: steps(model, cache, count))

    return take_turns({name: burst(model, cache) for name, (model, cache) in caches.items()}, bench.repeats)


def _peak(device: str, work: Callable[[], Any]) -> int:
    """Most bytes allocated during `work` above what there was before."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
