"""KVzap: parity with kvpress 0.5.5, the rule of DMS, the surrogate on disk, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kvsieve
import models
from kvsieve.errors import BudgetError, DataError, PolicyError, UnsupportedModelError
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.surrogates import KVzapSurrogate, SurrogateShape, shared
from kvsieve.text.likelihood import perplexity
from kvsieve.view import LayerView

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "kvpress"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference numbers are not on this machine")

LLAMA = SurrogateShape(input_dim=64, output_dim=2, hidden_dim=None, n_modules=2)
"""What the tiny llama of `models` needs."""


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "parity.safetensors")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_llama", dtype=torch.float32).eval()


@pytest.fixture(params=["linear", "mlp"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def reference_surrogate(kind, golden) -> KVzapSurrogate:
    """The random surrogate behind the reference numbers."""
    prefix = f"kvzap_{kind}/"
    weights = {name[len(prefix) :]: tensor for name, tensor in golden.items() if name.startswith(prefix)}
    surrogate = KVzapSurrogate(SurrogateShape(64, 2, 8 if kind == "mlp" else None, 4))
    surrogate.load_state_dict(weights)
    return surrogate


def random_surrogate(shape: SurrogateShape = LLAMA, seed: int = 3) -> KVzapSurrogate:
    torch.manual_seed(seed)
    return KVzapSurrogate(shape)


def kept_mask(cache: kvsieve.SieveCache, layer: int, n: int) -> torch.Tensor:
    positions = cache.kept_positions(layer)
    mask = torch.zeros(*positions.shape[:2], n + 1, dtype=torch.bool)
    return mask.scatter_(2, torch.where(positions < 0, n, positions), True)[..., :n]


def record_scores(monkeypatch) -> list[torch.Tensor]:
    """The scores that every layer's decision is based on."""
    scores: list[torch.Tensor] = []
    inner = Policy.keep

    def spy(self, view: LayerView):
        scores.append(self.scorer.score(view).clone())
        return inner(self, view)

    monkeypatch.setattr(Policy, "keep", spy)
    return scores


# ---- parity


@needs_golden
def test_scores_and_kept_sets_of_a_prefill(kind, reference_surrogate, golden, model, monkeypatch):
    scores = record_scores(monkeypatch)
    policy = kvsieve.get_policy("kvzap", threshold=0.0, window=32, scorer=reference_surrogate)
    cache = kvsieve.SieveCache(model, policy)
    with torch.no_grad():
        model(golden["input_ids"], past_key_values=cache)
    want_scores, want_kept = golden[f"dms_kvzap_{kind}/r0.5/scores"], golden[f"dms_kvzap_{kind}/r0.5/kept"]
    torch.testing.assert_close(torch.stack(scores), want_scores, rtol=1e-5, atol=1e-5 * float(want_scores.abs().max()))
    kept = torch.stack([kept_mask(cache, layer, want_kept.shape[-1]) for layer in range(4)])
    differing = kept != want_kept
    assert bool((want_scores[differing].abs() < 1e-5).all()), "only scores on the threshold may differ"
    assert int(differing.sum()) <= 2
    held = sum(sum(map(sum, heads)) for heads in cache.report()["tokens_held"].values())
    assert abs(held - int(want_kept.sum())) <= 2


@needs_golden
def test_surrogate_alone_on_the_reference_hidden_states(kind, reference_surrogate, golden):
    hidden, want = golden["hidden_states"], golden[f"dms_kvzap_{kind}/r0.5/scores"]
    got = torch.stack([reference_surrogate(i, hidden[i]) for i in range(4)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@needs_golden
def test_token_by_token_likelihood(kind, reference_surrogate, golden, model):
    ids = golden["input_ids"][:1]
    cache = kvsieve.SieveCache(model, kvsieve.get_policy("kvzap", threshold=0.0, window=64, scorer=reference_surrogate))
    losses = []
    with torch.no_grad():
        for i in range(ids.shape[1] - 1):
            logits = model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[ids[0, i + 1]])
    assert (torch.stack(losses) - golden[f"seq_nll/kvzap_{kind}_thr0_w64"]).abs().max() < 1e-4
    assert cache.report()["compression_ratio"] > 0.1


# ---- the rule


@pytest.mark.parametrize("chunks", [[60], [1] * 60, [25, 1, 1, 20, 13]])
@pytest.mark.parametrize("n_sink", [0, 3])
def test_a_token_leaves_the_window_and_stays_or_goes_for_good(chunks, n_sink):
    """However the text arrives, what is held at its end is the window, the sinks and what scores at the threshold."""
    model, surrogate = models.managed("llama"), random_surrogate()
    hidden: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden[module.layer_idx].append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    policy = kvsieve.get_policy("kvzap", threshold=0.0, window=16, scorer=surrogate, n_sink=n_sink)
    cache = kvsieve.SieveCache(model, policy)
    ids, start = models.words(2, 60), 0
    try:
        with torch.no_grad():
            for count in chunks:
                model(ids[:, start : start + count], past_key_values=cache)
                start += count
    finally:
        for hook in hooks:
            hook.remove()
    place = torch.arange(60)
    for layer in range(2):
        score = surrogate.score(layer, torch.cat(hidden[layer], dim=1))
        want = (score >= 0) | (place >= 60 - 16) | (place < n_sink)
        assert 0.2 < want.float().mean() < 0.95
        assert torch.equal(kept_mask(cache, layer, 60), want)


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"budget": 20}])
def test_one_pass_over_a_text_equals_token_by_token(settings):
    model, ids = models.managed("llama"), models.words(1, 50)
    policy = kvsieve.get_policy("kvzap", window=8, scorer=random_surrogate(), **settings)
    fast, slow = (perplexity(model, ids, policy, mode=mode) for mode in ("one_pass", "token"))
    torch.testing.assert_close(fast.nll, slow.nll, rtol=0, atol=1e-4)
    assert fast.keys_held == slow.keys_held < slow.keys_seen


@pytest.mark.parametrize("settings", [{"budget": 20}, {"budget": 0.5}, {"budget": 20, "share": "across_heads"}])
def test_budgets_rank_by_the_surrogate(settings, monkeypatch):
    scores = record_scores(monkeypatch)
    model = models.managed("llama")
    policy = kvsieve.get_policy("kvzap", window=4, scorer=random_surrogate(), **settings)
    cache = kvsieve.SieveCache(model, policy)
    with torch.no_grad():
        model(models.words(1, 40), past_key_values=cache)
    for layer in range(2):
        kept, score = kept_mask(cache, layer, 40), scores[layer]
        assert int(kept.sum()) == 40
        assert bool(kept[..., -4:].all())
        score = score[..., :-4].masked_fill(kept[..., :-4], torch.inf)
        dropped = score.masked_fill(score.isinf(), -torch.inf).amax(-1)
        lowest = torch.where(kept[..., :-4], scores[layer][..., :-4], torch.inf).amin(-1)
        if policy.uniform:
            assert bool((lowest > dropped).all())
        else:
            assert kept.sum(-1).unique().numel() == 2


def test_padding_and_batch_do_not_matter():
    model = models.managed("llama")
    policy = kvsieve.get_policy("kvzap", threshold=0.0, window=8, scorer=random_surrogate(), n_sink=2)
    ids = models.words(1, 40)
    alone, padded = kvsieve.SieveCache(model, policy), kvsieve.SieveCache(model, policy)
    batch = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], 1), models.words(1, 47, seed=2)])
    mask = torch.ones_like(batch)
    mask[0, :7] = 0
    with torch.no_grad():
        model(ids, past_key_values=alone)
        model(batch, attention_mask=mask, past_key_values=padded)
    for layer in range(2):
        assert torch.equal(kept_mask(alone, layer, 40)[0], kept_mask(padded, layer, 47)[0, :, 7:])


def test_scores_are_float32_in_a_half_precision_model(monkeypatch):
    scores = record_scores(monkeypatch)
    model = models.build("llama", torch.bfloat16)
    policy = kvsieve.get_policy("kvzap", threshold=0.0, window=8, scorer=random_surrogate().half())
    with torch.no_grad():
        model(models.words(1, 30), past_key_values=kvsieve.SieveCache(model, policy))
    assert scores[0].dtype == torch.float32
    assert scores[0].unique().numel() > 50


def test_default_window_is_that_of_the_paper():
    policy = kvsieve.get_policy("kvzap", threshold=-7.0, scorer="somewhere")
    assert policy.protect == Protect(sink=0, recent=128)
    assert kvsieve.get_policy("kvzap", threshold=-7.0, window=5, n_sink=4).protect == Protect(sink=4, recent=5)
    with pytest.raises(BudgetError, match="128"):
        kvsieve.get_policy("kvzap", budget=64)


# ---- on disk


@pytest.mark.parametrize("hidden_dim", [None, 5])
def test_save_and_load(hidden_dim, tmp_path):
    surrogate = random_surrogate(SurrogateShape(64, 2, hidden_dim, 2))
    surrogate.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    published = {"model_type": "kvzap", "input_dim": 64, "output_dim": 2, "hidden_dim": hidden_dim, "n_modules": 2}
    assert published.items() <= config.items()
    names = {f"layers.{i}.{part}" for i in range(2) for part in ("weight", "bias")}
    if hidden_dim:
        names = {f"layers.{i}.{n}.{part}" for i in range(2) for n in (0, 2) for part in ("weight", "bias")}
    assert set(load_file(tmp_path / "model.safetensors")) == names
    loaded = KVzapSurrogate.load(tmp_path)
    hidden = torch.randn(3, 7, 64)
    assert loaded.kind == surrogate.kind == ("mlp" if hidden_dim else "linear")
    assert torch.equal(loaded(1, hidden), surrogate(1, hidden))
    assert loaded(1, hidden).shape == (3, 2, 7)


def test_a_policy_by_path_is_plain_data_and_loads_once(tmp_path):
    random_surrogate().save(tmp_path)
    policy = kvsieve.get_policy("kvzap", threshold=0.0, window=8, scorer=tmp_path)
    again = Policy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    shared.cache_clear()
    model, caches = models.managed("llama"), []
    for _ in range(2):
        caches.append(kvsieve.SieveCache(model, policy))
        with torch.no_grad():
            model(models.words(1, 40), past_key_values=caches[-1])
            model(models.words(1, 1), past_key_values=caches[-1])
    assert shared.cache_info().misses == 1
    caches[0].save(str(tmp_path / "cache.safetensors"))
    loaded = kvsieve.SieveCache.load(str(tmp_path / "cache.safetensors"), model)
    assert loaded.policy == policy
    assert torch.equal(loaded.kept_positions(1), caches[1].kept_positions(1))


def test_saving_again_is_noticed(tmp_path):
    random_surrogate(seed=1).save(tmp_path)
    hidden = torch.randn(1, 4, 64)
    first = shared(str(tmp_path), hidden.device, torch.float32).score(0, hidden)
    random_surrogate(seed=2).save(tmp_path)
    assert not torch.equal(first, shared(str(tmp_path), hidden.device, torch.float32).score(0, hidden))


def test_a_live_surrogate_is_hashable_but_not_storable():
    surrogate = random_surrogate()
    policy = kvsieve.get_policy("kvzap", threshold=0.0, scorer=surrogate)
    assert hash(policy) == hash(kvsieve.get_policy("kvzap", threshold=0.0, scorer=surrogate))
    assert not policy.scorer.serializable
    with pytest.raises(PolicyError, match="by path"):
        policy.to_dict()


# ---- errors


def test_no_surrogate_says_how_to_get_one():
    policy = kvsieve.get_policy("kvzap", threshold=-7.0)
    with pytest.raises(PolicyError, match=r"kvsieve train-kvzap.*nvidia/KVzap-mlp"):
        kvsieve.SieveCache(models.managed("llama"), policy)
    with pytest.raises(PolicyError, match="not 7"):
        kvsieve.get_policy("kvzap", threshold=-7.0, scorer=7)


@pytest.mark.parametrize("wrong", [(32, 2, None, 2), (64, 4, None, 2), (64, 2, 3, 3)])
@pytest.mark.parametrize("live", [True, False])
def test_surrogate_of_another_model(wrong, live, tmp_path):
    surrogate = random_surrogate(SurrogateShape(*wrong))
    surrogate.save(tmp_path)
    policy = kvsieve.get_policy("kvzap", threshold=0.0, scorer=surrogate if live else str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="hidden size 64, 2 key-value heads and 2 layers; train one"):
        kvsieve.SieveCache(models.managed("llama"), policy)


def test_models_without_grouped_heads():
    surrogate = random_surrogate(SurrogateShape(64, 4, None, 2))
    cache = kvsieve.SieveCache(models.managed("gpt_neox"), kvsieve.get_policy("kvzap", threshold=0.0, scorer=surrogate))
    with torch.no_grad():
        models.managed("gpt_neox")(models.words(1, 9), past_key_values=cache)


def test_direct_calls_with_the_wrong_shape():
    with pytest.raises(UnsupportedModelError, match="layer 2"):
        random_surrogate().score(2, torch.zeros(1, 1, 64))
    with pytest.raises(UnsupportedModelError, match="width 63"):
        random_surrogate().score(0, torch.zeros(1, 1, 63))
    with pytest.raises(UnsupportedModelError, match="meta"):
        random_surrogate().score(0, torch.zeros(1, 1, 64, device="meta"))


def test_missing_folder(tmp_path):
    policy = kvsieve.get_policy("kvzap", threshold=0.0, scorer=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere.*train-kvzap"):
        kvsieve.SieveCache(models.managed("llama"), policy)
    with pytest.raises(DataError, match=r"no config.json and no model.safetensors"):
        KVzapSurrogate.load(tmp_path)


def test_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    from kvsieve import surrogates

    def refuse(repository, name):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline mode is enabled\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    surrogates._download.cache_clear()
    with pytest.raises(DataError, match=r"someone/surrogate is not a folder.*\(offline mode is enabled\)"):
        KVzapSurrogate.load("someone/surrogate")


def test_hub_repository(monkeypatch, tmp_path):
    import huggingface_hub

    from kvsieve import surrogates

    random_surrogate().save(tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, name: asked.append(name) or str(tmp_path / name)
    )
    surrogates._download.cache_clear()
    hidden = torch.randn(1, 3, 64)
    for _ in range(2):
        loaded = KVzapSurrogate.load("someone/surrogate")
        assert torch.equal(loaded(0, hidden), random_surrogate()(0, hidden))
    assert asked == ["config.json", "model.safetensors"]
    surrogates._download.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "must be \"kvzap\", not 'llama'"),
        ({"n_modules": 0}, "n_modules must be a whole number of 1 or more, not 0"),
        ({"output_dim": None}, "output_dim must be a whole number"),
        ({"output_dim": 3}, r"layers.0.bias has shape \(2,\) where \(3,\) is expected"),
        ({"n_modules": 3}, r"layers.2.bias has shape none"),
        ({"hidden_dim": 6}, r"layers.0"),
    ],
)
def test_files_that_contradict_each_other(change, message, tmp_path):
    random_surrogate().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=message):
        KVzapSurrogate.load(tmp_path)


def test_broken_files(tmp_path):
    random_surrogate().save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        KVzapSurrogate.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        KVzapSurrogate.load(tmp_path)
