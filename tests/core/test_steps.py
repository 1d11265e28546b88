"""Decode steps that are decided on together, against layers that decide each for itself and are looked at after every
step, so that nothing is postponed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layer import RANKED, policies, rotary

import kvsieve
from kvsieve import steps
from kvsieve.budgets import Tokens
from kvsieve.errors import ScoreError, UnsupportedOperationError
from kvsieve.layer import KVLayer
from kvsieve.ledger import KEY, POSITION, VALUE
from kvsieve.measure import kept_positions
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.ragged import RaggedStore, look_up
from kvsieve.scorer import Scorer
from kvsieve.shares import Pyramid
from kvsieve.steps import StepGroup
from kvsieve.store import DenseStore, Store
from kvsieve.view import Visibility

LAYERS, B, H, HKV, D, LENGTH = 3, 2, 4, 2, 8, 80


def by_threshold(share: float = 0.5, **protect: int) -> Policy:
    norms = -fed(1).norm(dim=-1)
    return kvsieve.get_policy("knorm", threshold=float(norms.quantile(share)), protect=Protect(**protect))


def fed(which: int) -> torch.Tensor:
    """`[layers, B, H|Hkv, length, D]` queries (0), keys (1) and values (2)."""
    heads = H if which == 0 else HKV
    g = torch.Generator().manual_seed(which)
    return torch.randn(LAYERS, B, heads, LENGTH, D, generator=g, dtype=torch.float64)


class Stack:
    """Some layers of one cache, fed in the order of a forward pass."""

    def __init__(self, policy: Policy, together: bool, heads: tuple[int, ...] = (HKV,) * LAYERS) -> None:
        self.heads = heads
        self.steps = StepGroup() if together else None
        self.layers = [KVLayer(policy, i, i, LAYERS, rope=rotary(), steps=self.steps) for i in range(LAYERS)]
        self.q, self.k, self.v = (fed(which) for which in range(3))

    def one(self, i: int, t: int = 1, hold: bool = False) -> torch.Tensor:
        layer = self.layers[i]
        part = slice(layer.seen, layer.seen + t)
        visibility = Visibility(layer.seen, t)
        layer.append(self.k[i, :, : self.heads[i], part], self.v[i, :, : self.heads[i], part])
        out = layer.attend(self.q[i, :, :, part], visibility)
        layer.observe(self.q[i, :, :, part], visibility, hold=hold)
        return out

    def feed(self, t: int = 1, hold: bool = False) -> torch.Tensor:
        return torch.stack([self.one(i, t, hold) for i in range(LAYERS)])

    def held(self) -> list[Any]:
        return [kept_positions(layer).tolist() for layer in self.layers]

    def check_records(self) -> None:
        for i, layer in enumerate(self.layers):
            position, live = layer.store.read(POSITION).long(), layer.store.live
            index = position.clamp_min(0)[..., None].expand(-1, -1, -1, D)
            for name, source in ((KEY, self.k), (VALUE, self.v)):
                assert torch.equal(layer.store.read(name)[live], source[i, :, : self.heads[i]].gather(2, index)[live])


def twins(policy: Policy, **settings: Any) -> tuple[Stack, Stack]:
    return Stack(policy, True, **settings), Stack(policy, False, **settings)


def go_on(together: Stack, alone: Stack, tokens: tuple[int, ...]) -> None:
    """The same for both, which must come to the same; only one of them is looked at on the way."""
    for t in tokens:
        torch.testing.assert_close(together.feed(t), alone.feed(t), rtol=1e-11, atol=1e-11)
        alone.held()
    assert together.held() == alone.held()
    together.check_records()
    alone.check_records()
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        assert ours.store.tokens == theirs.store.tokens
        assert (ours.evictions, ours.evicted_at, ours.decided_at) == (
            theirs.evictions, theirs.evicted_at, theirs.decided_at,
        )  # fmt: skip


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("which", range(4))
def test_every_method(name, which):
    together, alone = twins(policies(name)[which])
    go_on(together, alone, (20, *[1] * 12))
    go_on(together, alone, (5, *[1] * 9))


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9]), sink=st.integers(0, 2), recent=st.integers(0, 5),
    chunks=st.lists(st.sampled_from([1, 1, 1, 1, 1, 6]), min_size=1, max_size=20),
)  # fmt: skip
def test_thresholds(share, sink, recent, chunks):
    together, alone = twins(by_threshold(share, sink=sink, recent=recent))
    go_on(together, alone, tuple(chunks[: LENGTH // 6]))


@pytest.mark.parametrize("name", ["h2o", "pyramidkv", "streaming_llm"])
def test_a_pass_that_was_interrupted(name):
    together, alone = twins(policies(name)[0])
    go_on(together, alone, (20, 1, 1))
    for stack in (together, alone):
        stack.one(0)
        stack.one(1)
    assert [together.steps.waits(layer) for layer in together.layers] == [True, True, False]
    for stack in (together, alone):  # the first layer goes on: what waited is decided before
        stack.one(0)
    assert together.held() == alone.held() or together.steps.waits(together.layers[0])
    for stack in (together, alone):
        for layer, times in ((1, 1), (2, 2)):
            for _ in range(times):
                stack.one(layer)
    go_on(together, alone, (1, 1, 1))


def test_forgetting_drops_what_was_waiting():
    together, alone = twins(policies("h2o")[0])
    go_on(together, alone, (20, 1))
    together.one(0)
    for stack in (together, alone):
        for layer in stack.layers:
            layer.reset()
    assert not any(together.steps.waits(layer) for layer in together.layers)
    go_on(together, alone, (20, 1, 1))


def test_copies_go_on_alone():
    together, alone = twins(policies("h2o")[0])
    go_on(together, alone, (20, 1, 1, 1))
    held = together.held()
    twin = copy.deepcopy(together)
    assert all(layer.steps is twin.steps for layer in twin.layers)
    assert all(mine is own for mine, own in zip(twin.steps.members, twin.layers, strict=True))
    go_on(twin, alone, (1, 1, 1))
    assert together.held() == held


@pytest.mark.parametrize("name", ["knorm", "streaming_llm"])
def test_tokens_that_are_taken_back(name):
    """One at a time into slots that had become free, and several at once."""
    together, alone = twins(policies(name)[0])
    go_on(together, alone, (20, 1, 1))
    for fed_, back in ((1, 1), (4, 2)):
        for stack in (together, alone):
            stack.feed(fed_, hold=True)
            for layer in stack.layers:
                layer.crop(back)
        go_on(together, alone, (1, 1))


@pytest.mark.parametrize("chosen", ["knorm", "pyramid", "threshold"])
def test_layers_that_go_back_in_any_order_decide_for_themselves(chosen):
    """All but one of the tokens of a pass are taken back, so that the rest looks like a decode step."""
    share = {"share": Pyramid(beta=4, window=2)} if chosen == "pyramid" else {}
    policy = by_threshold(recent=2) if chosen == "threshold" else kvsieve.get_policy("knorm", budget=12, **share)
    together, alone = twins(policy)
    go_on(together, alone, (20, 1, 1))
    for stack in (together, alone):
        stack.feed(2, hold=True)
        for layer in reversed(stack.layers):
            layer.crop(1)
    assert not any(together.steps.waits(layer) for layer in together.layers)
    for stack in (together, alone):
        for layer in stack.layers:
            layer.crop(1, regardless=True)
    go_on(together, alone, (1, 1))


def test_a_token_of_an_interrupted_pass_is_taken_back():
    together, alone = twins(policies("knorm")[0])
    go_on(together, alone, (20, 1))
    for stack in (together, alone):
        stack.one(0)
        with pytest.raises(UnsupportedOperationError, match="has evicted"):
            stack.layers[0].crop(1)
        stack.layers[0].crop(1, regardless=True)
    go_on(together, alone, (1, 1))


def test_all_layers_are_decided_on_at_once(monkeypatch):
    """What makes it fast; and in between no layer moves a token into the slot of another."""
    calls, choose = [], steps.lowest_slot
    monkeypatch.setattr(steps, "lowest_slot", lambda *a: calls.append(a[0].shape[0]) or choose(*a))
    moves, settle = [], DenseStore.settle
    monkeypatch.setattr(DenseStore, "settle", lambda self: moves.append(self._gaps is not None) or settle(self))
    together, _ = twins(policies("h2o")[0])
    together.feed(20)
    for _ in range(5):
        together.feed()
    assert calls == [LAYERS * B] * 5
    assert not any(moves)


def test_layers_of_different_length_decide_for_themselves(monkeypatch):
    calls, choose = [], steps.lowest_slot
    monkeypatch.setattr(steps, "lowest_slot", lambda *a: calls.append(a[0].shape) or choose(*a))
    together, alone = twins(kvsieve.get_policy("h2o", budget=12, window_size=2, share=Pyramid(beta=4, window=2)))
    together.feed(30)
    alone.feed(30)
    assert len({layer.store.longest for layer in together.layers}) > 1
    together.feed()
    assert len(calls) > 1
    alone.feed()
    assert together.held() == alone.held()


@pytest.mark.parametrize("chosen", ["h2o", "threshold"])
def test_layers_of_different_width(chosen):
    policy = by_threshold(recent=2) if chosen == "threshold" else policies(chosen)[0]
    together, alone = twins(policy, heads=(2, 1, 2))
    go_on(together, alone, (20, *[1] * 10))


@dataclass(frozen=True)
class Spoilt(Scorer):
    """Scores by position; that of one position is not a number."""

    at: int

    def score(self, view):
        return torch.where(view.positions == self.at, torch.nan, view.positions.double())


@pytest.mark.parametrize("at", [0, 15, 29])
def test_nan_is_refused_even_for_tokens_that_are_protected(at):
    policy = Policy(Spoilt(-1), Tokens(30), Protect(sink=2, recent=4))
    together = Stack(policy, True)
    together.feed(30)
    for layer in together.layers:
        layer.policy = replace(policy, scorer=Spoilt(at))
    with pytest.raises(ScoreError, match="12 of 372 scores are NaN"):
        together.feed()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 3), h=st.integers(1, 3), kinds=st.integers(0, 2))
def test_looking_a_token_up_in_several_stores(data, count, h, kinds):
    """At once, against one store after the other; dense ones (0), ragged ones (1) and both (which are not)."""
    stores: list[Store] = []
    for i in range(count):
        store: Store = DenseStore(B, h)
        position = torch.arange(9, dtype=torch.int32).expand(B, h, 9)
        values = torch.rand(B, h, 9, 2)
        store.append({KEY: values, VALUE: values, POSITION: position, "score": values[..., 0]}, 9)
        if kinds == 1 or (kinds == 2 and i % 2):
            keep = torch.ones(B, h, 9, dtype=torch.bool)
            for b, head in [(0, 0), *data.draw(st.lists(st.tuples(st.integers(0, B - 1), st.integers(0, h - 1))))]:
                keep[b, head, data.draw(st.integers(1, 8))] = False
            store = store.keep(keep)
            if data.draw(st.booleans()):
                store.drop(torch.zeros(B, h, dtype=torch.long))
        stores.append(store)
    for wanted in range(9):
        singly = [store.find(wanted) for store in stores]
        found = look_up(stores, wanted, "score")
        at_once = count == 1 or all(isinstance(store, RaggedStore) for store in stores)
        assert (found is None) == (not at_once or any(slots is None for slots in singly))
        if found is not None:
            for store, slots, place, entry in zip(stores, singly, *found, strict=True):
                assert slots.tolist() == place.tolist()
                assert torch.equal(store.at("score", slots), torch.from_numpy(entry))
