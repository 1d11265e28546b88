"""Attention over an evicted cache equals full attention with the evicted keys masked, per head, in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
from scenarios import METHODS, policy
from torch.nn import functional

import models
from kvsieve import Policy, SieveCache, get_policy

LENGTH = 32
SIZES = {"token by token": [1] * LENGTH, "chunks": [9, 9, 9, 3, 1, 1], "prefill then tokens": [24] + [1] * 8}
DTYPE = {"gemma2": torch.float32}
"""Its eager attention computes the softmax in float32, and gives NaN for padding in float64."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative to the largest logit."""

POLICIES: dict[str, Policy] = {
    "streaming_llm": policy("streaming_llm", 8),
    "h2o": policy("h2o", 8),
    "adakv_snapkv": policy("adakv_snapkv", 8),
    "threshold": get_policy("random", threshold=0.6, window=3),
}


def run(family: str, chosen: Policy, sizes: list[int], padded: bool) -> None:
    dtype = DTYPE.get(family, torch.float64)
    inputs = models.prompt(family, 3 if padded else 2, LENGTH, padded=padded)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model = models.managed(family, dtype)
    cache = SieveCache(model, chosen)
    notes = oracle.Notes(cache, mask)
    got = oracle.feed(model, cache, ids, mask, sizes, notes)
    stock = models.stock(family, dtype)
    want = oracle.reference(stock, ids, mask, notes.visible, position_ids=oracle.places(mask))
    real = mask.bool()
    error = float((got - want)[real].abs().max() / want[real].abs().max())
    assert error < TOLERANCE[dtype], error
    assert cache.report()["evictions"] > 0
    with torch.no_grad():
        full = stock(input_ids=ids, attention_mask=mask, position_ids=oracle.places(mask), use_cache=False).logits
    assert float((full - want)[real].abs().max()) > 0.1, "the oracle would not notice an eviction"


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("how", SIZES)
@pytest.mark.parametrize("name", [m for m in METHODS if m != "full"])
def test_every_method_on_llama(name, how, padded):
    run("llama", policy(name, 8), SIZES[how], padded)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("how", SIZES)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", models.TEXT)
def test_every_family(family, name, how, padded):
    run(family, POLICIES[name], SIZES[how], padded)


BUDGETS = {"ratio": {"budget": 0.4, "when": "every_forward"}, "bytes": {"budget": "28kB"}}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["h2o", "adakv_snapkv", "pyramidkv"])
def test_every_kind_of_budget(name, budget):
    run("llama", policy(name, **BUDGETS[budget]), SIZES["chunks"], padded=False)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("how", SIZES)
def test_key_norm_threshold(how, padded):
    run("llama", get_policy("knorm", threshold=-12.0, window=3), SIZES[how], padded)


@pytest.mark.parametrize("how", ["", "padded", "chunked"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", models.VISION)
def test_with_real_images(family, name, how):
    prompt, steps = 26, 7
    inputs = models.prompt(family, 2, prompt, padded=how == "padded")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    mask = functional.pad(inputs["attention_mask"], (0, steps - 1), value=1)
    cache = SieveCache(models.managed(family, torch.float64), POLICIES[name])
    notes = oracle.Notes(cache, mask)
    out = models.managed(family, torch.float64).generate(
        **inputs, past_key_values=cache, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, stopping_criteria=[oracle.NoteTaker(notes)],
    )  # fmt: skip
    inputs |= {"input_ids": out.sequences[:, :-1], "attention_mask": mask}
    if family == "smolvlm":
        inputs["position_ids"] = oracle.places(mask)
    else:
        inputs["mm_token_type_ids"] = functional.pad(inputs["mm_token_type_ids"], (0, steps - 1))
    want = oracle.reference(models.stock(family, torch.float64), visible=notes.visible, **inputs)
    got = torch.stack(out.logits, 1)
    error = float((got - want[:, prompt - 1 :]).abs().max() / want.abs().max())
    assert error < 1e-7, error  # generate() hands out float32
    assert cache.report()["evictions"] > 0
