"""Every way of scoring a text gives what feeding it to a `SieveCache` token by token gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

import models
from kvsieve import SieveCache, get_policy, list_methods
from kvsieve.errors import (
    DataError,
    KvsieveError,
    PolicyError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from kvsieve.methods.knorm import KNorm
from kvsieve.protect import Protect
from kvsieve.text.likelihood import TextScore, encode, one_pass_reason, perplexity

N = 48
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "kvpress"
FAMILIES = ["llama", "qwen3", "gemma3"]
MEASURED = ("keys_seen", "keys_held", "bytes_held", "bytes_full", "mean_visible_keys")


def text(length: int = N, seed: int = 3) -> torch.Tensor:
    """Distinct ids: equal tokens have equal key norms in the first layer, and a tie there is decided by rounding."""
    ids = torch.randperm(models.LAST_WORD - models.FIRST_WORD, generator=torch.Generator().manual_seed(seed))
    return ids[:length] + models.FIRST_WORD


def tight(name: str):
    """The method with a budget that it hits early in the text."""
    hyper = {"snapkv": {"window_size": 8}, "lagkv": {"lag_size": 8}, "h2o": {"window_size": 5}}
    hyper |= {"pyramidkv": {"window_size": 8}, "adakv_snapkv": {"window_size": 8}}
    hyper |= {"sink_recent_uniform": {"sink_tokens": 3, "recent_tokens": 6, "block_size": 2}}
    if name == "full":
        return get_policy("full")
    try:
        return get_policy(name, budget=24, **hyper.get(name, {}))
    except (KvsieveError, TypeError) as error:
        pytest.skip(f"needs more than a budget: {error}")


def same(a: TextScore, b: TextScore, tolerance: float = 1e-9) -> None:
    assert float((a.nll - b.nll).abs().max()) < tolerance
    assert [getattr(a, key) for key in MEASURED] == pytest.approx([getattr(b, key) for key in MEASURED])
    assert (a.tokens, a.chunk_size) == (b.tokens, b.chunk_size)


class Seen(KNorm):
    """A surrogate in miniature: scores read from the hidden states. Without a name of its own, so not registered."""

    wants_hidden = True

    def token_score(self, view):
        return view.hidden[..., : view.new_keys.shape[1]].sin().transpose(1, 2)


# ---- the reference


@torch.no_grad()
def test_token_mode_is_a_loop_over_a_cache():
    model, ids, policy = models.managed("llama"), text(), get_policy("h2o", budget=24, window_size=4)
    cache = SieveCache(model, policy)
    losses, visible = [], []
    for i in range(N - 1):
        held = [layer.core.store.tokens + 2 for layer in cache.managed]
        logits = model(ids[None, i : i + 1], past_key_values=cache).logits
        visible.append(sum(held))
        losses.append(-logits[0, -1].double().log_softmax(-1)[ids[i + 1]])
    score = perplexity(model, ids, policy, mode="token")
    torch.testing.assert_close(score.nll, torch.stack(losses), rtol=0, atol=2e-6)
    report, heads = cache.report(), 2 * len(cache.managed)
    assert score.nll.dtype == torch.float64
    assert score.keys_seen == (N - 1) * heads
    assert score.keys_held == 24 * heads
    assert score.bytes_held == report["bytes_held"] - report["bytes_spare"] == 24 * heads * 2 * 16 * 4
    assert score.bytes_full == report["bytes_full"]
    assert score.compression_ratio == pytest.approx(report["compression_ratio"])
    assert score.mean_visible_keys == sum(visible) / ((N - 1) * heads)
    assert score.avg_nll == pytest.approx(float(score.nll.mean()))
    assert score.perplexity == pytest.approx(float(score.nll.mean().exp()))
    assert score.seconds > 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_large_chunk_is_a_dense_forward_pass(family):
    ids = text()
    logits = models.stock(family)(ids[None]).logits[0, :-1]
    want = cross_entropy(logits.double(), ids[1:], reduction="none")
    for policy in (get_policy("full"), get_policy("knorm", budget=8)):
        for chunk in (N - 1, N, 10 * N):
            got = perplexity(models.managed(family), ids, policy, chunk_size=chunk)
            assert got.mode == "chunked"
            torch.testing.assert_close(got.nll, want, rtol=0, atol=2e-5)
    assert got.mean_visible_keys == N / 2
    assert got.keys_held == 8 * (got.keys_seen // (N - 1))


@pytest.mark.parametrize("name", ["full", "streaming_llm", "snapkv", "knorm"])
def test_chunks_of_one_are_tokens(name):
    model, ids = models.managed("llama"), text()
    token = perplexity(model, ids, tight(name), mode="token")
    chunked = perplexity(model, ids, tight(name), mode="chunked", chunk_size=1)
    assert torch.equal(token.nll, chunked.nll)
    same(token, chunked)


# ---- the parallel modes


@pytest.mark.parametrize("name", list_methods())
@pytest.mark.parametrize("positions", ["original", "slot"])
def test_layerwise_equals_token_for_every_method(name, positions):
    model, ids, policy = models.managed("llama", torch.float64), text(), tight(name)
    try:
        token = perplexity(model, ids, policy, mode="token", positions=positions)
    except UnsupportedModelError as error:
        pytest.skip(str(error))
    auto = perplexity(model, ids, policy, positions=positions)
    same(token, auto)
    if policy.joint:
        assert auto.mode == "token"
        for mode in ("layerwise", "one_pass"):
            with pytest.raises(PolicyError, match="cuts all layers together"):
                perplexity(model, ids, policy, mode=mode, positions=positions)
        return
    same(token, perplexity(model, ids, policy, mode="layerwise", positions=positions))
    assert auto.mode == ("layerwise" if one_pass_reason(policy, positions) else "one_pass")


@pytest.mark.parametrize("name", ["random", "tova", "h2o", "snapkv", "adakv_snapkv"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "ministral"])
def test_all_modes_agree_on_other_families(family, name):
    model, ids, policy = models.managed(family, torch.float64), text(), tight(name)
    token = perplexity(model, ids, policy, mode="token")
    same(token, perplexity(model, ids, policy, mode="layerwise"))
    same(token, perplexity(model, ids, policy))


@pytest.mark.parametrize("chunk_size", [2, 7, 16])
@pytest.mark.parametrize("name", ["snapkv", "adakv_snapkv", "random"])
def test_layerwise_takes_chunks_too(name, chunk_size):
    model, ids, policy = models.managed("llama", torch.float64), text(), tight(name)
    chunked = perplexity(model, ids, policy, chunk_size=chunk_size)
    layerwise = perplexity(model, ids, policy, chunk_size=chunk_size, mode="layerwise")
    assert (chunked.mode, layerwise.mode) == ("chunked", "layerwise")
    same(chunked, layerwise)


@pytest.mark.parametrize("positions", ["original", "slot"])
def test_scorers_of_hidden_states(positions):
    model, ids = models.managed("llama", torch.float64), text()
    policy = replace(get_policy("knorm", threshold=0.3, window=6), scorer=Seen())
    token = perplexity(model, ids, policy, mode="token", positions=positions)
    assert 0.1 < token.compression_ratio < 0.9
    same(token, perplexity(model, ids, policy, mode="layerwise", positions=positions))
    same(token, perplexity(model, ids, policy, positions=positions))


@pytest.mark.parametrize("options", [{"budget": 20}, {"budget": 0.3, "when": "every_forward"}, {"budget": "24KiB"}])
def test_budgets_of_every_kind(options):
    model, ids = models.managed("llama", torch.float64), text()
    for name in ("random", "h2o"):
        policy = get_policy(name, protect=Protect(recent=2), **options)
        token = perplexity(model, ids, policy, mode="token")
        assert 0.3 < token.compression_ratio < 0.9
        same(token, perplexity(model, ids, policy, mode="layerwise"))
        same(token, perplexity(model, ids, policy))


# ---- reference numbers


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference numbers are not on this machine")
@pytest.mark.parametrize("mode", ["token", "one_pass", "layerwise"])
@pytest.mark.parametrize(
    ("reference", "name", "options"),
    [
        ("baseline", "full", {}),
        ("streaming_sink4_w64", "streaming_llm", {"budget": 4 + 64}),
        ("knorm_thr_w64", "knorm", {"threshold": -1.8719853162765503, "window": 64}),
        ("tova_top100", "tova", {"budget": 100}),
    ],
)
def test_kvpress_numbers(reference, name, options, mode):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_llama", dtype=torch.float32).eval()
    golden = load_file(GOLDEN / "parity.safetensors")
    score = perplexity(model, golden["input_ids"][:1], get_policy(name, **options), mode=mode)
    assert float((score.nll - golden[f"seq_nll/{reference}"]).abs().max()) < 1e-4


# ---- what belongs to whom


def test_policies_leave_nothing_behind():
    model, ids = models.managed("llama"), text()
    first, second = get_policy("h2o", budget=20, window_size=4), get_policy("snapkv", budget=24, window_size=8)
    alone = [perplexity(model, ids, policy, mode="token").nll for policy in (first, second)]
    between: list[torch.Tensor] = []

    def interrupt(done: int, total: int) -> None:
        if done == 30:
            between.extend(perplexity(model, ids, second, mode=mode).nll for mode in ("token", "layerwise"))

    again = perplexity(model, ids, first, mode="token", progress=interrupt)
    assert torch.equal(again.nll, alone[0])
    assert torch.equal(between[0], alone[1])
    torch.testing.assert_close(between[1], alone[1], rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_model_stays_as_it_was():
    model, ids = models.build("gemma3"), text()
    want = model(ids[None], past_key_values=DynamicCache(config=model.config)).logits
    for mode in ("token", "layerwise", "one_pass"):
        perplexity(model, ids, get_policy("tova", budget=16), mode=mode)
        cache = DynamicCache(config=model.config)
        assert torch.equal(model(ids[None], past_key_values=cache).logits, want)
        assert torch.equal(model(ids[None]).logits, want)


@torch.no_grad()
def test_losses_are_computed_in_float32():
    model, ids = models.build("llama", torch.bfloat16), text()
    logits = model(ids[None, :-1]).logits[0]
    assert logits.dtype == torch.bfloat16
    want = cross_entropy(logits.double(), ids[1:], reduction="none")
    rounded = cross_entropy(logits, ids[1:], reduction="none").double()
    got = perplexity(model, ids, get_policy("full"), chunk_size=N).nll
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert float((rounded - want).abs().max()) > 1e-3


def test_progress():
    model, ids = models.managed("llama"), text(12)
    calls: dict[str, list[tuple[int, int]]] = {}
    for mode, chunk in (("token", 1), ("chunked", 4), ("layerwise", 1), ("one_pass", 1)):
        calls[mode] = []
        perplexity(
            model, ids, get_policy("full"), mode=mode, chunk_size=chunk,
            progress=lambda done, total, mode=mode: calls[mode].append((done, total)),
        )  # fmt: skip
    assert calls["token"] == [(i, 11) for i in range(1, 12)]
    assert calls["chunked"] == [(4, 11), (8, 11), (11, 11)]
    assert calls["layerwise"] == calls["one_pass"] == [(1, 2), (2, 2)]


# ---- what is refused


def test_texts_that_cannot_be_scored():
    model, policy = models.managed("llama"), get_policy("full")
    for ids, message in [
        (torch.tensor([5]), "at least 2"),
        (torch.zeros(0, dtype=torch.long), "at least 2"),
        (models.words(2, 10), "one text"),
        (torch.zeros(1, 1, 4, dtype=torch.long), "one text"),
        (torch.ones(8), "integers"),
        (torch.tensor([3, models.VOCAB]), "must lie in"),
        (torch.tensor([3, -1]), "must lie in"),
    ]:
        with pytest.raises(DataError, match=message):
            perplexity(model, ids, policy)
    assert perplexity(model, [3, 4], policy).tokens == 1
    assert perplexity(model, torch.tensor([[3, 4, 5]], dtype=torch.int32), policy).tokens == 2


def test_settings_that_cannot_be_met():
    model, ids = models.managed("llama"), text(10)
    for policy, options, message in [
        (get_policy("full"), {"mode": "fast"}, "one of auto"),
        (get_policy("full"), {"chunk_size": 0}, "1 or more"),
        (get_policy("full"), {"chunk_size": 4, "mode": "one_pass"}, "chunked"),
        (get_policy("full"), {"chunk_size": 4, "mode": "token"}, "chunked"),
        (get_policy("snapkv", budget=70), {"mode": "one_pass"}, 'use mode="auto"'),
        (get_policy("knorm", budget=8), {"mode": "one_pass", "positions": "slot"}, "rotated anew"),
        (get_policy("knorm", budget=0.5), {}, "every_forward"),
        (get_policy("knorm", budget=8), {"positions": "none"}, "original"),
    ]:
        with pytest.raises(PolicyError, match=message):
            perplexity(model, ids, policy, **options)
    assert perplexity(model, ids, get_policy("knorm", budget=0.5), chunk_size=4).compression_ratio > 0.2
    training = models.build("llama").train()
    with pytest.raises(UnsupportedOperationError, match="eval"):
        perplexity(training, ids, get_policy("full"))


def test_rotations_that_depend_on_length_are_scored_token_by_token():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = models.build("llama", rope_parameters=rope, max_position_embeddings=32)
    policy = get_policy("streaming_llm", budget=16)
    assert perplexity(model, text(30), policy).mode == "one_pass"
    assert perplexity(model, text(), policy).mode == "token"
    with pytest.raises(PolicyError, match="frequencies"):
        perplexity(model, text(), policy, mode="layerwise")


# ---- texts to tokens


class Words:
    """A tokenizer of numbers."""

    bos_token_id: int | None = 1

    def __init__(self, adds: bool = True, bos: int | None = 1) -> None:
        self.adds, self.bos_token_id = adds, bos

    def __call__(self, words: str, add_special_tokens: bool = True, **options) -> dict[str, list[int]]:
        ids = [int(word) for word in words.split()]
        if add_special_tokens and self.adds and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids, 2]
        return {"input_ids": ids}


def test_encode_begins_as_asked():
    words = "11 12 13"
    assert encode(Words(), words).tolist() == [1, 11, 12, 13]
    assert encode(Words(adds=False), words).tolist() == [11, 12, 13]
    assert encode(Words(adds=False), words, bos="always").tolist() == [1, 11, 12, 13]
    assert encode(Words(), words, bos="never").tolist() == [11, 12, 13]
    assert encode(Words(bos=None), words).tolist() == [11, 12, 13]
    assert encode(Words(), "1 11 12", bos="always").tolist() == [1, 11, 12], "not twice"
    assert encode(Words(), words, max_length=2).tolist() == [1, 11]
    assert encode(Words(), words, max_length=99).dtype == torch.long


def test_encode_refuses():
    for tokenizer, words, options, message in [
        (Words(bos=None), "11 12", {"bos": "always"}, "no beginning-of-sequence"),
        (Words(), "11 12", {"bos": "yes"}, "auto"),
        (Words(), "11 12", {"max_length": 1}, "2 or more"),
        (Words(), "", {}, "at least 2"),
        (Words(), "11", {"bos": "never"}, "at least 2"),
    ]:
        with pytest.raises(DataError, match=message):
            encode(tokenizer, words, **options)


def test_the_public_name_is_the_function():
    import kvsieve.text

    assert kvsieve.text.perplexity is perplexity
    assert kvsieve.text.encode is encode
