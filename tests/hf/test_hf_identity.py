"""With a budget that is never reached, a `SieveCache` changes nothing, whatever the method and the way of calling.

To the bit while a prompt is read in one go, and where the stock attention runs. The last digits differ where a few
queries meet grouped heads, which kvsieve stacks, and where a method counts the attention of a single query or of a long
prompt.
"""

from __future__ import annotations

import pytest
import torch
from scenarios import HOW, METHODS, REPRESENTATIVE, generate, policy, same, sieve, stock_output

import models
from kvsieve import SieveCache, attended, attention, get_policy

AT_ONCE = ("greedy", "beam", "sample", "return_sequences")
"""Ways of calling that read the prompt in one forward pass."""


def check(family: str, how: str, chosen, exact: bool) -> None:
    want = stock_output(family, how)
    if isinstance(want, Exception):
        pytest.skip(f"the stock model cannot do this: {want}")
    cache = sieve(family, chosen)
    got = generate(models.managed(family), family, how, cache)
    config = models.managed(family).config.get_text_config(decoder=True)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.logits) == len(want.logits)
    for step, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
        other = (grouped or bool(chosen.scorer.collects)) and (step > 0 or how not in AT_ONCE)
        assert same(a, b, exact and not other), (step, float((a - b).abs().max()))
    assert cache.report()["evictions"] == 0 or "padded" in how
    assert cache.report()["compression_ratio"] == 0.0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_llama(name, how):
    check("llama", how, policy(name), exact="padded" not in how or name == "full")


@pytest.mark.parametrize("how", ["greedy", "chunked", "padded", "beam", "lookup"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize("family", [f for f in models.FAMILIES if f != "llama"])
def test_every_family(family, name, how):
    check(family, how, policy(name), exact="padded" not in how and family not in models.EAGER)


@pytest.mark.parametrize("how", ["greedy", "chunked"])
@pytest.mark.parametrize("name", [name for name in METHODS if policy(name).scorer.collects])
def test_attention_counted_on_the_way_through_a_prompt(name, how, monkeypatch):
    monkeypatch.setattr(attention, "MANY_LOGITS", 1)
    passes: list[int] = []
    counting = attention.attend_and_count
    monkeypatch.setattr(
        attended, "attend_and_count", lambda q, *a, **k: passes.append(q.shape[2]) or counting(q, *a, **k)
    )
    check("llama", how, policy(name), exact=False)
    assert max(passes) > 1


def test_counting_does_not_stand_in_the_way_of_gradients_of_values(monkeypatch):
    """Where nothing but the projection of values is trained, queries need none."""
    monkeypatch.setattr(attention, "MANY_LOGITS", 1)
    gradients = []
    for model, cache in ((models.build("llama"), None), (models.build("llama"), "h2o")):
        model.requires_grad_(False)
        weight = model.model.layers[0].self_attn.v_proj.weight.requires_grad_()
        held = None if cache is None else SieveCache(model, policy(cache))
        with torch.enable_grad():
            logits = model(input_ids=torch.arange(3, 15)[None], past_key_values=held).logits
            gradients.append(torch.autograd.grad(logits[:, -1].square().sum(), weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


def test_counting_does_not_stand_in_the_way_of_gradients(monkeypatch):
    monkeypatch.setattr(attention, "MANY_LOGITS", 1)
    gradients = []
    for model, cache in ((models.stock("llama"), None), (models.managed("llama"), sieve("llama", policy("h2o")))):
        for token in (torch.arange(3, 15)[None], torch.tensor([[5]])):
            embedded = model.get_input_embeddings()(token).detach().requires_grad_()
            with torch.enable_grad():
                out = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
                gradients.append(torch.autograd.grad(out.logits[:, -1].square().sum(), embedded)[0])
            cache = out.past_key_values
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in gradients)
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-2, atol=1e-3)


BUDGETS = {"threshold": {"threshold": float("-inf")}, "ratio": {"budget": 1.0}, "bytes": {"budget": "1GB"}}


@pytest.mark.parametrize("how", ["greedy", "chunked", "padded", "beam"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_kind_of_budget(budget, how):
    check("llama", how, get_policy("knorm", **BUDGETS[budget]), exact="padded" not in how)
