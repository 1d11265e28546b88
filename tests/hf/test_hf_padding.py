"""A row of a left-padded batch fares exactly as it does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenarios import GREEDY, METHODS, policy

import models
from kvsieve import Policy, SieveCache, get_policy

LENGTH, STEPS = 24, 8
BUDGETS = {"tokens": {"budget": 8}, "ratio": {"budget": 0.4}, "ratio always": {"budget": 0.4, "when": "every_forward"}}
DTYPE = {"gemma2": torch.float32}


def generate(family: str, chosen: Policy, inputs: dict[str, torch.Tensor], **how: Any) -> tuple[Any, SieveCache]:
    model = models.managed(family, DTYPE.get(family, torch.float64))
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    cache = SieveCache(model, chosen)
    out = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True,
        **GREEDY, **how,
    )  # fmt: skip
    return out, cache


def row(family: str, inputs: dict[str, torch.Tensor], index: int) -> tuple[dict[str, torch.Tensor], int]:
    """One row without its padding, and how much padding it had."""
    pads = int((inputs["attention_mask"][index] == 0).sum())
    out = {}
    for key, value in inputs.items():
        if key == "pixel_values" and family != "smolvlm":
            share = value.shape[0] // inputs["input_ids"].shape[0]
            out[key] = value[index * share : (index + 1) * share]
        else:
            out[key] = value[index : index + 1, pads:] if value.shape[1] == LENGTH else value[index : index + 1]
    return out, pads


def compare(family: str, chosen: Policy, **how: Any) -> None:
    inputs = models.prompt(family, 3, LENGTH, padded=True)
    together, cache = generate(family, chosen, dict(inputs), **how)
    assert cache.report()["evictions"] > 0
    for index in range(3):
        one, pads = row(family, inputs, index)
        alone, own = generate(family, chosen, one, **how)
        assert torch.equal(together.sequences[index, LENGTH:], alone.sequences[0, LENGTH - pads :])
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[index], b[0], rtol=0, atol=1e-4)
        for layer in cache.report()["managed_layers"]:
            mine, other = cache.kept_positions(layer)[index], own.kept_positions(layer)[0]
            mine = mine[:, : other.shape[-1]].where(mine[:, : other.shape[-1]] < 0, mine[:, : other.shape[-1]] - pads)
            assert torch.equal(mine, other)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", [m for m in METHODS if m != "full"])
def test_every_method_on_llama(name, budget):
    compare("llama", policy(name, **BUDGETS[budget]))


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "adakv_snapkv", "evict3r"])
@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f not in ("llama", "mistral")])
def test_every_family(family, name):
    compare(family, policy(name, 8))


@pytest.mark.parametrize("chosen", [policy("h2o", 8), policy("adakv_snapkv", 8), policy("lagkv", 0.5),
                                    policy("evict3r", 8), get_policy("knorm", threshold=-12.0)],
                         ids=lambda p: p.name)  # fmt: skip
def test_token_by_token(chosen):
    """Chunks of a padded batch hold different numbers of real tokens, so only steps of one are the same for all."""
    inputs = models.prompt("llama", 3, LENGTH, padded=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model = models.managed("llama", torch.float64)
    cache = SieveCache(model, chosen)
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for i in range(LENGTH):
            last = model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache,
                         position_ids=place[:, i : i + 1]).logits  # fmt: skip
        for index in range(3):
            pads = int((mask[index] == 0).sum())
            own = SieveCache(model, chosen)
            for i in range(pads, LENGTH):
                alone = model(input_ids=ids[index : index + 1, i : i + 1], past_key_values=own).logits
            torch.testing.assert_close(last[index], alone[0], rtol=0, atol=1e-4)
            assert cache.report()["tokens_held"][1][index] == own.report()["tokens_held"][1][0]


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "tova", "adakv_snapkv", "evict3r"])
def test_second_turn_of_a_batch(name):
    """The next turn of a batch is padded on the left again, in the middle of what the cache has seen."""
    first, second = models.prompt("llama", 3, 16, padded=True), models.prompt("llama", 3, 12, padded=True, seed=2)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    place = (mask.cumsum(-1) - 1).clamp_min(0)
    model, chosen = models.managed("llama", torch.float64), policy(name, 8)
    cache = SieveCache(model, chosen)
    with torch.no_grad():
        for part in (slice(0, 16), slice(16, 28)):
            last = model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache,
                         position_ids=place[:, part]).logits  # fmt: skip
        for index in range(3):
            own = SieveCache(model, chosen)
            for part in (slice(0, 16), slice(16, 28)):
                alone = ids[index : index + 1, part][:, mask[index, part].bool()]
                out = model(input_ids=alone, past_key_values=own).logits
            torch.testing.assert_close(last[index, -1], out[0, -1], rtol=0, atol=1e-4)
    assert cache.report()["tokens_seen"] == mask.sum(-1).tolist()


def test_a_row_of_nothing_but_padding():
    """It is never read; it must not disturb the others or fail."""
    inputs = models.prompt("llama", 2, LENGTH)
    inputs["attention_mask"][0] = 0
    for name in ("h2o", "adakv_snapkv", "expected_attention", "random", "evict3r"):
        out, cache = generate("llama", policy(name, 8), dict(inputs))
        one = {key: value[1:] for key, value in inputs.items()}
        alone, _ = generate("llama", policy(name, 8), one)
        assert torch.equal(out.sequences[1], alone.sequences[0])
        assert cache.report()["tokens_seen"][1] == LENGTH + STEPS - 1
