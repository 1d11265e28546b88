"""A prompt under a method against the same prompt with the stock model and its dynamic cache, one thread."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from kvsieve import Policy, SieveCache

from .bench import Bench, PeerPair, with_peer
from .decode import peer_surrogate
from .evict import SHARED
from .fill import removing
from .lines import Line, mebibytes, number
from .models import Size, short, token_ids
from .peer import PeerError

HEAVY = ("observed_attention", "h2o")
"""Methods that need the attention of every query; their lines have targets."""


def prefill(bench: Bench) -> None:
    """Heavy methods at 8k in time and memory; then every shared method at 2k in time."""
    size, stock, managed = bench.pair("S")
    with bench.one_thread():
        for name in HEAVY:
            _time(bench, name, size, stock, managed, bench.tokens(8192), target=1.6)
        for name in HEAVY:
            _peak(bench, name, size, stock, bench.tokens(8192))
        for name in SHARED:
            if name not in HEAVY:
                _time(bench, name, size, stock, managed, bench.tokens(2048))
    if bench.peer:
        bench.peer.ask("forget")


def _time(
    bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, managed: LlamaForCausalLM, length: int,
    target: float | None = None,
) -> None:  # fmt: skip
    ids, policy = token_ids(size, length), removing(name, size, 0.5)
    pair = PeerPair(bench.peer, "prefill", **_request(bench, name, size, stock, ids)) if name in SHARED else None
    found, words = with_peer(
        bench,
        {
            "plain": lambda: bench.clock.seconds(lambda: prompt(stock, ids, None)),
            "kvsieve": lambda: bench.clock.seconds(lambda: prompt(managed, ids, policy)),
        },
        pair,
    )
    what = f"prefill of {short(length)} with {name}, model S, one thread, against plain prefill: time"
    bench.ratio("prefill", what, found, "kvsieve", "plain", target=target, peer=words)


def _peak(bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, length: int) -> None:
    case = {"do": "prefill", "length": length, "size": asdict(size)}
    mine, plain = (bench.alone(case | {"method": method}) for method in (name, "plain"))
    words = ""
    if name in SHARED:
        try:
            rises = [_peer_peak(bench, name, size, stock, length, which) for which in ("press", "plain")]
            words = f"{number(rises[0] / rises[1], 'x')} of its own plain run, {mebibytes(rises[0])}"
        except PeerError as error:
            words = f"not measured ({error})"
    bench.add(
        Line(
            "prefill", f"prefill of {short(length)} with {name}, model S, one thread, against plain prefill: peak "
            "memory over the loaded model", mine["peak"] / max(plain["peak"], 1), target=1.3, peer=words,
            detail=f"{mebibytes(mine['peak'])} against {mebibytes(plain['peak'])}"
            + ("" if mine["reset"] else "; the mark could not be put back"),
        )
    )  # fmt: skip


def _peer_peak(bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, length: int, which: str) -> float:
    warm = _request(bench, name, size, stock, token_ids(size, 256))
    case = {"do": "prefill", **_request(bench, name, size, stock, token_ids(size, length)), "warm_up": warm}
    return float(bench.peer.alone("rise", case=case, which=which)["peak"])


def _request(bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, ids: Tensor) -> dict[str, Any]:
    if not bench.peer:
        return {}
    request: dict[str, Any] = {
        "press": name, "removed": 0.5, "ids": ids[0].tolist(), **bench.peer.model(size, stock, torch.float32),
    }  # fmt: skip
    if name == "kvzap":
        request |= peer_surrogate(bench, size, 0.5)
    return request


def prompt(model: LlamaForCausalLM, ids: Tensor, policy: Policy | None) -> Any:
    """Feed a prompt; returns the cache."""
    cache = DynamicCache(config=model.config) if policy is None else SieveCache(model, policy)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
