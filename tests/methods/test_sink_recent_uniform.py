"""Sinks, recent tokens and a grid of blocks: the same set however the text comes, no hole in it, the budget kept."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_streams import chunks_of, feed, kept, largest_gap, stream

import models
from kvsieve import SieveCache, get_policy
from kvsieve.budgets import Threshold
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.layer import KVLayer
from kvsieve.policy import Policy
from kvsieve.text.likelihood import perplexity
from kvsieve.text.onepass import one_pass_reason

NAME = "sink_recent_uniform"
LONG = 32_768


def grid(position: int, block_size: int, stride: int) -> float:
    """How often the block's number can be halved; below zero off the first grid."""
    block, rest = divmod(position // block_size, max(stride, 1))
    if rest:
        return -1
    return float("inf") if block == 0 else len(bin(block)) - len(bin(block).rstrip("0"))


def naive(n: int, budget: int, sink: int, recent: int, block_size: int, stride: int = 0) -> list[int]:
    """What stays of `n` tokens, from their positions alone."""
    closed = [p for p in range(n) if p < sink or p >= n - recent]
    others = sorted(set(range(n)) - set(closed), key=lambda p: (grid(p, block_size, stride), p))
    room = max(budget - len(closed), 0)
    return sorted(closed + others[len(others) - min(room, len(others)) :])


def earlier(length: int, chunk: int, sink: int, recent: int, middle: int, block: int, stride: int = 0) -> list[int]:
    """The earlier system in plain lists: after every chunk, blocks of slots of what it holds, if that is too much."""
    held: list[int] = []
    for count in chunks_of(length, chunk):
        start = held[-1] + 1 if held else 0
        held += range(start, start + count)
        if len(held) <= sink + recent + (0 if stride else middle):
            continue
        first, n = -(-sink // block), (len(held) - recent) // block - -(-sink // block)
        keep = max(1, middle // block) if middle else 0
        if stride:
            blocks = list(range(first, first + n, stride))
        elif keep >= n:
            blocks = list(range(first, first + n))
        else:
            blocks = [first + (i * (n - 1) // (keep - 1) if keep > 1 else 0) for i in range(keep)]
        slots = {s for b in blocks for s in range(b * block, b * block + block)}
        slots |= {*range(sink), *range(len(held) - recent, len(held))}
        held = [held[s] for s in sorted(slots)]
    return held


# ---- the same set however the text comes


@functools.cache
def long_run(chunk: int) -> list[int]:
    policy = get_policy(NAME, budget=4096, sink_tokens=256, recent_tokens=1024)
    return stream(policy, chunks_of(LONG, chunk), most=4096)


@pytest.mark.parametrize("chunk", [128, 500, 512])
def test_a_long_stream_has_no_hole(chunk):
    got = long_run(chunk)
    assert len(got) == 4096
    assert largest_gap(got) <= 2048
    assert got == long_run(512) == naive(LONG, 4096, 256, 1024, 128)


def test_a_long_stream_token_by_token():
    """The same at a sixteenth of all sizes, and the last tokens of the full size."""
    policy = get_policy(NAME, budget=256, sink_tokens=16, recent_tokens=64, block_size=8)
    got = stream(policy, [1] * (LONG // 16), most=256)
    assert got == naive(LONG // 16, 256, 16, 64, 8)
    assert largest_gap(got) <= 128
    policy = get_policy(NAME, budget=4096)
    assert stream(policy, [*chunks_of(LONG - 600, 500), *[1] * 600], most=4096) == long_run(512)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_set_depends_on_the_length_alone(data):
    sink, recent = data.draw(st.integers(0, 20), "sink"), data.draw(st.integers(0, 20), "recent")
    budget = data.draw(st.integers(max(sink + recent, 1), sink + recent + 60), "budget")
    block_size, stride = data.draw(st.integers(1, 24), "block_size"), data.draw(st.integers(0, 4), "stride")
    chunks = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 16, 50]), min_size=1, max_size=30), "chunks")
    layer = KVLayer(
        get_policy(
            NAME, budget=budget, sink_tokens=sink, recent_tokens=recent, block_size=block_size, stride=stride
        )
    )  # fmt: skip
    for count in chunks:
        feed(layer, count)
        assert kept(layer) == naive(layer.seen, budget, sink, recent, block_size, stride)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=6),
    sink=st.integers(0, 20),
    recent=st.integers(0, 20),
    more=st.integers(1, 60),
    block_size=st.integers(1, 24),
)
def test_nothing_evicted_is_wanted_back(lengths, sink, recent, more, block_size):
    """Of the set at a later length, what is as old as the earlier one was in the set then."""
    for early, late in zip(sorted(lengths), sorted(lengths)[1:], strict=False):
        before, after = (naive(n, sink + recent + more, sink, recent, block_size) for n in (early, late))
        assert {p for p in after if p < early} <= set(before)


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_a_small_model(chunk):
    model, ids = models.managed("llama"), models.words(1, 60)
    small = {"sink_tokens": 3, "recent_tokens": 8, "block_size": 4}
    cache = SieveCache(model, get_policy(NAME, budget=24, **small))
    with torch.no_grad():
        for piece in ids.split(chunk, dim=1):
            model(piece, past_key_values=cache)
            assert all(layer.core.store.longest <= 24 for layer in cache.managed)
    for layer in range(2):
        assert cache.kept_positions(layer)[0, 1].tolist() == naive(60, 24, 3, 8, 4)


def test_padding_shifts_the_grid():
    padding = torch.ones(3, 200, dtype=torch.bool)
    padding[1, :13] = padding[2, :40] = False
    policy = get_policy(NAME, budget=40, sink_tokens=3, recent_tokens=8, block_size=4)
    for size in (1, 30, 200):
        layer = KVLayer(policy)
        for count in chunks_of(200, size):
            feed(layer, count, padding)
        for row, pads in enumerate((0, 13, 40)):
            assert [p - pads for p in kept(layer, row)] == naive(200 - pads, 40, 3, 8, 4)


# ---- budgets


@pytest.mark.parametrize("size", [1, 64, 300])
def test_bytes(size):
    tokens, room = 80, 1  # the room of a decode step is set aside
    policy = get_policy(NAME, budget=f"{8 * (tokens + room)}B", sink_tokens=10, recent_tokens=20, block_size=8)
    assert stream(policy, chunks_of(300, size), most=tokens) == naive(300, tokens, 10, 20, 8)


def test_a_ratio_of_one_prompt():
    policy = get_policy(NAME, budget=0.25, sink_tokens=10, recent_tokens=20, block_size=8)
    assert stream(policy, [400]) == naive(400, 100, 10, 20, 8)
    assert stream(policy, [20]) == list(range(20)), "what is protected stays, whatever the ratio"
    growing = stream(get_policy(NAME, budget=0.25, when="every_forward", sink_tokens=4, recent_tokens=4), [1] * 400)
    assert len(growing) == 100


@pytest.mark.parametrize("more", [0, 1, 5, 127, 128])
def test_budgets_of_less_than_a_block(more):
    policy = get_policy(NAME, budget=30 + more, sink_tokens=10, recent_tokens=20)
    for size in (1, 64, 1000):
        got = stream(policy, chunks_of(1000, size), most=30 + more)
        assert got == naive(1000, 30 + more, 10, 20, 128)
        assert len(got) == 30 + more


def test_a_budget_below_what_is_protected():
    with pytest.raises(BudgetError, match=r"256 sinks \+ 1024 recent.*smallest legal budget is 1280"):
        get_policy(NAME, budget=1279)
    assert get_policy(NAME, budget=1280).protect.smallest == 1280


def test_a_stride_without_a_budget():
    policy = get_policy(NAME, sink_tokens=10, recent_tokens=20, block_size=8, stride=3)
    assert policy.budget == Threshold(0.0)
    want = [p for p in range(500) if p < 10 or p >= 480 or p // 8 % 3 == 0]
    for size in (1, 64, 500):
        assert stream(policy, chunks_of(500, size)) == want


# ---- the earlier system's way, to compare with


@pytest.mark.parametrize(("chunk", "unseen"), [(128, 28_672), (512, 25_728), (500, 24_824)])
def test_slots_forget_the_middle(chunk, unseen):
    got = stream(get_policy(NAME, budget=4096, resample="slots"), chunks_of(LONG, chunk), most=4096)
    assert got == earlier(LONG, chunk, 256, 1024, 2816, 128)
    assert largest_gap(got) - 1 == unseen


@pytest.mark.parametrize("chunk", [1, 16, 30, 400])
@pytest.mark.parametrize("middle", [0, 8, 16, 64])
def test_slots_are_those_of_the_earlier_system(chunk, middle):
    policy = get_policy(
        NAME, budget=48 + middle, sink_tokens=16, recent_tokens=32, block_size=8, resample="slots"
    )  # fmt: skip
    assert stream(policy, chunks_of(400, chunk)) == earlier(400, chunk, 16, 32, middle, 8)


@pytest.mark.parametrize("chunk", [16, 30, 400])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_stride_over_slots(chunk, stride):
    policy = get_policy(NAME, sink_tokens=10, recent_tokens=30, block_size=8, stride=stride, resample="slots")
    assert stream(policy, chunks_of(400, chunk)) == earlier(400, chunk, 10, 30, 0, 8, stride)


# ---- the rest


def test_one_pass_is_exact_for_history_only():
    model, ids = models.managed("llama", torch.float64), models.words(1, 60)
    small = {"sink_tokens": 3, "recent_tokens": 8, "block_size": 4}
    for chosen in (
        get_policy(NAME, budget=24, **small),
        get_policy(NAME, stride=3, **small),
        get_policy(NAME, budget=24, resample="slots", **small),
    ):
        slots = chosen.scorer.resample == "slots"
        assert (one_pass_reason(chosen) is None) != slots
        fast, slow = perplexity(model, ids, chosen), perplexity(model, ids, chosen, mode="token")
        assert fast.mode == ("layerwise" if slots else "one_pass")
        torch.testing.assert_close(fast.nll, slow.nll, rtol=0, atol=1e-9)
        assert fast.keys_held == slow.keys_held


def test_it_is_plain_data():
    policy = get_policy(NAME, stride=2, resample="slots")
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sink_tokens": -1}, "zero or more"),
        ({"recent_tokens": -1}, "zero or more"),
        ({"stride": -1}, "zero or more"),
        ({"block_size": 0}, "1 or more"),
        ({"resample": "tokens"}, '"history" or "slots"'),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(PolicyError, match=message):
        get_policy(NAME, budget=4096, **changes)


def test_slots_need_a_count():
    policy = get_policy(NAME, threshold=0.0, sink_tokens=2, recent_tokens=4, resample="slots")
    with pytest.raises(PolicyError, match="name a budget"):
        stream(policy, [20])
