"""What a cache really holds, and whether anything that was evicted still takes part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from kvsieve import Policy, SieveCache, get_policy, list_methods
from kvsieve.ledger import VALUE
from kvsieve.ragged import RaggedStore
from kvsieve.store import DenseStore

from .bench import Bench
from .decode import peer_surrogate
from .fill import removing, steps
from .lines import Line, mebibytes, number
from .models import DTYPES, SIZES, Size, build, short, token_ids
from .peer import PeerError
from .prefill import prompt

LEAKS = ("knorm", "h2o", "adakv_snapkv", "kvzap")
PEER_LEAKS = ("adakv_snapkv", "kvzap")


def policy_of(name: str, size: Size, length: int) -> Policy:
    """Every method where it evicts: half of the prompt stays, or the method's own idea of what does."""
    if name == "full":
        return get_policy(name)
    if name == "kvzap":
        return removing(name, size, 0.5)
    if name == "sink_recent_uniform":
        eighth = length // 8
        return get_policy(name, sink_tokens=4, recent_tokens=eighth, block_size=eighth, budget=length // 2)
    return get_policy(name, compression_ratio=0.5)


def bytes_held(bench: Bench) -> None:
    """Storage of keys and values after a prompt and a few steps, over kept tokens times the bytes of one."""
    size, length = SIZES["S"], bench.tokens(2048)
    model = build(size)
    ids = token_ids(size, length)
    for name in list_methods():
        cache = prompt(model, ids, policy_of(name, size, length))
        steps(model, cache, 8)
        report = cache.report()
        kept = sum(torch.tensor(counts).sum().item() for counts in report["tokens_held"].values())
        ideal = kept * size.bytes_per_token(torch.float32) / size.kv_heads
        bench.add(
            Line(
                "bytes", f"bytes held over kept tokens x bytes per token, {name}, {short(length)} and 8 steps",
                report["bytes_held"] / ideal, target=1.05,
                detail=f"{mebibytes(report['bytes_held'])} held, {mebibytes(report['bytes_full'])} uncompressed, "
                f"{mebibytes(report['bytes_ledger'])} of records beside",
            )
        )  # fmt: skip


def leak(bench: Bench) -> None:
    """Attention that later tokens pay to evicted ones; the same probe on both sides."""
    size, length = SIZES["S"], 1024
    for name in LEAKS:
        for tokens in (1, 16, 64):
            model = build(size)
            policy = get_policy(name, budget=length // 2) if name == "h2o" else removing(name, size, 0.5)
            ids = token_ids(size, length + tokens)
            cache = prompt(model, ids[:, :length], policy)
            share = cache.report()["compression_ratio"]
            if share <= 0:
                raise RuntimeError(f"{name} has evicted nothing, so there is nothing to look for")
            found = evicted_mass(model, cache, ids[:, length:])
            what = f"most attention on evicted tokens, {name}, {tokens} new tokens at once after {short(length)}"
            detail = f"{number(100 * share)} % evicted"
            theirs = _peer(bench, name, size, ids, tokens)
            bench.add(Line("leak", what, found, unit="", target=0.0, detail=detail, peer=theirs))


def _peer(bench: Bench, name: str, size: Size, ids: torch.Tensor, tokens: int) -> str:
    if name not in PEER_LEAKS:
        return ""
    try:
        request: dict[str, Any] = {"press": name, "removed": 0.5, "ids": ids[0].tolist(), "tokens": tokens}
        if bench.peer:
            request |= bench.peer.model(size, build(size), DTYPES["float32"])
            request |= peer_surrogate(bench, size, 0.5) if name == "kvzap" else {}
        return f"{bench.peer.ask('leak', **request)['mass']:.2g}"
    except PeerError as error:
        return str(error)


def evicted_mass(model: LlamaForCausalLM, cache: SieveCache, ids: torch.Tensor) -> float:
    """Largest weight that any of the queries `ids` `[1, T]` puts on anything the cache should not hold.

    All storage of values is set to one, then the values of what is held to zero; the new tokens have the value zero
    too. What comes out of the attention is then the weight on everything else. The cache is of no use afterwards.
    """
    found: list[float] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(float(args[0].abs().max()))

    for layer in cache.managed:
        mark_what_is_not_held(layer.core.store)
    attentions = [layer.self_attn for layer in model.model.layers]
    hooks = [attention.o_proj.register_forward_pre_hook(look) for attention in attentions]
    try:
        with torch.no_grad(), silent(attentions):
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)


def mark_what_is_not_held(store: Any) -> None:
    """Values of one everywhere but in the slots that hold a token, which get zeros."""
    values = store.columns[VALUE]
    values.fill_(1.0)
    if isinstance(store, DenseStore):
        values[:, :, : store.longest] = 0.0
    elif isinstance(store, RaggedStore):
        for start, end in store.segments():
            values[start:end] = 0.0
    else:
        raise TypeError(f"a store of another kind: {type(store).__name__}")


@contextmanager
def silent(attentions: list[Any]) -> Iterator[None]:
    """New tokens have the value zero."""
    before = [attention.v_proj.weight.data for attention in attentions]
    for attention in attentions:
        attention.v_proj.weight.data = torch.zeros_like(attention.v_proj.weight)
    try:
        yield
    finally:
        for attention, weight in zip(attentions, before, strict=True):
            attention.v_proj.weight.data = weight
