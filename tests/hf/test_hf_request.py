"""Eviction on request, labels of what is fed, and `positions="contiguous"`."""

from __future__ import annotations

import copy
from dataclasses import replace

import oracle
import pytest
import torch
from scenarios import METHODS, policy

import models
from kvsieve import PolicyError, SieveCache, get_policy
from kvsieve.ledger import KEY, PLACE
from kvsieve.protect import Protect
from kvsieve.triggers import OnRequest

SIZES = [11, 1, 1, 5, 3, 1, 1, 1, 7, 1, 1, 4]
REQUESTS = {3: 12, 4: 9, 7: 9, 9: 14}
"""Which forward passes are followed by an eviction, and to how many tokens."""
CONTIGUOUS = [name for name in METHODS if name not in ("full", "expected_attention")]


def on_request(name: str):
    return replace(policy(name, 14), trigger=OnRequest())


def feed(model, cache, piece):
    start = cache.next_position
    positions = torch.arange(start, start + piece.shape[1])[None]
    with torch.no_grad():
        return model(input_ids=piece, past_key_values=cache, position_ids=positions).logits


@pytest.mark.parametrize("positions", ["slot", "contiguous"])
@pytest.mark.parametrize("name", CONTIGUOUS)
def test_equals_a_hand_written_llama(name, positions):
    """It places what is held by rank; only distances matter to it, so both ways of closing gaps have to agree."""
    model = models.build("llama", torch.float64)
    ids = models.words(1, sum(SIZES))
    cache, hand = SieveCache(model, on_request(name), positions=positions), oracle.HandLlama(model)
    held, start = {}, 0
    for i, size in enumerate(SIZES):
        piece = ids[:, start : start + size]
        start += size
        got, want = feed(model, cache, piece), hand.step(piece, held)
        assert float((got - want).abs().max()) < 3e-4
        if i in REQUESTS:
            before = cache.report()["evictions"]
            cache.evict(REQUESTS[i])
            assert cache.report()["evictions"] > before
        held = {layer: oracle.as_mask(cache.kept_positions(layer), start) for layer in range(2)}
    assert cache.report()["evictions"] > 0


def test_contiguous_keys_lie_where_they_say():
    """After an eviction the keys are those of a model that was fed the kept tokens alone; of layer 0, which sees
    nothing but the tokens."""
    model = models.build("llama", torch.float32)
    ids = models.words(1, 60)
    cache = SieveCache(model, on_request("streaming_llm"), positions="contiguous")
    feed(model, cache, ids[:, :40])
    cache.evict(16)
    feed(model, cache, ids[:, 40:])
    cache.evict(20)
    assert cache.next_position == 20
    kept = cache.kept_positions(0)[0, 0]
    alone = SieveCache(model, get_policy("full"))
    with torch.no_grad():
        model(input_ids=ids[:, kept], past_key_values=alone)
    store, want = cache.managed[0].core.store, alone.managed[0].core.store.read(KEY)
    torch.testing.assert_close(store.read(KEY), want, rtol=0, atol=2e-5)
    assert store.read(PLACE)[0, 0].tolist() == list(range(20))


def test_what_does_not_move_keeps_its_bits():
    model = models.build("llama", torch.float32)
    cache = SieveCache(model, on_request("streaming_llm"), positions="contiguous")
    feed(model, cache, models.words(1, 40))
    before = cache.managed[0].core.store.read(KEY)[:, :, :2].clone()
    for _ in range(3):
        cache.evict(20)
        feed(model, cache, models.words(1, 30))
    assert torch.equal(cache.managed[0].core.store.read(KEY)[:, :, :2], before)


def test_gaps_of_a_shorter_head_close_although_the_longest_lets_nothing_go():
    model = models.build("llama", torch.float32)
    cache = SieveCache(model, on_request("random"), positions="contiguous")
    feed(model, cache, models.words(1, 12))
    core = cache.managed[0].core
    keep = torch.ones(1, 2, 12, dtype=torch.bool)
    keep[0, 1, 2:7] = False
    core.store = core.store.keep(keep)
    core.place(12)
    assert core.store.read(PLACE)[0, 0].tolist() == list(range(12))
    assert core.store.read(PLACE)[0, 1, :7].tolist() == list(range(5, 12))


def test_only_a_request_evicts_and_nothing_fed_is_nothing_evicted():
    model = models.build("llama", torch.float32)
    cache = SieveCache(model, on_request("h2o"))
    cache.evict(8)
    feed(model, cache, models.words(1, 30))
    assert cache.report()["evictions"] == 0
    assert cache.kept_positions(0).shape[-1] == 30
    cache.evict(8)
    assert cache.report()["evictions"] > 0
    assert cache.kept_positions(0).shape[-1] == 8


def test_protected_segments_stay():
    model = models.build("llama", torch.float32)
    chosen = get_policy("random", budget=20, when="request", protect=Protect(segments=(0,)))
    cache = SieveCache(model, chosen)
    ids = models.words(1, 60)
    for i in range(6):
        cache.label(segment=i, kind=torch.full((10,), 1, dtype=torch.uint8))
        feed(model, cache, ids[:, i * 10 : i * 10 + 10])
    cache.evict()
    kept = cache.kept_positions(1)[0]
    assert all(set(range(10)) <= set(row) for row in kept.tolist())
    assert kept.shape[-1] == 20


def test_labels_are_for_one_forward_pass():
    model = models.build("llama", torch.float32)
    cache = SieveCache(model, on_request("random"))
    cache.label(segment=7)
    feed(model, cache, models.words(1, 4))
    feed(model, cache, models.words(1, 4))
    assert cache.managed[0].core.store.read("segment")[0, 0].tolist() == [7] * 4 + [0] * 4


def test_a_copy_and_a_stored_cache_go_on_the_same(tmp_path):
    model = models.build("llama", torch.float32)
    ids = models.words(1, 50)
    cache = SieveCache(model, on_request("h2o"), positions="contiguous")
    feed(model, cache, ids[:, :30])
    cache.evict(12)
    twin = copy.deepcopy(cache)
    cache.save(str(tmp_path / "cache.safetensors"))
    stored = SieveCache.load(str(tmp_path / "cache.safetensors"), model)
    want = feed(model, cache, ids[:, 30:])
    assert torch.equal(feed(model, twin, ids[:, 30:]), want)
    assert torch.equal(feed(model, stored, ids[:, 30:]), want)
    assert stored.next_position == cache.next_position == 32


def test_taking_tokens_back():
    model = models.build("llama", torch.float32)
    ids = models.words(1, 50)
    cache = SieveCache(model, on_request("streaming_llm"), positions="contiguous")
    feed(model, cache, ids[:, :30])
    cache.evict(12)
    want = feed(model, copy.deepcopy(cache), ids[:, 40:])
    feed(model, cache, ids[:, 30:40])
    cache.crop(-10)
    assert cache.next_position == 12
    torch.testing.assert_close(feed(model, cache, ids[:, 40:]), want)


def test_what_does_not_go_together():
    model = models.build("llama", torch.float32)
    with pytest.raises(PolicyError, match="request"):
        SieveCache(model, get_policy("h2o", budget=64), positions="contiguous")
    with pytest.raises(PolicyError, match="slot"):
        SieveCache(model, on_request("expected_attention"), positions="contiguous")
    with pytest.raises(PolicyError, match="by itself"):
        SieveCache(model, get_policy("h2o", budget=64)).evict()
