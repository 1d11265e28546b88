"""Nothing leaks from one sequence, cache or model to another."""

from __future__ import annotations

import copy
import gc
import weakref

import oracle
import pytest
import torch
from scenarios import METHODS, policy, surrogate
from transformers import DynamicCache

import models
from kvsieve import ScoreError, SieveCache, UnsupportedOperationError, get_policy, hf

SIZES = [11, 5, 1, 1, 1, 1, 4, 1]
LENGTH = sum(SIZES)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return models.words(1, LENGTH, seed=1), models.words(2, LENGTH, seed=2)


def feed(model, cache, ids, sizes=tuple(SIZES)) -> torch.Tensor:
    return oracle.feed(model, cache, ids, torch.ones_like(ids), sizes)


def same_state(a: SieveCache, b: SieveCache) -> None:
    assert a.report() == b.report()
    for layer in a.report()["managed_layers"]:
        assert torch.equal(a.kept_positions(layer), b.kept_positions(layer))


@pytest.mark.parametrize("name", METHODS)
def test_interleaved_sequences_under_one_policy(name):
    model, chosen, (first, second) = models.managed("llama"), policy(name, 8), texts()
    apart = [SieveCache(model, policy(name, 8)) for _ in range(2)]
    want = [feed(model, cache, ids) for cache, ids in zip(apart, (first, second), strict=True)]
    together = [SieveCache(model, chosen) for _ in range(2)]
    pieces: list[list[torch.Tensor]] = [[], []]
    start = 0
    for size in SIZES:
        for i, ids in enumerate((first, second)):
            with torch.no_grad():
                piece = ids[:, start : start + size]
                pieces[i].append(model(input_ids=piece, past_key_values=together[i]).logits)
        start += size
    for i in range(2):
        torch.testing.assert_close(torch.cat(pieces[i], 1), want[i], rtol=0, atol=1e-5)
        same_state(together[i], apart[i])


@pytest.mark.parametrize("name", ["full", "h2o", "adakv_snapkv", "evict3r"])
def test_a_cache_that_is_deleted_frees_its_memory_at_once(name):
    model, (ids, _) = models.managed("llama"), texts()
    cache = SieveCache(model, policy(name, 8))
    feed(model, cache, ids)
    twin = copy.deepcopy(cache)
    held = [weakref.ref(layer.core.store) for each in (cache, twin) for layer in each.managed]
    gc.collect()
    gc.disable()
    try:
        del cache, twin
        assert all(store() is None for store in held)
    finally:
        gc.enable()


def test_a_cache_filled_in_inference_mode_is_looked_at_outside(tmp_path):
    model, (ids, _) = models.managed("llama"), texts()
    with torch.inference_mode():
        cache, other = (SieveCache(model, policy("h2o", 8)) for _ in range(2))
        for each in (cache, other):
            model(input_ids=ids[:, :20], past_key_values=each)
            for i in range(20, 25):
                model(input_ids=ids[:, i : i + 1], past_key_values=each)
        want = [other.kept_positions(i) for i in other.report()["managed_layers"]]
    cache.save(str(tmp_path / "cache.safetensors"))
    assert cache.report()["bytes_held"]
    for i, kept in zip(cache.report()["managed_layers"], want, strict=True):
        assert torch.equal(cache.kept_positions(i), kept)
    cache.reorder_cache(torch.tensor([0]))


@pytest.mark.parametrize("name", ["full", "h2o", "adakv_snapkv", "kvzap", "expected_attention"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "smolvlm"])
def test_stock_caches_are_as_they_were(family, name):
    """A fresh model, and one that has held every kind of `SieveCache`, give the same numbers with a stock cache."""
    model, fresh = models.build(family), models.stock(family)
    inputs = models.prompt(family, 2, 30, padded=True)
    cache = SieveCache(model, policy(name, 8, family=family))
    settings = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    for stock in (lambda: None, DynamicCache, lambda: DynamicCache(config=model.config)):
        want = fresh.generate(**inputs, past_key_values=stock(), **settings)
        got = model.generate(**inputs, past_key_values=stock(), **settings)
        assert torch.equal(got.sequences, want.sequences)
        for a, b in zip(got.logits, want.logits, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, fresh(**inputs, use_cache=False).logits)


def test_stock_cache_between_the_steps_of_another():
    model, fresh, (first, second) = models.managed("llama"), models.stock("llama"), texts()
    cache, stock, other = SieveCache(model, policy("kvzap", 8)), DynamicCache(), DynamicCache()
    alone = SieveCache(model, policy("kvzap", 8))
    want = feed(model, alone, first)
    start, got = 0, []
    for size in SIZES:
        with torch.no_grad():
            got.append(model(input_ids=first[:, start : start + size], past_key_values=cache).logits)
            a = model(input_ids=second[:, start : start + size], past_key_values=stock).logits
            b = fresh(input_ids=second[:, start : start + size], past_key_values=other).logits
        assert torch.equal(a, b)
        start += size
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=1e-5)
    same_state(cache, alone)


def test_policies_stay_as_they_are():
    for name in METHODS:
        chosen = policy(name, 8)
        before = copy.deepcopy({k: v for k, v in vars(chosen.scorer).items() if name != "kvzap"})
        feed(models.managed("llama"), SieveCache(models.managed("llama"), chosen), texts()[1])
        assert {k: v for k, v in vars(chosen.scorer).items() if name != "kvzap"} == before
    assert not any(p.requires_grad for p in surrogate("llama").parameters())


def test_hidden_state_hook_is_added_once_and_serves_only_those_who_ask():
    model = models.build("llama")
    for _ in range(3):
        SieveCache(model, policy("kvzap", 8))
    modules = hf.attention_modules(model)
    assert [len(m._forward_pre_hooks) for m in modules.values()] == [1, 1]
    twin = copy.deepcopy(model)
    SieveCache(twin, policy("kvzap", 8))
    assert [len(m._forward_pre_hooks) for m in hf.attention_modules(twin).values()] == [1, 1]
    other = SieveCache(model, policy("h2o", 8))
    feed(model, other, texts()[0])
    assert all(layer.hidden is None for layer in other.managed)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_hidden_states_are_the_input_of_the_attention_block(family):
    model, seen = models.build(family), {}
    cache = SieveCache(model, policy("kvzap", family=family))

    def watch(module, args, kwargs):
        seen[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    for module in hf.attention_modules(model).values():
        module.register_forward_pre_hook(watch, with_kwargs=True)
    inputs = models.prompt(family, 2, 20)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for layer in cache.managed:
        want = surrogate(family).score(layer.core.layer_idx, seen[layer.core.layer_idx])
        assert torch.equal(layer.core.store.read("score"), want)


class Break(torch.nn.Module):
    """Fails inside the second layer, at the first call."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.armed = inner, True

    def forward(self, x):
        if self.armed:
            self.armed = False
            raise RuntimeError("interrupted")
        return self.inner(x)


@pytest.mark.parametrize("where", ["mlp", "self_attn.o_proj", "self_attn.q_proj"])
def test_an_exception_midway_leaves_the_model_usable(where):
    model, fresh, (first, second) = models.build("llama"), models.stock("llama"), texts()
    cache = SieveCache(model, policy("kvzap", 8))
    feed(model, cache, first[:, :16], [11, 5])
    parent, name = model.model.layers[1], where.split(".")[-1]
    if "." in where:
        parent = parent.self_attn
    inner = getattr(parent, name)
    setattr(parent, name, Break(inner))
    with pytest.raises(RuntimeError, match="interrupted"), torch.no_grad():
        model(input_ids=first[:, 16:17], past_key_values=cache)
    setattr(parent, name, inner)
    with torch.no_grad():
        stock = model(input_ids=second, past_key_values=DynamicCache()).logits
        assert torch.equal(stock, fresh(input_ids=second).logits)
    want = feed(model, SieveCache(model, policy("kvzap", 8)), second)
    if where == "self_attn.q_proj":  # after the last attention the cache is whole
        with pytest.raises(UnsupportedOperationError, match="reset"), torch.no_grad():
            model(input_ids=first[:, 17:18], past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(feed(model, cache, second), want, rtol=0, atol=1e-5)


def test_an_interruption_between_storing_and_attending():
    """Then the next forward pass of that cache says so; a stock cache does not even notice."""
    model, (first, second) = models.build("llama"), texts()
    cache = SieveCache(model, policy("h2o", 8))
    layer = cache.managed[0]
    layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with torch.no_grad():
        stock = model(input_ids=second, past_key_values=DynamicCache()).logits
        assert torch.equal(stock, models.stock("llama")(input_ids=second).logits)
        with pytest.raises(NotImplementedError, match=r"reset\(\)"):
            model(input_ids=first, past_key_values=cache)
    cache.reset()
    feed(model, cache, first)


def test_scores_that_are_not_numbers():
    model = models.build("llama")
    model.model.embed_tokens.weight.data[50] = float("nan")
    cache = SieveCache(model, policy("h2o", 4 + 1))
    with pytest.raises(ScoreError, match="NaN"), torch.no_grad():
        model(input_ids=torch.tensor([[20, 30, 50, 60, 70, 80, 90]]), past_key_values=cache)
    cache.reset()
    feed(model, cache, texts()[0].clamp_min(51))


def test_two_models_at_once():
    """One drafts for the other: each has a cache of its own, under the same policy."""
    chosen, inputs = policy("h2o", 8), models.prompt("llama", 1, 20)
    first, second = models.build("llama"), models.build("llama", seed=5)
    want = [m.generate(**inputs, past_key_values=SieveCache(m, chosen), max_new_tokens=8, do_sample=False)
            for m in (first, second)]  # fmt: skip
    caches = [SieveCache(first, chosen), SieveCache(second, chosen)]
    ids = [inputs["input_ids"], inputs["input_ids"]]
    for step in range(8):
        for i, (model, cache) in enumerate(zip((first, second), caches, strict=True)):
            with torch.no_grad():
                new = ids[i] if step == 0 else ids[i][:, -1:]
                token = model(input_ids=new, past_key_values=cache).logits[:, -1:].argmax(-1)
            ids[i] = torch.cat([ids[i], token], 1)
    assert torch.equal(ids[0], want[0])
    assert torch.equal(ids[1], want[1])


def test_one_cache_belongs_to_one_model():
    """A stock model that is handed the cache of another one is noticed at its second step."""
    cache = SieveCache(models.managed("llama"), get_policy("streaming_llm", budget=8))
    stock = models.build("llama")
    ids = texts()[0]
    with torch.no_grad():
        stock(input_ids=ids[:, :8], past_key_values=cache)
        with pytest.raises(NotImplementedError, match="another model"):
            stock(input_ids=ids[:, 8:9], past_key_values=cache)
