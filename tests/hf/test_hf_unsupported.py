"""What cannot be managed is refused, at the latest in the first forward pass; nothing silently skips eviction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from scenarios import policy
from transformers import DynamicCache, StaticCache

import models
from kvsieve import PolicyError, SieveCache, UnsupportedModelError, UnsupportedOperationError, get_policy

SMALL = {"vocab_size": models.VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GPT = {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4}
LATENT = {
    "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "kv_lora_rank": 32, "q_lora_rank": 24,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16, "intermediate_size": [96] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": models.VOCAB,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 24,
}  # fmt: skip
ENCODER_DECODER = {
    **SMALL, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
}  # fmt: skip

AT_ONCE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", "BloomForCausalLM", {**SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "registry"),
    "falcon": (
        "FalconConfig", "FalconForCausalLM",
        {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}, "registry",
    ),
    "falcon alibi": (
        "FalconConfig", "FalconForCausalLM",
        {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}, "registry",
    ),
    "gpt-j": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 8}, "registry"),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT, "rotary_dim": 8}, "registry"),
    "mpt": ("MptConfig", "MptForCausalLM", {**SMALL, "d_model": 64, "n_layers": 2, "n_heads": 4}, "registry"),
    "latent attention": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**models.BASE, **LATENT}, "latent"),
    "shared keys": ("Gemma3nTextConfig", "Gemma3nForCausalLM", {**models.BASE, **SHARED}, "shares keys"),
    "cross-attention": ("GPT2Config", "GPT2LMHeadModel", {**GPT, "add_cross_attention": True}, "cross-attention"),
    "bart": ("BartConfig", "BartForConditionalGeneration", ENCODER_DECODER, "encoder-decoder"),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {**SMALL, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "encoder-decoder",
    ),
    "mamba": (
        "MambaConfig", "MambaForCausalLM", {**SMALL, "hidden_size": 64, "num_hidden_layers": 2}, "LinearAttentionLayer",
    ),
    "sliding only": (
        "MistralConfig", "MistralForCausalLM", {**models.BASE, "sliding_window": 24}, "DynamicSlidingWindowLayer",
    ),
}  # fmt: skip


def make(config: str, model: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**values)).eval()


@pytest.mark.parametrize("case", AT_ONCE)
def test_refused_when_the_cache_is_made(case):
    config, name, values, message = AT_ONCE[case]
    model = make(config, name, values)
    ids = models.words(1, 12)
    extra = {"decoder_input_ids": ids} if case in ("bart", "t5") else {}
    with torch.no_grad():
        before = model(input_ids=ids, **extra).logits
        with pytest.raises(UnsupportedModelError, match=message):
            SieveCache(model, policy("h2o", 8))
        assert torch.equal(model(input_ids=ids, **extra).logits, before)


@pytest.mark.parametrize("name", ["JetMoe", "DiffLlama"])
def test_refused_in_the_first_forward_pass(name):
    """These repeat keys, or rearrange values, between the cache and attention; only the pass itself can tell."""
    changes: dict[str, Any] = {}
    if name == "JetMoe":
        changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "num_attention_heads": 4}
    model, ids = models.causal(name, **changes), models.words(1, 12)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        cache = SieveCache(model, policy("h2o", 8))
        with pytest.raises(UnsupportedModelError, match="after the cache"):
            model(input_ids=ids, past_key_values=cache)
        stock = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
        assert torch.equal(stock, before)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_model_that_looks_both_ways():
    config = transformers.LlamaConfig(**models.BASE)
    config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="not causal"):
        SieveCache(transformers.LlamaForCausalLM(config).eval(), policy("h2o", 8))


def test_ready_made_masks():
    model, ids = models.managed("llama"), models.words(1, 12)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        with pytest.raises(UnsupportedOperationError, match="2-D mask"):
            model(input_ids=ids, attention_mask=mask, past_key_values=SieveCache(model, policy("h2o", 8)))
        stock = models.stock("llama")(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, stock)


def test_a_mask_that_covers_the_new_tokens_only():
    model, ids = models.managed("llama"), models.words(1, 12)
    cache = SieveCache(model, policy("h2o", 8))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones(1, 20), past_key_values=cache)  # a longer one is fine
        with pytest.raises(UnsupportedOperationError, match="must cover all 15"):
            model(input_ids=ids[:, :3], attention_mask=torch.ones(1, 3), past_key_values=cache)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training(dropout):
    model, ids = models.build("llama", attention_dropout=dropout), models.words(1, 12)
    cache = SieveCache(model, policy("h2o", 8))
    with pytest.raises(UnsupportedOperationError, match=r"model\.eval\(\)"):
        model.train()(input_ids=ids, past_key_values=cache)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("loaded", ["sdpa", "eager"])
def test_attention_weights(loaded):
    """They are refused, not left out; without a `SieveCache` they come as before."""
    model, stock = models.build("llama", attention=loaded), models.build("llama", attention=loaded)
    inputs = models.prompt("llama")
    with torch.no_grad():
        with pytest.raises(UnsupportedOperationError, match="output_attentions"):
            model(**inputs, past_key_values=SieveCache(model, policy("h2o", 8)), output_attentions=True)
        got = model(**inputs, output_attentions=True).attentions
        want = stock(**inputs, output_attentions=True).attentions
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_attention_chosen_anew_after_the_cache_was_made():
    model, ids = models.build("llama"), models.words(1, 12)
    cache = SieveCache(model, policy("h2o", 8))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        with pytest.raises(UnsupportedOperationError, match="set to 'eager' after this cache was made"):
            model(input_ids=ids, past_key_values=cache)
        other = SieveCache(model, policy("h2o", 8))
        model(input_ids=ids, past_key_values=other)
        assert torch.equal(model(input_ids=ids).logits, models.build("llama", attention="eager")(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["static", "static object", "none"])
def test_other_caches_are_left_alone(family, kind):
    model, stock = models.managed(family), models.stock(family)
    SieveCache(model, policy("h2o", 8))
    inputs = models.prompt(family, 2, 20, padded=True)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    outs = []
    for one in (stock, model):
        how: dict[str, Any] = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(kind, {})
        if kind == "static object":
            how = {"past_key_values": StaticCache(config=one.config, max_cache_len=40)}
        outs.append(one.generate(**inputs, **settings, **how, output_logits=True))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(outs[0].logits, outs[1].logits, strict=True))


def test_what_is_not_a_policy():
    with pytest.raises(PolicyError, match="get_policy"):
        SieveCache(models.managed("llama"), "snapkv")
    with pytest.raises(PolicyError, match="positions"):
        SieveCache(models.managed("llama"), get_policy("full"), positions="other")


def test_offloading():
    cache = SieveCache(models.managed("llama"), policy("h2o", 8))
    for call in (cache.managed[0].offload, cache.managed[0].prefetch):
        with pytest.raises(UnsupportedOperationError, match="stays on its device"):
            call()


def test_models_with_learned_positions_are_fine():
    """GPT-2 adds positions to its embeddings, so that keys carry them whatever happens."""
    model = make("GPT2Config", "GPT2LMHeadModel", GPT)
    cache = SieveCache(model, policy("adakv_snapkv", 8))
    model.generate(models.words(2, 14), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.report()["evictions"] > 0
    with pytest.raises(UnsupportedModelError, match="no rotary embedding"):
        SieveCache(model, policy("h2o", 8), positions="slot")


def test_linear_attention_beside_full_attention():
    layers = ["linear_attention", "full_attention"] * 2
    model = models.causal(
        "Qwen3Next", head_dim=16, num_hidden_layers=4, num_experts=0, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, layer_types=layers, mlp_only_layers=[0, 1, 2, 3],
    )  # fmt: skip
    inputs, settings = models.prompt("llama", 1, 16), {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(**inputs, **settings)
    cache = SieveCache(model, policy("h2o"))
    assert torch.equal(model.generate(**inputs, **settings, past_key_values=cache), want)
    cache = SieveCache(model, policy("h2o", 8))
    model.generate(**inputs, **settings, past_key_values=cache)
    assert cache.report()["managed_layers"] == [1, 3]
    assert cache.report()["unmanaged_layers"] == {0: "LinearAttentionLayer", 2: "LinearAttentionLayer"}
    assert cache.report()["tokens_held"] == {1: [[8, 8]], 3: [[8, 8]]}
    first = model.generate(**inputs, **settings, past_key_values=SieveCache(model, policy("h2o", 8)))
    cache.reset()
    assert torch.equal(model.generate(**inputs, **settings, past_key_values=cache), first)
