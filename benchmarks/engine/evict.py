"""Selecting and evicting in one layer, at the shapes of model M and a long prompt: what is left of a method's cost once
the attention is computed. Against `compress()` of the peer, on the same layer inputs.

kvsieve's time contains freeing memory, also for AdaKV and thresholds, where the peer only marks what it will mask.
kvsieve reads the queries that the model has computed; the peer computes those of a window again. The peer's observed
attention needs the whole matrix, so it is compared at a shorter length, and forming the matrix is part of its time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvsieve import SieveCache
from kvsieve.view import Visibility

from .bench import Bench
from .decode import peer_surrogate
from .fill import random_hidden, removing
from .lines import Line, mebibytes, number
from .models import Size, build, short
from .peer import PeerError
from .timing import take_turns

SHARED = (
    "random", "streaming_llm", "knorm", "keydiff", "lagkv", "tova", "snapkv", "pyramidkv", "adakv_snapkv",
    "expected_attention", "observed_attention", "kvzap",
)  # fmt: skip
TARGETS = {"snapkv": 0.2}
SCRATCH = {"snapkv": 0.5}
QUICK_SCRATCH = ("knorm", "snapkv", "kvzap")
OWN = ("h2o",)
"""Methods the peer does not have; their lines only inform."""


@dataclass
class LayerCase:
    """The first layer of a cache, and a prompt's inputs to it."""

    cache: SieveCache
    hidden: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor

    def store(self) -> None:
        """Put keys and values in; not part of what is measured."""
        core = self.cache.managed[0].core
        core.reset()
        core.append(self.keys, self.values)

    def evict(self) -> object:
        """Score, select, and free."""
        with torch.no_grad():
            core = self.cache.managed[0].core
            core.observe(self.queries, Visibility(0, self.keys.shape[2]), self.hidden)
        return core


def layer_inputs(model: LlamaForCausalLM, size: Size, length: int) -> dict[str, Tensor]:
    """Random hidden states and what the first layer makes of them: rotated queries and keys, and values."""
    generator = torch.Generator().manual_seed(7)
    hidden = random_hidden(size, length, torch.float32, generator)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        split = (1, length, -1, size.head_dim)
        parts = [p(hidden).view(split).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        cosine, sine = model.model.rotary_emb(hidden, torch.arange(length)[None])
        queries, keys = apply_rotary_pos_emb(parts[0], parts[1], cosine, sine)
    return {"hidden": hidden, "queries": queries, "keys": keys, "values": parts[2].contiguous()}


def layer_case(size: Size, method: str, length: int, model: LlamaForCausalLM | None = None) -> LayerCase:
    """Everything `store` and `evict` need; half of the tokens go."""
    model = model or build(size)
    inputs = layer_inputs(model, size, length)
    return LayerCase(SieveCache(model, removing(method, size, 0.5)), **inputs)


def evict(bench: Bench) -> None:
    """Time and scratch memory of every shared method."""
    size, stock, managed = bench.pair("M")
    with bench.one_thread():
        for name in (*SHARED, *OWN):
            length = bench.tokens(2048 if name in ("observed_attention", *OWN) else 32768)
            _time(bench, name, size, stock, managed, length)
        for name in QUICK_SCRATCH if bench.quick else SHARED:
            if name != "observed_attention":
                _scratch(bench, name, size, stock, bench.tokens(32768))
    if bench.peer:
        bench.peer.ask("forget")


def _time(bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, managed: LlamaForCausalLM, length: int) -> None:
    case = layer_case(size, name, length, managed)

    def mine() -> float:
        case.store()
        return bench.clock.seconds(case.evict)

    what = f"selecting and evicting in one layer, {name}, {short(length)}, one thread"
    if name not in SHARED:
        found = take_turns({"kvsieve": mine}, bench.repeats)
        bench.add(Line("evict", what, 1000 * found.time("kvsieve"), "ms", detail="the peer has no such method"))
        return
    what += ", against compress() of the peer"
    target = TARGETS.get(name, 1.0)
    request = _request(bench, name, size, stock, length)

    def theirs() -> float:
        return float(bench.peer.ask("compress", **request)["seconds"])

    try:
        theirs()  # prepares the case
    except PeerError as error:
        alone = number(1000 * take_turns({"kvsieve": mine}, bench.repeats).time("kvsieve"), "ms")
        bench.add(Line("evict", what, target=target, reason=str(error), detail=f"kvsieve {alone}"))
        return
    found = take_turns({"kvsieve": mine, "peer": theirs}, bench.repeats)
    bench.ratio("evict", what, found, "kvsieve", "peer", target=target)


def _scratch(bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, length: int) -> None:
    layer = length * size.bytes_per_token(torch.float32)
    mine = bench.alone({"do": "evict", "method": name, "length": length, "size": asdict(size)})
    try:
        warm = _request(bench, name, size, stock, 256)
        case = {"do": "compress", **_request(bench, name, size, stock, length), "warm_up": warm}
        theirs = number(bench.peer.alone("rise", case=case)["peak"] / layer, "x")
    except PeerError as error:
        theirs = f"not measured ({error})"
    detail = f"{mebibytes(mine['peak'])} of {mebibytes(layer)}; what is kept counts where it is copied"
    if not mine["reset"]:
        detail += "; the mark could not be put back"
    what = f"scratch of evicting in one layer, {name}, {short(length)}, over that layer's cache"
    bench.add(Line("evict", what, mine["peak"] / layer, target=SCRATCH.get(name), peer=theirs, detail=detail))


def _request(bench: Bench, name: str, size: Size, stock: LlamaForCausalLM, length: int) -> dict[str, Any]:
    """What the peer needs to do the same. Empty without a peer, so that no files are written for nobody."""
    if not bench.peer:
        return {}
    parts = ("hidden", "keys", "values") + (("queries",) if name == "observed_attention" else ())
    key = f"layer-{length}-{len(parts)}"
    if not bench.peer.has(key):
        inputs = layer_inputs(stock, size, length)
        bench.peer.file(key, {part: inputs[part] for part in parts})
    request: dict[str, Any] = {
        "press": name, "removed": 0.5, "inputs": bench.peer.file(key, {}),
        **bench.peer.model(size, stock, torch.float32),
    }  # fmt: skip
    if name == "kvzap":
        request |= peer_surrogate(bench, size, 0.5)
    return request
