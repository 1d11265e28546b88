"""Switching kvsieve on for one model changes nothing else: not its other caches, not other models, not the library."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from scenarios import policy
from transformers import AutoModelForCausalLM, DynamicCache

import models
from kvsieve import SieveCache, hf

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def equal(a, b) -> bool:
    same = all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    return torch.equal(a.sequences, b.sequences) and same


@pytest.mark.parametrize("loaded", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "phi3", "smolvlm", "qwen2_5_vl"])
def test_models_keep_the_attention_they_were_loaded_with(family, loaded):
    model, before = models.build(family, attention=loaded), models.build(family, attention=loaded)
    inputs = models.prompt(family, 2, 20, padded=True)
    cache = SieveCache(model, policy("h2o", 8))
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    for make in (lambda: None, lambda: DynamicCache(config=model.config)):
        want = before.generate(**inputs, past_key_values=make(), **SETTINGS)
        assert equal(model.generate(**inputs, past_key_values=make(), **SETTINGS), want)


def test_eager_and_sdpa_can_be_told_apart():
    """Else the test above would prove nothing."""
    inputs = models.prompt("llama", 2, 20, padded=True)
    eager = models.build("llama", attention="eager").generate(**inputs, **SETTINGS)
    assert not equal(eager, models.stock("llama").generate(**inputs, **SETTINGS))


def test_a_model_loaded_as_eager_equals_itself_within_rounding():
    inputs = models.prompt("llama", 1, 20)
    model, before = (models.build("llama", attention="eager") for _ in range(2))
    got = model.generate(**inputs, past_key_values=SieveCache(model, policy("full")), **SETTINGS)
    want = before.generate(**inputs, **SETTINGS)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_softcap_follows_what_the_model_was_loaded_with():
    """Stock sdpa attention ignores it in some versions and refuses it in others; kvsieve does what stock does."""
    model = models.FAMILIES["gemma2"]().eval()
    stock = copy.deepcopy(model)
    inputs = models.prompt("gemma2", 1, 20)
    got = model.generate(**inputs, past_key_values=SieveCache(model, policy("full")), **SETTINGS)
    want = stock.generate(**inputs, **SETTINGS)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loaded", ["eager", "sdpa"])
def test_enabling_twice(loaded):
    model = models.build("llama", attention=loaded)
    hf.enable(model)
    noted = {name: hf.implementation_before(m) for name, m in model.named_modules()}
    hf.enable(model)
    SieveCache(model, policy("h2o", 8))
    assert {name: hf.implementation_before(m) for name, m in model.named_modules()} == noted
    assert {noted[f"model.layers.{i}.self_attn"] for i in range(2)} == {loaded}


def test_copies_of_a_model_keep_their_past():
    model = models.build("llama", attention="eager")
    SieveCache(model, policy("h2o", 8))
    twin, inputs = copy.deepcopy(model), models.prompt("llama", 2, 20, padded=True)
    want = models.build("llama", attention="eager").generate(**inputs, **SETTINGS)
    assert equal(twin.generate(**inputs, **SETTINGS), want)
    twin.generate(**inputs, past_key_values=SieveCache(twin, policy("h2o", 8)), max_new_tokens=3)


def test_two_models_at_once():
    first, second = models.build("llama", attention="eager"), models.build("qwen3")
    third = models.build("llama")
    inputs = models.prompt("llama", 2, 20, padded=True)
    caches = [SieveCache(m, policy("h2o", 8)) for m in (first, second)]
    for model, cache in zip((first, second), caches, strict=True):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    assert third.config._attn_implementation == "sdpa"
    assert equal(third.generate(**inputs, **SETTINGS), models.stock("llama").generate(**inputs, **SETTINGS))
    assert equal(second.generate(**inputs, **SETTINGS), models.stock("qwen3").generate(**inputs, **SETTINGS))


def test_only_the_decoder_is_switched():
    model = models.build("smolvlm")
    SieveCache(model, policy("h2o", 8))
    assert model.config.get_text_config()._attn_implementation == "kvsieve"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_saved_models_do_not_know(tmp_path):
    model = models.build("llama")
    SieveCache(model, policy("h2o", 8))
    model.save_pretrained(tmp_path)
    assert "kvsieve" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_a_model_made_with_kvsieve_attention():
    """Once registered, the name can be given when a model is made; without a `SieveCache` it is the stock attention."""
    hf.enable(models.build("llama"))
    config = models.stock("llama").config.__class__(**models.BASE)
    config._attn_implementation = "kvsieve"
    torch.manual_seed(0)
    model = models.stock("llama").__class__(config).eval()
    inputs = models.prompt("llama", 2, 20, padded=True)
    assert equal(model.generate(**inputs, **SETTINGS), models.stock("llama").generate(**inputs, **SETTINGS))
    model.generate(**inputs, past_key_values=SieveCache(model, policy("h2o", 8)), max_new_tokens=3)


SCRIPT = """
import sys, time
start = time.perf_counter()
import kvsieve
took = time.perf_counter() - start
loaded = {name for name in ("torch", "transformers", "kvsieve.cache") if name in sys.modules}
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as layers, STATIC_LAYER_TYPE_MAPPING as static

def state():
    registries = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    return [set(registry.keys()) for registry in registries] + [dict(layers), dict(static)]

before = state()
from kvsieve import SieveCache, get_policy, list_methods
import kvsieve.cache, kvsieve.hf, kvsieve.hf_rotary
list_methods()
print(took, sorted(loaded), state() == before)
"""


def test_importing_has_no_side_effects_and_is_quick():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split(
        " ", 1
    )
    assert float(out[0]) < 0.5
    assert out[1].strip() == "[] True"
