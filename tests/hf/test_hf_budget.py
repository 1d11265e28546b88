"""Budgets hold after every forward pass, and the report says what is measured."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from scenarios import GREEDY, METHODS, policy
from transformers import StoppingCriteria

import models
from kvsieve import BudgetError, Policy, SieveCache, UnsupportedOperationError, get_policy
from kvsieve.ledger import KEY, VALUE

BUDGET = 9


class Watch(StoppingCriteria):
    """Looks at the cache after every forward pass of `generate`."""

    def __init__(self, cache: SieveCache, look: Any) -> None:
        self.cache, self.look, self.looked = cache, look, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.look(self.cache)
        check_report(self.cache)
        self.looked += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def check_report(cache: SieveCache) -> None:
    """The numbers fit each other, the storages and `kept_positions`."""
    report = cache.report()
    used = [layer.core for layer in cache.managed if layer.core.seen]
    measured = sum({c.data_ptr(): c.untyped_storage().nbytes() for core in used
                    for name, c in core.store.columns.items() if name in (KEY, VALUE)}.values())  # fmt: skip
    assert report["bytes_held"] == measured
    live = 0
    for core in used:
        head_dim = core.store.columns[KEY].shape[-1] + core.store.columns[VALUE].shape[-1]
        each = head_dim * core.store.columns[KEY].element_size()
        held = torch.tensor(report["tokens_held"][core.layer_idx])
        kept = cache.kept_positions(core.layer_idx)
        assert torch.equal((kept >= 0).sum(-1), held)
        assert kept.shape[-1] == int(held.max())
        ascending = kept.where(kept >= 0, torch.arange(kept.shape[-1]) + core.seen)
        assert bool((ascending.diff(dim=-1) > 0).all())
        live += int(held.sum()) * each
    assert report["bytes_held"] - report["bytes_spare"] == live
    seen = sum(report["tokens_seen"])
    held = sum(int(torch.tensor(v).sum()) for v in report["tokens_held"].values())
    full = sum(seen * core.store.heads for core in used)
    assert report["compression_ratio"] == pytest.approx(1 - held / full)
    assert report["bytes_full"] == full * each


def run(
    chosen: Policy, look: Any, family: str = "llama", padded: bool = False, length: int = 40, **how: Any
) -> SieveCache:
    model = models.managed(family)
    cache = SieveCache(model, chosen)
    watch = Watch(cache, look)
    settings = {**GREEDY, "max_new_tokens": 12, **how}
    inputs = models.prompt(family, 2, length, padded)
    model.generate(**inputs, past_key_values=cache, stopping_criteria=[watch], **settings)
    assert watch.looked == 12
    return cache


HOW = {"": {}, "chunked": {"prefill_chunk_size": 7}, "beam": {"num_beams": 2}}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [m for m in METHODS if m != "full"])
def test_token_budget(name, how, padded):
    chosen = policy(name, BUDGET)

    def look(cache: SieveCache) -> None:
        held = [torch.tensor(counts) for counts in cache.report()["tokens_held"].values()]
        if chosen.share.uniform:
            total = sum(counts.amax(-1) for counts in held)
            assert bool((total <= BUDGET * len(held)).all())
        if chosen.joint:
            assert bool((total == BUDGET * len(held)).all())
        if type(chosen.share).__name__ == "Uniform":
            assert all(bool((counts == BUDGET).all()) for counts in held)
            assert (
                cache.report()["bytes_spare"]
                <= sum(map(torch.numel, held)) * cache.managed[0].core.store.bytes_per_token
            )
        for counts in held:
            assert chosen.share.uniform or bool((counts.sum(-1) <= BUDGET * counts.shape[-1]).all())
        spare = cache.report()["bytes_spare"] / cache.managed[0].core.store.bytes_per_token
        assert spare <= sum(c.numel() for c in held) * (1 if type(chosen.share).__name__ == "Uniform" else 9)

    cache = run(chosen, look, padded=padded, **HOW[how])
    assert cache.report()["evictions"] > 0


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "adakv_snapkv", "kvzap"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_token_budget_on_every_family(family, name):
    def look(cache: SieveCache) -> None:
        for counts in cache.report()["tokens_held"].values():
            assert int(torch.tensor(counts).sum(-1).max()) <= BUDGET * len(counts[0])

    cache = run(policy(name, BUDGET, family), look, family)
    report = cache.report()
    kinds = report["unmanaged_layers"]
    assert sorted([*report["managed_layers"], *kinds]) == list(range(len(cache.layers)))
    assert bool(kinds) == (family in ("ministral", "gemma2", "gemma3", "gpt_oss"))
    assert set(kinds.values()) <= {"DynamicSlidingWindowLayer"}


@pytest.mark.parametrize("name", ["streaming_llm", "adakv_snapkv", "pyramidkv", "evict3r"])
def test_byte_budget(name):
    most = 30_000

    def look(cache: SieveCache) -> None:
        assert cache.report()["bytes_held"] <= most

    cache = run(policy(name, f"{most}B"), look)
    assert cache.report()["bytes_held"] > most * 0.6


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", ["knorm", "snapkv", "adakv_snapkv"])
def test_ratio_after_prefill_and_always(name, padded):
    pads = torch.tensor([3, 0]) if padded else torch.tensor([0, 0])
    kept = torch.tensor([int(n * 0.4) for n in (40 - pads).tolist()])
    grown = -1

    def look(cache: SieveCache) -> None:
        nonlocal grown
        grown += 1
        for counts in cache.report()["tokens_held"].values():
            assert torch.equal(torch.tensor(counts).sum(-1), 2 * (kept + grown))

    run(policy(name, 0.4), look, padded=padded)

    def look_always(cache: SieveCache) -> None:
        seen = cache.report()["tokens_seen"]
        for counts in cache.report()["tokens_held"].values():
            assert torch.tensor(counts).sum(-1).tolist() == [2 * int(n * 0.4) for n in seen]

    run(policy(name, 0.4, when="every_forward"), look_always, padded=padded)


def test_threshold_frees_memory_per_head():
    chosen = get_policy("knorm", threshold=-12.0, window=4)

    def look(cache: SieveCache) -> None:
        assert cache.report()["bytes_spare"] <= 0.25 * cache.report()["bytes_held"]

    cache = run(chosen, look, length=200)
    counts = torch.tensor(list(cache.report()["tokens_held"].values()))
    assert counts.unique().numel() > 1
    assert cache.report()["compression_ratio"] > 0.2


@pytest.mark.parametrize("name", ["full", "streaming_llm", "h2o", "adakv_snapkv"])
def test_padding_is_never_kept(name):
    def look(cache: SieveCache) -> None:
        for layer in cache.report()["managed_layers"]:
            kept = cache.kept_positions(layer)
            assert not bool(((kept[0] >= 0) & (kept[0] < 3)).any())

    cache = run(policy(name, BUDGET), look, padded=True)
    assert cache.report()["tokens_seen"] == [48, 51]


def tensors() -> list[torch.Tensor]:
    """Every tensor that is alive."""
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


def test_nothing_large_stays_behind():
    """What a forward pass of many tokens leaves alive is no larger than the budget."""
    length, model = 600, models.managed("llama")
    before = {id(t) for t in tensors()}
    for chosen in (policy("h2o", 16), policy("adakv_snapkv", 16), get_policy("knorm", threshold=-8.0)):
        cache = SieveCache(model, chosen)
        with torch.no_grad():
            model(input_ids=models.words(1, length), past_key_values=cache, logits_to_keep=1)
        large = {id(t) for t in tensors() if t.untyped_storage().nbytes() >= length * 32}
        assert large <= before
        assert cache.report()["bytes_held"] < 0.1 * cache.report()["bytes_full"]


def test_unused_and_reset_caches_report_nothing():
    model = models.managed("gemma3")
    cache = SieveCache(model, policy("h2o", BUDGET))
    empty = cache.report()
    assert (empty["bytes_held"], empty["tokens_seen"], empty["compression_ratio"]) == (0, [], 0.0)
    assert cache.kept_positions(1).shape == (0, 0, 0)
    with pytest.raises(UnsupportedOperationError, match="layer 0 is not managed"):
        cache.kept_positions(0)
    with torch.no_grad():
        model(input_ids=models.words(1, 20), past_key_values=cache)
    assert cache.report()["bytes_held"] > 0
    cache.reset()
    assert cache.report() == empty


def test_budgets_that_cannot_be_met():
    model = models.managed("llama")
    with pytest.raises(BudgetError, match="smallest legal budget is 4"):
        policy("h2o", 3)
    cache = SieveCache(model, policy("streaming_llm", "100B"))
    with pytest.raises(BudgetError, match="holds no token"), torch.no_grad():
        model(input_ids=models.words(1, 20), past_key_values=cache)
