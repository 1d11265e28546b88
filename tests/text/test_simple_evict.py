"""The earlier system's names: its numbers, and an eviction from a stock cache that really happens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import kvsieve.text
import models
from kvsieve import SieveCache, get_policy
from kvsieve.errors import PolicyError, UnsupportedOperationError
from kvsieve.text import SimpleEvictConfig, build_simple_keep_token_idx, evict_dynamic_cache_inplace


def runs(total_len: int, cfg: SimpleEvictConfig, block_n: int = 128) -> list[tuple[int, int]]:
    """First and last slot of every unbroken run that stays."""
    slots = build_simple_keep_token_idx(total_len=total_len, block_n=block_n, cfg=cfg).tolist()
    starts = [s for i, s in enumerate(slots) if not i or s != slots[i - 1] + 1]
    ends = [s for i, s in enumerate(slots) if i + 1 == len(slots) or slots[i + 1] != s + 1]
    return list(zip(starts, ends, strict=True))


def uniform(sink: int = 256, recent: int = 512, budget: int = 0, stride: int = 0) -> SimpleEvictConfig:
    return SimpleEvictConfig(sink, recent, "uniform", budget, stride)


def size(total_len: int, cfg: SimpleEvictConfig, block_n: int = 128) -> int:
    return build_simple_keep_token_idx(total_len=total_len, block_n=block_n, cfg=cfg).numel()


# ---- which slots stay


@pytest.mark.parametrize(
    ("total_len", "cfg", "want"),
    [
        (4096, SimpleEvictConfig(), [(0, 255), (3584, 4095)]),
        (4096, uniform(budget=512), [(0, 383), (1280, 1407), (2304, 2431), (3456, 4095)]),
        (2000, uniform(budget=256), [(0, 383), (1280, 1407), (1488, 1999)]),
        (768, SimpleEvictConfig(), [(0, 767)]),
        (769, SimpleEvictConfig(), [(0, 255), (257, 768)]),
    ],
)
def test_runs_of_the_earlier_system(total_len, cfg, want):
    assert runs(total_len, cfg) == want


@pytest.mark.parametrize(
    ("total_len", "cfg", "kept"),
    [
        (4096, uniform(stride=2), 2432),
        (4096, uniform(stride=2, budget=512), 2432),  # the stride wins
        (4096, uniform(stride=3), 1920),
        (4096, uniform(stride=10**9), 768 + 128),
        (769, uniform(budget=256), 768),  # below its own target of 1024
        (1000, uniform(budget=256), 896),
        (1000, uniform(budget=1), 896),  # one whole block, above its target
        (1000, uniform(budget=200), 896),
        (4096, uniform(), 768),
        (4000, uniform(100, 500, 10**6), 4000 - 72),  # what lies between a block's edge and the sinks is lost
        (50, uniform(0, 0), 0),
        (50, uniform(-4, -8), 0),
    ],
)
def test_numbers_of_the_earlier_system(total_len, cfg, kept):
    assert size(total_len, cfg) == kept


def test_many_runs():
    assert len(runs(8192, uniform(recent=1024, budget=2816))) == 22
    assert size(8192, uniform(recent=1024, budget=2816)) == 4096
    assert runs(4096, uniform(stride=2))[1:-1] == [(b * 128, b * 128 + 127) for b in range(4, 27, 2)]
    assert runs(4096, uniform(4, 512, budget=10**6))[:2] == [(0, 3), (128, 4095)]


@settings(max_examples=150, deadline=None)
@given(
    total_len=st.integers(0, 400),
    sink=st.integers(0, 60),
    recent=st.integers(0, 60),
    budget=st.integers(0, 300),
    stride=st.integers(0, 5),
    block_n=st.integers(1, 40),
)
def test_the_rule_in_plain_lists(total_len, sink, recent, budget, stride, block_n):
    got = build_simple_keep_token_idx(total_len=total_len, block_n=block_n, cfg=uniform(sink, recent, budget, stride))
    want = set(range(total_len))
    if total_len > sink + recent:
        start, end = -(-sink // block_n), (total_len - recent) // block_n
        n, keep = end - start, max(1, budget // block_n)
        blocks: list[int] = []
        if stride:
            blocks = list(range(start, end, stride))
        elif budget and n > 0:
            blocks = [start + (i * (n - 1) // (keep - 1) if keep > 1 else 0) for i in range(keep)]
            blocks = list(range(start, end)) if keep >= n else blocks
        want = {s for b in blocks for s in range(b * block_n, (b + 1) * block_n)}
        want |= {*range(sink), *range(total_len - recent, total_len)}
    assert got.tolist() == sorted(want)
    assert got.dtype == torch.long


def test_blocks_are_reckoned_in_whole_numbers():
    """Float32 puts the 22nd of 43 blocks among 49 at 23."""
    slots = build_simple_keep_token_idx(total_len=50, block_n=1, cfg=uniform(0, 1, budget=43)).tolist()
    assert slots[21] == 24


def test_targets():
    assert SimpleEvictConfig().cache_target == 768
    assert uniform(budget=512).cache_target == 1280
    assert uniform(budget=512, stride=2).cache_target == 768
    assert SimpleEvictConfig(middle_budget_tokens=512).cache_target == 768
    upper = SimpleEvictConfig(middle_strategy="UNIFORM", middle_budget_tokens=512)
    assert upper.cache_target == size(4096, upper) == 1280
    assert SimpleEvictConfig(-4, -8).cache_target == -12


def test_unknown_strategies_and_blocks():
    wrong = SimpleEvictConfig(middle_strategy="random")
    with pytest.raises(PolicyError, match="'random' is not"):
        build_simple_keep_token_idx(total_len=10, cfg=wrong)
    with pytest.raises(PolicyError, match="'random' is not"):
        _ = wrong.cache_target
    with pytest.raises(PolicyError, match="block_n must be 1"):
        build_simple_keep_token_idx(total_len=10, block_n=0, cfg=SimpleEvictConfig())


def test_names_are_found_when_asked_for():
    assert {"SimpleEvictConfig", "evict_dynamic_cache_inplace"} <= set(kvsieve.text.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvsieve.text.nothing


# ---- eviction from a stock cache


CFG = uniform(4, 12, budget=8)
BLOCK = 4


@torch.no_grad()
def stream(model, ids, sizes, pass_positions):
    """Logits of a text fed in chunks with an eviction after each, and `[N, N]` bool of what every query could see."""
    cache, out, start = DynamicCache(config=model.config), [], 0
    held = torch.zeros(0, dtype=torch.long)
    visible = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    for count in sizes:
        new = torch.arange(start, start + count)
        extra = {"position_ids": new.expand(ids.shape[0], -1)} if pass_positions else {}
        out.append(model(ids[:, new], past_key_values=cache, **extra).logits)
        visible[start : start + count, held] = True
        visible[start : start + count, new] = torch.ones(count, count, dtype=torch.bool).tril()
        held, start = torch.cat([held, new]), start + count
        stays = build_simple_keep_token_idx(total_len=len(held), block_n=BLOCK, cfg=CFG)
        evict_dynamic_cache_inplace(cache, stays)
        held = held[stays]
        assert [layer.keys.shape[2] for layer in cache.layers] == [len(held)] * len(cache.layers)
        assert [layer.values.shape[2] for layer in cache.layers] == [len(held)] * len(cache.layers)
        assert cache.get_seq_length() == start
    assert len(held) < ids.shape[1]
    return torch.cat(out, 1), visible, cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pass_positions", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_logits_are_those_of_a_full_forward_with_the_evicted_masked(family, pass_positions, attention):
    model, ids = models.build(family, attention=attention), models.words(2, 70)
    got, visible, _ = stream(model, ids, [30, 1, 1, 17, 1, 20], pass_positions)
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    want = model(ids, attention_mask=mask, use_cache=False).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    assert float((got - model(ids).logits).abs().max()) > 1e-2


@torch.no_grad()
def test_generate_goes_on_after_an_eviction():
    model, ids = models.stock("llama"), models.words(1, 40)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    stays = build_simple_keep_token_idx(total_len=39, block_n=BLOCK, cfg=CFG)
    evict_dynamic_cache_inplace(cache, stays)
    got = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    visible = torch.ones(46, 46, dtype=torch.bool).tril()
    visible[39:, :39] = False
    visible[39:, stays] = True
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits = model(got, attention_mask=mask[:, :, : got.shape[1], : got.shape[1]], use_cache=False).logits
    assert torch.equal(got[0, 40:], logits[0, 39:-1].argmax(-1))
    assert got.shape == (1, 46)


@torch.no_grad()
def test_what_came_before_an_eviction_cannot_be_taken_back():
    model, ids = models.stock("llama"), models.words(1, 40)
    _, _, cache = stream(model, ids, [40], False)
    held = cache.layers[0].keys.shape[2]
    model(ids[:, :5], past_key_values=cache)
    cache.crop(-5)
    assert (cache.get_seq_length(), cache.layers[1].keys.shape[2]) == (40, held)
    with pytest.raises(UnsupportedOperationError, match="only 0 came after the last eviction"):
        cache.crop(-1)


@torch.no_grad()
def test_an_evicted_cache_can_be_reset_and_emptied():
    model, ids = models.stock("llama"), models.words(1, 40)
    _, _, cache = stream(model, ids, [40], False)
    evict_dynamic_cache_inplace(cache, torch.tensor([], dtype=torch.long))
    assert (cache.get_seq_length(), cache.layers[0].keys.shape[2]) == (40, 0)
    got = model(ids[:, :3], past_key_values=cache).logits
    alone = model(ids[:, :3], position_ids=torch.arange(40, 43)[None]).logits
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_caches_that_cannot_be_thinned():
    """The earlier system left them as they were, silently."""
    one = torch.tensor([0])
    model, ids = models.stock("llama"), models.words(1, 8)
    managed = SieveCache(models.managed("llama"), get_policy("full"))
    static = StaticCache(config=model.config, max_cache_len=16)
    hybrid = DynamicCache(config=models.stock("gemma3").config)
    models.stock("gemma3")(ids, past_key_values=hybrid)
    for cache, message in [
        (managed, "evicts by its own policy"),
        (static, "StaticCache: only transformers.DynamicCache"),
        (((one, one),), "tuple: only"),
        (object(), "object: only"),
        (hybrid, "layers of the kind DynamicSlidingWindowLayer"),
        (DynamicCache(), "holds nothing yet"),
        (DynamicCache(config=model.config), "holds nothing yet"),
    ]:
        with pytest.raises(UnsupportedOperationError, match=message):
            evict_dynamic_cache_inplace(cache, one)
    assert hybrid.get_seq_length() == 8


@torch.no_grad()
def test_slots_that_do_not_fit():
    model = models.stock("llama")
    cache = DynamicCache(config=model.config)
    model(models.words(1, 8), past_key_values=cache)
    for slots, message in [
        (torch.tensor([8]), "slots 8 to 8; this cache holds slots 0 to 7"),
        (torch.tensor([-1, 2]), "slots -1 to 2"),
        (torch.tensor([1, 1]), "twice"),
        (torch.tensor([[1]]), r"not \[1, 1\]"),
        (torch.tensor([0.0]), "float32"),
        (torch.ones(8, dtype=torch.bool), "bool"),
    ]:
        with pytest.raises(PolicyError, match=message):
            evict_dynamic_cache_inplace(cache, slots)
    cache.layers[1].crop(-2)
    with pytest.raises(UnsupportedOperationError, match=r"hold \[6, 8\] tokens"):
        evict_dynamic_cache_inplace(cache, torch.tensor([0]))
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 6]
