"""A stored cache goes on exactly where it was."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve.errors import DataError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def steps(model, cache, ids):
    with torch.no_grad():
        return [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("full", {}),
        ("h2o", {"budget": 16, "window_size": 4}),
        ("adakv_snapkv", {"budget": 16, "window_size": 4}),
        ("expected_attention", {"budget": 16}),
        ("evict3r", {"budget": 16}),
        ("evict3r", {"budget": 0.4, "when": "every_forward"}),
        ("frame_attention", {"budget": 16, "aggregation": "mean"}),
        ("knorm", {"threshold": -6.0, "window": 4}),
        ("streaming_llm", {"budget": "4kB"}),
    ],
)
def test_save_load_continue(name, settings, model, tmp_path):
    torch.manual_seed(1)
    ids = torch.randint(0, 101, (2, 40))
    policy = kvsieve.get_policy(name, **settings)
    cache = kvsieve.SieveCache(model, policy)
    with torch.no_grad():
        model(ids[:, :24], past_key_values=cache)
    steps(model, cache, ids[:, 24:30])
    path = str(tmp_path / "cache.safetensors")
    cache.save(path)
    loaded = kvsieve.SieveCache.load(path, model)
    assert loaded.policy == policy
    for a, b in zip(steps(model, cache, ids[:, 30:]), steps(model, loaded, ids[:, 30:]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for layer in range(2):
        assert torch.equal(cache.kept_positions(layer), loaded.kept_positions(layer))
    before, after = cache.report(), loaded.report()
    for key in ("tokens_seen", "tokens_held", "evictions", "compression_ratio"):
        assert before[key] == after[key]


def test_unused_cache_round_trip(model, tmp_path):
    path = str(tmp_path / "empty.safetensors")
    kvsieve.SieveCache(model, kvsieve.get_policy("knorm", budget=4)).save(path)
    assert kvsieve.SieveCache.load(path, model).get_seq_length() == 0


def test_errors(model, tmp_path):
    with pytest.raises(DataError, match="no file"):
        kvsieve.SieveCache.load(str(tmp_path / "nothing"), model)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a cache")
    with pytest.raises(DataError, match="cannot be read"):
        kvsieve.SieveCache.load(str(bad), model)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not a file of this version of kvsieve"):
        kvsieve.SieveCache.load(str(tmp_path / "other.safetensors"), model)
