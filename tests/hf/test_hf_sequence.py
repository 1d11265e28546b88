"""What generation and users do with a cache: more turns, copies, rollbacks, other batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from scenarios import METHODS, generate, policy, same
from transformers import DynamicCache, LogitsProcessor

import models
from kvsieve import SieveCache, UnsupportedOperationError, get_policy
from kvsieve.shares import Share

SIZES = [11, 5, 1, 1, 1, 1]
LENGTH = sum(SIZES)
REPRESENTATIVE = {
    "full": get_policy("full"),
    "streaming_llm": policy("streaming_llm", 8),
    "h2o": policy("h2o", 8),
    "adakv_snapkv": policy("adakv_snapkv", 8),
    "evict3r": policy("evict3r", 8),
    "expected_attention": policy("expected_attention", 0.5),
    "threshold": get_policy("random", threshold=0.6, window=3),
}
EVICTING = {name: chosen for name, chosen in REPRESENTATIVE.items() if name != "full"}


def feed(cache, ids, sizes, mask=None, family="llama") -> torch.Tensor:
    mask = torch.ones(ids.shape[0], cache.get_seq_length() + ids.shape[1], dtype=torch.long) if mask is None else mask
    return oracle.feed(models.managed(family, torch.float64), cache, ids, mask, sizes)


def fresh(chosen, family="llama") -> SieveCache:
    return SieveCache(models.managed(family, torch.float64), chosen)


def same_state(a: SieveCache, b: SieveCache, rows: Any = slice(None)) -> None:
    """The rows of `b` hold what `a` holds."""
    for layer in a.report()["managed_layers"]:
        mine, other = a.kept_positions(layer), b.kept_positions(layer)[rows]
        assert torch.equal(mine, other[..., : mine.shape[-1]])
        assert bool((other[..., mine.shape[-1] :] == -1).all())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# ---- positions


@pytest.mark.parametrize("family", ["llama", "ministral"])
def test_lengths_go_on(family):
    cache = fresh(policy("h2o", 8), family)
    held = 8
    for seen, size in ((0, 11), (11, 5), (16, 1), (17, 1)):
        assert cache.get_seq_length() == seen
        first = cache.report()["managed_layers"][0]
        now = min(seen, held)
        assert cache.get_mask_sizes(size, first) == (now + size, seen - now)
        feed(cache, models.words(2, size), [size], family=family)
    assert cache.get_query_offset(first) == 18
    assert cache.get_max_length(first) == -1
    assert not cache.is_compileable
    assert cache.is_initialized
    assert len(cache) == (2 if family == "llama" else 4)
    assert cache.is_sliding == ([False] * 2 if family == "llama" else [True, False] * 2)


# ---- turns


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_turns_equal_the_stock_cache_while_nothing_is_evicted(family):
    stock, model = models.stock(family), models.managed(family)
    caches = [DynamicCache(config=stock.config), SieveCache(model, policy("snapkv"))]
    ids = [models.words(1, 12), models.words(1, 12)]
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for turn in range(3):
        outs = [m.generate(i, past_key_values=c, **settings)
                for m, c, i in zip((stock, model), caches, ids, strict=True)]  # fmt: skip
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
            assert same(a, b, exact=False)
        ids = [torch.cat([out.sequences, models.words(1, 6, seed=turn + 5)], 1) for out in outs]


def test_embeddings_instead_of_tokens():
    stock, model = models.stock("llama"), models.managed("llama")
    inputs = {"inputs_embeds": stock.model.embed_tokens(models.words(2, 12)).detach()}
    settings = {"max_new_tokens": 5, "do_sample": False}
    want = stock.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, past_key_values=SieveCache(model, policy("h2o"))), want)


@pytest.mark.parametrize("only_new", [False, True], ids=["all ids", "new ids"])
@pytest.mark.parametrize("name", EVICTING)
def test_turns_equal_the_masked_reference(name, only_new):
    model = models.managed("llama", torch.float64)
    cache = SieveCache(model, EVICTING[name])
    notes = oracle.Notes(cache, torch.ones(2, 60))
    ids, got = models.words(2, 14), []
    for turn in range(3):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if only_new:
            inputs["input_ids"] = ids[:, cache.get_seq_length() :]
        out = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
            output_logits=True, stopping_criteria=[oracle.NoteTaker(notes)],
        )  # fmt: skip
        got.append((ids.shape[1] - 1, torch.stack(out.logits, 1)))
        ids = torch.cat([ids, out.sequences[:, -5:], models.words(2, 6, seed=turn + 5)], 1)
    length = cache.get_seq_length()
    visible = {layer: table[..., :length] for layer, table in notes.visible.items()}
    ids = ids[:, :length]
    want = oracle.reference(models.stock("llama", torch.float64), ids, torch.ones_like(ids), visible)
    for start, logits in got:
        assert float((logits - want[:, start : start + 5]).abs().max()) < 1e-5
    assert cache.report()["evictions"] > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_reset(name, family):
    cache, chosen = fresh(REPRESENTATIVE[name], family), REPRESENTATIVE[name]
    feed(cache, models.words(3, 40, seed=9), [36, 1, 1, 1, 1], family=family)
    cache.reset()
    ids = models.words(2, LENGTH)
    other = fresh(chosen, family)
    close(feed(cache, ids, SIZES, family=family), feed(other, ids, SIZES, family=family))
    same_state(cache, other)
    assert cache.report() == other.report()


# ---- copies


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_deepcopy_goes_on_by_itself(name, family):
    cache, first, second = fresh(REPRESENTATIVE[name], family), models.words(2, LENGTH), models.words(2, 6, seed=4)
    feed(cache, first, SIZES, family=family)
    twin = copy.deepcopy(cache)
    assert twin.policy is cache.policy
    same_state(cache, twin)
    feed(cache, models.words(2, 6, seed=8), [3, 1, 1, 1], family=family)  # the original goes elsewhere
    other = fresh(REPRESENTATIVE[name], family)
    feed(other, first, SIZES, family=family)
    close(feed(twin, second, [3, 1, 1, 1], family=family), feed(other, second, [3, 1, 1, 1], family=family))
    same_state(twin, other)


# ---- rollback


@pytest.mark.parametrize(
    ("count", "positive"), [(1, False), (4, False), (5, False), (LENGTH, False), (1, True), (5, True)]
)
def test_crop_before_any_eviction(count, positive):
    """Negative: how many to remove. Positive, as it once was: how many to keep."""
    ids, after = models.words(2, LENGTH), models.words(2, 7, seed=3)
    cache, other = fresh(policy("streaming_llm", 64)), fresh(policy("streaming_llm", 64))
    feed(cache, ids, SIZES)
    cache.crop(LENGTH - count if positive else -count)
    assert cache.get_seq_length() == LENGTH - count
    if count < LENGTH:
        feed(other, ids[:, : LENGTH - count], [LENGTH - count])
    close(feed(cache, after, [5, 1, 1]), feed(other, after, [5, 1, 1]))
    same_state(cache, other)
    assert cache.report()["tokens_seen"] == other.report()["tokens_seen"]


def test_crop_of_a_model_with_sliding_layers():
    ids, after = models.words(1, 16), models.words(1, 5, seed=3)
    cache, other = fresh(policy("knorm"), "gemma3"), fresh(policy("knorm"), "gemma3")
    feed(cache, ids, [12, 4], family="gemma3")
    cache.crop(-4)
    feed(other, ids[:, :12], [12], family="gemma3")
    close(feed(cache, after, [4, 1], family="gemma3"), feed(other, after, [4, 1], family="gemma3"))


def test_crop_of_nothing():
    cache = fresh(policy("h2o", 8))
    cache.crop(-3)
    cache.crop(0)
    feed(cache, models.words(1, 12), [12])
    before = cache.report()
    cache.crop(0)
    cache.crop(12)
    cache.crop(40)
    assert cache.report() == before


def test_crop_after_tokens_that_evicted_nothing():
    """Ratio budgets look after prefill only: what was decoded since can be taken back."""
    ids, chosen = models.words(2, LENGTH), policy("knorm", 0.5)
    cache, other = fresh(chosen), fresh(chosen)
    feed(cache, ids, SIZES)
    feed(other, ids[:, :-3], SIZES[:-3])
    cache.crop(-3)
    same_state(cache, other)
    close(feed(cache, ids[:, -3:], [1, 1, 1]), feed(other, ids[:, -3:], [1, 1, 1]))
    with pytest.raises(UnsupportedOperationError, match="evicted"):
        cache.crop(-5)


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "adakv_snapkv"])
def test_crop_after_eviction_is_an_error(name):
    cache = fresh(policy(name, 8))
    feed(cache, models.words(1, LENGTH), SIZES)
    with pytest.raises(UnsupportedOperationError, match="evicted"):
        cache.crop(-2)
    assert cache.get_seq_length() == LENGTH
    feed(cache, models.words(1, 3, seed=3), [1, 1, 1])


def test_crop_of_counted_attention_is_an_error():
    cache = fresh(policy("h2o", 100))
    feed(cache, models.words(1, LENGTH), SIZES)
    with pytest.raises(UnsupportedOperationError, match="counted"):
        cache.crop(-2)


@dataclass(frozen=True)
class LateLayersHoldMore(Share):
    """Four tokens in the first layer, nine in the others."""

    def per_layer(self, amount, count, seen, view):
        return 9 if view.rank else 4


def test_crop_is_all_or_nothing():
    """Layers that differ in when they have evicted are cropped together or not at all."""
    cache = fresh(policy("streaming_llm", 9, share=LateLayersHoldMore(), when="over:10"))
    feed(cache, models.words(1, 14), [12, 1, 1])
    assert [layer.core.evicted_at for layer in cache.managed] == [12, 14]
    before = [cache.kept_positions(layer) for layer in range(2)]
    with pytest.raises(UnsupportedOperationError):
        cache.crop(-1)
    assert all(torch.equal(cache.kept_positions(layer), before[layer]) for layer in range(2))
    assert [layer.core.seen for layer in cache.managed] == [14, 14]


def test_crop_of_padding():
    """Padding among the last tokens is taken back like any token, and was never counted."""
    ids, mask = models.words(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 10:] = 0
    cache = fresh(policy("streaming_llm", 64, when="every:100"))
    feed(cache, ids, [12], mask)
    assert cache.report()["tokens_seen"] == [10, 12]
    cache.crop(-3)
    assert cache.report()["tokens_seen"] == [9, 9]
    assert cache.report()["tokens_held"][0] == [[9, 9], [9, 9]]


@pytest.mark.parametrize("how", ["lookup", "assisted", "assisted_badly"])
@pytest.mark.parametrize("name", EVICTING)
def test_assisted_decoding_with_eviction(name, how, monkeypatch):
    """Rejected drafts leave no trace: logits equal the masked reference, the cache that of plain decoding in the same
    steps."""
    family = "llama"
    model, stock = models.managed(family, torch.float64), models.stock(family, torch.float64)
    monkeypatch.setattr(models, "stock", lambda f: stock)
    cache = SieveCache(model, EVICTING[name])
    notes = oracle.Notes(cache, torch.ones(1, 60))
    taker = oracle.NoteTaker(notes, settle=True)
    out = generate(model, family, how, cache, max_new_tokens=16, stopping_criteria=[taker])
    ids, prompt = out.sequences, 22
    length = cache.get_seq_length()
    visible = {layer: table[..., :length] for layer, table in notes.visible.items()}
    want = oracle.reference(stock, ids[:, :length], torch.ones(1, length), visible)
    got = torch.stack(out.logits, 1)[:, : length - prompt + 1]
    assert float((got - want[:, prompt - 1 :]).abs().max()) < 1e-5
    assert cache.report()["evictions"] > 0
    assert length >= ids.shape[1] - 1


# ---- other batches


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_rows_are_reordered_repeated_and_selected(name, padded):
    chosen = REPRESENTATIVE[name]
    inputs = models.prompt("llama", 3, LENGTH, padded=padded)
    after = models.words(6, 6, seed=4)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole, apart = fresh(chosen), [fresh(chosen) for _ in range(3)]
    feed(whole, ids, SIZES, mask)
    for row, cache in enumerate(apart):
        feed(cache, ids[row : row + 1], SIZES, mask[row : row + 1])
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), torch.tensor([2, 2, 0])),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda c: c.batch_select_indices(torch.tensor([1])), torch.tensor([1])),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), torch.tensor([0, 2])),
    ):
        cache = copy.deepcopy(whole)
        change(cache)
        new = after[: len(rows)]
        longer = torch.cat([mask[rows], torch.ones_like(new)], 1)
        got = feed(cache, new, [4, 1, 1], longer)
        for i, row in enumerate(rows.tolist()):
            alone = copy.deepcopy(apart[row])
            close(got[i : i + 1], feed(alone, new[i : i + 1], [4, 1, 1], longer[i : i + 1]))
            same_state(alone, cache, slice(i, i + 1))
        assert cache.report()["tokens_seen"] == longer.sum(-1).tolist()


def test_unused_caches_take_every_call():
    cache = fresh(policy("h2o", 8))
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    cache.reset()
    copy.deepcopy(cache)
    feed(cache, models.words(1, 12), [12])


def test_another_batch_size_is_an_error():
    cache = fresh(policy("h2o", 8))
    feed(cache, models.words(2, 12), [12])
    with pytest.raises(UnsupportedOperationError, match="holds 2 sequences, the new tokens have 3"):
        feed(cache, models.words(3, 1), [1])


class Witness(LogitsProcessor):
    """Notes every beam, its scores, and what its row of the cache holds."""

    def __init__(self, cache: SieveCache) -> None:
        self.cache, self.seen = cache, []

    def __call__(self, input_ids, scores):
        kept = {layer: self.cache.kept_positions(layer) for layer in self.cache.report()["managed_layers"]}
        self.seen.append((input_ids.clone(), scores.clone(), kept))
        return scores


@pytest.mark.parametrize("name", METHODS)
def test_beam_search_with_eviction(name):
    """Every beam has the scores and the cache that its own text would have alone."""
    chosen, model, prompt = policy(name, 8), models.managed("llama", torch.float64), 14
    cache = SieveCache(model, chosen)
    witness = Witness(cache)
    model.generate(models.words(2, prompt), past_key_values=cache, num_beams=3, do_sample=False, max_new_tokens=7,
                   logits_processor=[witness])  # fmt: skip
    ids, scores, kept = witness.seen[-1]
    assert ids.shape == (6, prompt + 6)
    assert len({tuple(row.tolist()) for row in ids}) == 6
    for i in range(6):
        alone = SieveCache(model, chosen)
        logits = feed(alone, ids[i : i + 1], [prompt, *[1] * 6])
        torch.testing.assert_close(scores[i], logits[0, -1].log_softmax(-1).to(scores.dtype), rtol=0, atol=1e-4)
        for layer, table in kept.items():
            mine = alone.kept_positions(layer)[0]
            assert torch.equal(table[i, :, : mine.shape[-1]], mine)
