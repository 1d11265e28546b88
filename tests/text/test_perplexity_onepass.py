"""One parallel pass equals token by token: deaths of keys against their naive twins, then whole models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import models
from kvsieve import get_policy
from kvsieve.attention_naive import attend_naive
from kvsieve.budgets import Threshold
from kvsieve.errors import BudgetError, ScoreError
from kvsieve.layer import KVLayer
from kvsieve.methods.h2o import H2O
from kvsieve.methods.knorm import KNorm
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.select import top_mask_naive
from kvsieve.shares import LayerVariance
from kvsieve.text import _recurrence
from kvsieve.text._deaths import threshold_deaths, top_deaths
from kvsieve.text.likelihood import one_pass_reason, perplexity
from kvsieve.text.onepass import masked_attention
from kvsieve.triggers import EveryTokens
from kvsieve.view import Visibility

MEASURED = ("keys_seen", "keys_held", "bytes_held", "bytes_full", "mean_visible_keys")
EVERY = {"when": "every_forward"}
VOCAB, LENGTH = 400, 280
"""Longer than two blocks of queries."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distinct(length: int, seed: int = 3) -> torch.Tensor:
    """Distinct ids: equal tokens have equal key norms in the first layer, and a tie there is decided by rounding."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:length]


# ---- deaths


def deaths_naive(scores: torch.Tensor, drops: np.ndarray, protect: Protect) -> torch.Tensor:
    """Step by step with the selection that a policy uses, written out in plain Python."""
    heads, n = scores.shape
    death = torch.full((heads, n), n + 1)
    position = torch.arange(n).expand(1, heads, n)
    alive = torch.zeros(1, heads, n, dtype=torch.bool)
    for i in range(n):
        alive[..., i] = True
        protected = alive & ((position < protect.sink) | (position > i - protect.recent))
        counts = alive.sum(-1) - int(drops[i])
        keep = top_mask_naive(scores[None], position, alive, protected, counts)
        death[(alive & ~keep)[0]] = i + 1
        alive = keep
    return death


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("protect", [Protect(), Protect(sink=3), Protect(recent=4), Protect(sink=2, recent=3)])
def test_fixed_scores_and_their_ties(protect, levels):
    n, budget = 40, 9
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (3, n), generator=generator).float()
    drops = np.zeros(n, dtype=np.int64)
    drops[budget:] = 1
    assert torch.equal(top_deaths(scores, drops, protect), deaths_naive(scores, drops, protect))
    late = np.zeros(n, dtype=np.int64)
    late[20], late[30] = 5, 7
    assert torch.equal(top_deaths(scores, late, protect), deaths_naive(scores, late, protect))
    assert bool((top_deaths(scores, np.zeros(n, dtype=np.int64), protect) == n + 1).all())


@pytest.mark.parametrize("protect", [Protect(), Protect(sink=3, recent=4)])
def test_thresholds(protect):
    scores = random(2, 30)
    death = threshold_deaths(scores, 0.1, protect)
    for h in range(2):
        for j in range(30):
            want = 31 if scores[h, j] >= 0.1 or j < protect.sink else j + 1 + protect.recent
            assert death[h, j] == want


@pytest.mark.parametrize("sharpness", [1.0, 60.0])
@pytest.mark.parametrize("name", ["tova", "h2o", "observed_attention"])
@pytest.mark.parametrize("extras", [{}, {"softcap": 5.0}, {"sinks": random(4, seed=9)}])
def test_attention_scores_against_a_layer(name, sharpness, extras, monkeypatch):
    """`KVLayer` decides step by step; sharp attention makes evicted keys matter to the scaling of a block."""
    n, heads = 150, 2
    q, k = random(1, 4, n, 8) * sharpness, random(1, heads, n, 8, seed=1)
    policy = get_policy(name, budget=20, protect=Protect(sink=2, recent=3))
    layer = KVLayer(policy)
    layer.softcap, layer.sinks = extras.get("softcap"), extras.get("sinks")
    twin = KVLayer(policy)
    twin.softcap, twin.sinks = layer.softcap, layer.sinks
    want = torch.full((heads, n), n + 1)
    for i in range(n):
        twin.append(k[:, :, i : i + 1], k[:, :, i : i + 1])
        before = twin.store.read("position")[0].clone()
        twin.observe(q[:, :, i : i + 1], Visibility(i, 1))
        after = twin.store.read("position")[0]
        for h in range(heads):
            for j in set(before[h].tolist()) - set(after[h].tolist()):
                want[h, j] = i + 1
    blocks = []
    inner = _recurrence.Recurrence._block
    monkeypatch.setattr(_recurrence.Recurrence, "_block", lambda s, a, b, d: blocks.append(b - a) or inner(s, a, b, d))
    drops = np.zeros(n, dtype=np.int64)
    drops[20:] = 1
    got = _recurrence.Recurrence(policy.scorer, policy.protect, q, k, layer).deaths(drops)
    assert torch.equal(got, want)
    if sharpness > 1 and "softcap" not in extras:
        assert len(blocks) > 2, "sharp attention should have made blocks smaller"


def test_attention_that_is_not_finite():
    q, k = random(1, 4, 10, 8), random(1, 2, 10, 8)
    k[0, 0, 3] = torch.nan
    policy = get_policy("tova", budget=4)
    drops = np.ones(10, dtype=np.int64)
    with pytest.raises(ScoreError, match="finite"):
        _recurrence.Recurrence(policy.scorer, policy.protect, q, k, KVLayer(policy)).deaths(drops)


@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0}, {"sinks": random(4, seed=9)}])
def test_attention_over_what_is_alive(extras):
    n = 300
    q, k, v = random(1, 4, n, 8), random(1, 2, n, 8, seed=1), random(1, 2, n, 5, seed=2)
    generator = torch.Generator().manual_seed(0)
    death = torch.arange(n) + 1 + torch.randint(0, 200, (2, n), generator=generator)
    death[1, ::3] = n + 1  # so that heads differ in how many keys are alive
    row = torch.arange(n)[:, None]
    mask = (torch.arange(n) <= row) & (death[:, None] > row)
    want = attend_naive(q, k, v, mask=mask.repeat_interleave(2, 0)[None], **extras)
    first = int(death.min())
    torch.testing.assert_close(masked_attention(q, k, v, death, first, **extras), want[:, :, first:])


# ---- whole models


POLICIES = {
    "full": lambda: get_policy("full"),
    "streaming_llm": lambda: get_policy("streaming_llm", budget=68),
    "sink_recent": lambda: get_policy("sink_recent", recent_tokens=50),
    "sink_recent, larger budget": lambda: get_policy("sink_recent", sink_tokens=2, recent_tokens=20, budget=40),
    "random": lambda: get_policy("random", n_sink=3, budget=100),
    "random, threshold": lambda: get_policy("random", threshold=0.4, window=33),
    "random, ratio": lambda: get_policy("random", budget=0.3, n_sink=4, **EVERY),
    "random, bytes": lambda: get_policy("random", budget="60KiB"),
    "random, pyramid": lambda: get_policy("random", budget=120, share="pyramid"),
    "knorm": lambda: get_policy("knorm", budget=60),
    "knorm, threshold": lambda: get_policy("knorm", threshold=-8.5, window=0, protect=Protect(sink=2)),
    "tova": lambda: get_policy("tova", budget=50),
    "tova, ratio": lambda: get_policy("tova", budget=0.4, **EVERY),
    "h2o": lambda: get_policy("h2o", budget=50),
    "h2o, ratio, pyramid": lambda: get_policy("h2o", budget=0.5, window_size=4, share="pyramid", **EVERY),
    "observed_attention": lambda: get_policy("observed_attention", budget=70),
}


@pytest.mark.parametrize("case", POLICIES)
def test_every_policy_on_llama(case):
    model = models.build("llama", torch.float64, vocab_size=VOCAB)
    check(model, distinct(LENGTH), POLICIES[case](), 1e-9)


@pytest.mark.parametrize("case", ["random, threshold", "knorm", "tova", "h2o, ratio, pyramid"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_neox"])
def test_other_families(family, case):
    model = models.build(family, torch.float64, vocab_size=VOCAB)
    check(model, distinct(180), POLICIES[case](), 1e-9)


@pytest.mark.parametrize("case", ["random, threshold", "tova", "observed_attention"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks(family, case):
    check(models.build(family, vocab_size=VOCAB), distinct(150), POLICIES[case](), 2e-3)


def check(model, ids, policy, tolerance: float) -> None:
    assert one_pass_reason(policy) is None
    token = perplexity(model, ids, policy, mode="token")
    one = perplexity(model, ids, policy)
    assert one.mode == "one_pass"
    assert float((one.nll - token.nll).abs().max()) < tolerance
    assert [getattr(one, key) for key in MEASURED] == [getattr(token, key) for key in MEASURED]


def test_float32_is_within_rounding():
    model = models.build("llama", vocab_size=VOCAB, initializer_range=0.05)
    for case in ("random, threshold", "tova"):
        check(model, distinct(LENGTH), POLICIES[case](), 1e-4)


@dataclass(frozen=True)
class Levels(KNorm):
    """Few different scores, so that ties decide. Without a name of its own, so not registered."""

    def token_score(self, view):
        return (view.new_positions * 7 % 4).double().expand(*view.new_keys.shape[:3])


def test_ties_are_decided_alike():
    model = models.managed("llama", torch.float64)
    check(model, models.words(1, 80), replace(get_policy("knorm", budget=20), scorer=Levels()), 1e-9)


# ---- when it is not exact


class OwnRules(Policy):
    pass


@dataclass(frozen=True)
class OtherH2O(H2O):
    def score(self, view):
        return -super().score(view)


def test_reasons():
    h2o = get_policy("h2o", budget=50)
    for policy, message in [
        (get_policy("snapkv", budget=80), "judges a key anew"),
        (get_policy("keydiff", budget=80), "judges a key anew"),
        (get_policy("expected_attention", budget=80), "judges a key anew"),
        (replace(h2o, scorer=OtherH2O()), "judges a key anew"),
        (replace(h2o, budget=Threshold(0.1)), "judges a key anew"),
        (get_policy("knorm", budget=50, share="across_heads"), "compete"),
        (get_policy("knorm", budget=0.5), "after every token"),
        (replace(h2o, trigger=EveryTokens(4)), "after every token"),
        (get_policy("evict3r", budget=50), "cuts all layers together"),
        (replace(h2o, share=LayerVariance()), "cuts all layers together"),
        (OwnRules(h2o.scorer, h2o.budget, h2o.protect), "rules of its own"),
    ]:
        assert message in str(one_pass_reason(policy))
    assert "rotated anew" in str(one_pass_reason(h2o, "slot"))
    assert one_pass_reason(get_policy("full"), "slot") is None


def test_errors_are_those_of_the_cache():
    model = models.managed("llama")
    below = get_policy("h2o", budget="6KiB")
    broken = models.build("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0] = torch.nan
    for mode in ("token", "one_pass"):
        with pytest.raises(BudgetError, match="are protected"):
            perplexity(model, models.words(1, 60), below, mode=mode)
        for name in ("knorm", "tova"):
            with pytest.raises(ScoreError):
                perplexity(broken, models.words(1, 40), get_policy(name, budget=8), mode=mode)
