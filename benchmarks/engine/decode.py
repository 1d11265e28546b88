"""A decode step over caches in every state: nothing evicted, half or three quarters gone, heads of unequal length, one
token evicted per step, a small budget in a long text. Always against the dynamic cache of `transformers`, over the
same random keys and values, in bursts that take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from kvsieve import Policy, SieveCache, get_policy

from .bench import Bench, PeerPair, with_peer
from .fill import CHUNK, fill_sieve, fill_stock, held, removing, steps, surrogate, threshold_of
from .lines import Line, number
from .models import DTYPES, Size, short
from .timing import Comparison, take_turns

PLAIN_TARGETS = ((8192, "float32", 0.70), (32768, "float32", 0.45), (32768, "bfloat16", 0.25))
LONG_TARGETS = (("float32", 0.13), ("bfloat16", 0.06))
GATHER = ("knorm", "snapkv", "pyramidkv")
RAGGED = ("adakv_snapkv", "kvzap")
FLOOR = "in place"
PEERS = ("knorm", "snapkv", "pyramidkv", "adakv_snapkv", "kvzap")


def burst_of(tokens: int, dtype: torch.dtype) -> int:
    """Steps of one burst: enough for a stable time, few enough that bursts take turns quickly."""
    return 4 if tokens >= 16384 or dtype == torch.bfloat16 else 8


def plain(bench: Bench) -> None:
    """Nothing is evicted."""
    for length, name, target in PLAIN_TARGETS:
        tokens, dtype = bench.tokens(length), DTYPES[name]
        size, stock, managed = bench.pair("M", dtype)
        count = burst_of(length, dtype)
        mine, theirs = SieveCache(managed, get_policy("full")), DynamicCache(config=stock.config)
        fill_sieve(mine, size, tokens, dtype)
        fill_stock(theirs, size, tokens, dtype)
        found = take_turns(
            {"dynamic": _burst(bench, stock, theirs, count), "kvsieve": _burst(bench, managed, mine, count)},
            bench.repeats,
        )
        what = f"decode step, no eviction, {short(tokens)} {name}, against the dynamic cache"
        bench.ratio("decode", what, found, "kvsieve", "dynamic", steps=count, target=target)


def removed(bench: Bench) -> None:
    """Half and three quarters are gone, the same number from every head."""
    _after(bench, "removed", GATHER, {0.5: 0.55, 0.75: 0.48})


def ragged(bench: Bench) -> None:
    """Half and three quarters are gone, from every head as much as its scores say."""
    _after(bench, "ragged", RAGGED, {0.5: 0.60, 0.75: 0.50})


def _after(bench: Bench, section: str, methods: tuple[str, ...], targets: dict[float, float]) -> None:
    dtype, tokens = torch.float32, bench.tokens(8192)
    size, stock, managed = bench.pair("M", dtype)
    count = burst_of(8192, dtype)
    for name in methods:
        for share, target in targets.items():
            mine, theirs = SieveCache(managed, removing(name, size, share)), DynamicCache(config=stock.config)
            fill_sieve(mine, size, tokens, dtype)
            fill_stock(theirs, size, tokens, dtype)
            kept = sum(held(mine)) / size.layers / tokens
            least = _in_place(managed, size, round(kept * tokens), dtype)
            pair = peer_decode(bench, name, size, stock, share, tokens, count) if name in PEERS else None
            found, words = with_peer(
                bench,
                {
                    "dynamic": _burst(bench, stock, theirs, count), "kvsieve": _burst(bench, managed, mine, count),
                    FLOOR: _burst(bench, managed, least, count),
                },
                pair,
            )  # fmt: skip
            bench.ratio(
                section, f"decode step after {name} removed {share:.0%} of {short(tokens)} float32, against the full "
                "dynamic cache", found, "kvsieve", "dynamic", steps=count, target=target,
                detail=f"{number(100 * kept)} % held at first; {_floor(found, 'dynamic')}", peer=words,
            )  # fmt: skip
    if section == "ragged":
        _decoding_peer(bench, size, stock, tokens, count)


def peer_decode(
    bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, share: float, tokens: int, count: int,
    decoding: bool = False,
) -> PeerPair:  # fmt: skip
    """The peer's decode steps under one of its presses, beside those over its own dynamic cache."""
    dtype = next(stock.parameters()).dtype
    request: dict[str, Any] = {
        "press": name, "removed": share, "length": tokens, "steps": count, "decoding": decoding,
        **bench.peer.model(size, stock, dtype),
    }  # fmt: skip
    if name == "kvzap":
        request |= peer_surrogate(bench, size, share)
    return PeerPair(bench.peer, "decode", **request)


def peer_surrogate(bench: Bench, size: Size, share: float) -> dict[str, Any]:
    """What a request says of KVzap's surrogate and threshold."""
    scorer = surrogate(size)
    path = bench.peer.file(f"kvzap-{size}", dict(scorer.state_dict()))
    shape = {
        "input_dim": size.hidden, "output_dim": size.kv_heads, "n_modules": size.layers, "hidden_dim": None,
        "weights": path,
    }  # fmt: skip
    return {"surrogate": shape, "threshold": threshold_of(scorer, size, share)}


def _decoding_peer(bench: Bench, size: Size, stock: LlamaForCausalLM, tokens: int, count: int) -> None:
    """The peer that also decides while decoding, as kvsieve's threshold does; a line that only informs."""
    for share in (0.5, 0.75):
        what = f"peer: decode step with DMS(KVzap) that evicts while decoding, {share:.0%} of {short(tokens)} float32"
        pair = peer_decode(bench, "kvzap", size, stock, share, tokens, count, decoding=True)
        _, words = with_peer(bench, {}, pair)
        if not pair.plain:
            bench.add(Line("ragged", what, reason=words.removeprefix("not measured ").strip("()")))
            continue
        spread = pair.ratio()
        bench.add(Line("ragged", what, spread.median, low=spread.low, high=spread.high))


def every_step(bench: Bench) -> None:
    """A full budget: every token that comes pushes one out."""
    dtype, budget = torch.float32, bench.tokens(4096)
    size, stock, managed = bench.pair("M", dtype)
    count = burst_of(4096, dtype)
    room = count * (bench.repeats + 1)
    plain, static = SieveCache(managed, get_policy("full")), StaticCache(stock.config, max_cache_len=budget + room)
    fill_sieve(plain, size, budget, dtype)
    fill_stock(static, size, budget, dtype)
    evicting = full_to(managed, size, get_policy("h2o", budget=budget), 2 * budget, dtype)
    found = take_turns(
        {
            "full": _burst(bench, managed, plain, count),
            "static": _burst(bench, stock, static, count),
            "h2o": _burst(bench, managed, evicting, count),
        },
        bench.repeats,
    )
    for base, words in (("full", "kvsieve's `full`"), ("static", "the static cache of transformers")):
        bench.ratio(
            "every_step", f"decode step that evicts (h2o, {budget} held, float32), against {words} with as many in "
            "place", found, "h2o", base, steps=count, target=1.15,
        )  # fmt: skip


def long(bench: Bench) -> None:
    """A long text under a small budget."""
    length, budget = bench.tokens(32768), bench.tokens(2048)
    for name, target in LONG_TARGETS:
        dtype = DTYPES[name]
        size, stock, managed = bench.pair("M", dtype)
        count = burst_of(32768, dtype)
        theirs = DynamicCache(config=stock.config)
        fill_stock(theirs, size, length, dtype)
        mine = full_to(managed, size, get_policy("h2o", budget=budget), length, dtype)
        found = take_turns(
            {
                "dynamic": _burst(bench, stock, theirs, count), "kvsieve": _burst(bench, managed, mine, count),
                FLOOR: _burst(bench, managed, _in_place(managed, size, budget, dtype), count),
            },
            bench.repeats,
        )  # fmt: skip
        bench.ratio(
            "long", f"decode step at {short(length)} {name}, h2o with {budget} held, against the full dynamic cache",
            found, "kvsieve", "dynamic", steps=count, target=target, detail=_floor(found, "dynamic"),
        )  # fmt: skip


def _in_place(model: LlamaForCausalLM, size: Size, tokens: int, dtype: torch.dtype) -> SieveCache:
    """A cache of kvsieve that never held more: what is left of a step when eviction costs nothing."""
    cache = SieveCache(model, get_policy("full"))
    fill_sieve(cache, size, tokens, dtype)
    return cache


def _floor(found: Comparison, base: str) -> str:
    return f"floor: {number(found.ratio(FLOOR, base).median, 'x')}, a plain in-place cache with as many tokens"


def full_to(
    model: LlamaForCausalLM, size: Size, policy: Policy, length: int, dtype: torch.dtype, **where: Any
) -> SieveCache:
    """A cache that has seen `length` tokens in chunks, so that its budget is exhausted."""
    cache = SieveCache(model, policy)
    fill_sieve(cache, size, length, dtype, chunk=min(CHUNK, length // 4), **where)
    return cache


def _burst(bench: Bench, model: LlamaForCausalLM, cache: Any, count: int) -> Callable[[], float]:
    return lambda: bench.clock.seconds(lambda: steps(model, cache, count))
