"""Policies: parsing, validation, defaults, and what holds for every method in the registry."""

from __future__ import annotations

import dataclasses
import json

import pytest

import kvsieve
from kvsieve.budgets import Bytes, EvictRatio, Ratio, Threshold, Tokens, Unlimited, parse_bytes
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.shares import LayerVariance
from kvsieve.triggers import AfterPrefill, EveryForward, EveryTokens, OverLength, parse_trigger


def make(name: str, **settings) -> Policy:
    budget = {"full": {}, "sink_recent_uniform": {"budget": 2048}}.get(name, {"budget": 128})
    return kvsieve.get_policy(name, **({**budget, **settings} if name != "full" else {}))


@pytest.mark.parametrize("name", kvsieve.list_methods())
def test_every_method_is_frozen_hashable_and_json(name):
    policy = make(name)
    assert policy.name == name
    assert hash(policy) == hash(make(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.budget = Unlimited()
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize("name", kvsieve.list_methods())
def test_every_method_says_where_it_comes_from(name):
    scorer = make(name).scorer
    assert type(scorer).__doc__
    assert scorer.source


def test_what_a_budget_means():
    assert kvsieve.get_policy("knorm", budget=0.5).budget == Ratio(0.5)
    assert kvsieve.get_policy("knorm", budget=7).budget == Tokens(7)
    assert kvsieve.get_policy("knorm", budget="2MiB").budget == Bytes(2 << 20)
    assert kvsieve.get_policy("knorm", threshold=-3).budget == Threshold(-3.0)
    assert kvsieve.get_policy("full").budget == Unlimited()
    assert kvsieve.get_policy("sink_recent", sink_tokens=3, recent_tokens=5).budget == Tokens(8)


def test_when_defaults():
    assert isinstance(kvsieve.get_policy("knorm", budget=0.5).trigger, AfterPrefill)
    assert isinstance(kvsieve.get_policy("knorm", budget=5).trigger, EveryForward)
    assert isinstance(kvsieve.get_policy("knorm", budget="1MB").trigger, EveryForward)
    assert isinstance(kvsieve.get_policy("knorm", threshold=0).trigger, EveryForward)
    assert parse_trigger("every:64") == EveryTokens(64)
    assert parse_trigger("over:4096") == OverLength(4096)


def test_counts_follow_the_published_rule():
    nine = kvsieve.get_policy("knorm", compression_ratio=0.9).budget
    assert nine.counts(100 * nine.kept) == 9  # 1 - 0.9 truncates
    assert Ratio(0.1).counts(100 * 0.1) == 10
    assert Ratio(0.001).counts(3 * 0.001) == 1


@pytest.mark.parametrize(("text", "n"), [("512MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("10b", 10), ("3kib", 3072)])
def test_bytes(text, n):
    assert parse_bytes(text) == n


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0.0}, BudgetError, r"\(0, 1\]"),
        ({"budget": 1.5}, BudgetError, r"\(0, 1\]"),
        ({"budget": 0}, BudgetError, "1 or more"),
        ({"budget": -3}, BudgetError, "1 or more"),
        ({"budget": True}, BudgetError, "bool"),
        ({"budget": "lots"}, BudgetError, "512MiB"),
        ({"budget": "5 parsecs"}, BudgetError, "512MiB"),
        ({"compression_ratio": 1.0}, BudgetError, r"\[0, 1\)"),
        ({"compression_ratio": -0.1}, BudgetError, r"\[0, 1\)"),
        ({"threshold": float("nan")}, BudgetError, "NaN"),
        ({}, BudgetError, "needs a budget"),
        ({"budget": 0.5, "threshold": 1.0}, PolicyError, "only one of budget and threshold"),
        ({"budget": 64, "when": "sometimes"}, PolicyError, "every_forward"),
        ({"budget": 64, "when": "every:0"}, PolicyError, "positive"),
        ({"budget": 64, "share": "fairly"}, PolicyError, "across_heads"),
        ({"budget": 64, "windowsize": 3}, PolicyError, "has no hyper-parameter 'windowsize'"),
        ({"budget": 63}, BudgetError, "smallest legal budget is 64"),
        ({"budget": 100, "kernel_size": 4}, PolicyError, "odd"),
        ({"threshold": 0.1, "share": "across_heads"}, PolicyError, "cannot be shared"),
        ({"budget": 64, "share": LayerVariance(), "threshold": 0.1}, PolicyError, "only one of"),
        ({"threshold": 0.1, "share": "layer_variance"}, PolicyError, "cannot be shared"),
        ({"budget": EvictRatio(0.3), "share": "layer_variance"}, PolicyError, "cannot be shared between layers"),
        ({"budget": 64, "protect": Protect(sink=60, recent=60)}, BudgetError, "60 sinks \\+ 60 recent"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        kvsieve.get_policy("snapkv", **settings)


def test_unknown_method_names_the_nearest():
    with pytest.raises(PolicyError, match="did you mean 'snapkv'"):
        kvsieve.get_policy("snapvk", budget=0.5)


def test_negative_protection():
    with pytest.raises(PolicyError, match="zero or more"):
        Protect(sink=-1)
