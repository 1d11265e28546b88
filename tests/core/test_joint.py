"""Layers that are cut together: when, by how much, and what interruptions, copies and taken-back tokens do to them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve import attention
from kvsieve.budgets import Bytes, OfStream, Ratio
from kvsieve.errors import BudgetError, ScoreError, UnsupportedOperationError
from kvsieve.joint import LayerGroup
from kvsieve.layer import KVLayer
from kvsieve.ledger import KEY, POSITION, VALUE, Kind
from kvsieve.measure import measure
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.shares import LayerVariance
from kvsieve.view import LayerView, Visibility

H, HKV, D, LAYERS, LENGTH = 4, 2, 8, 3, 160


class Stack:
    """Some layers in one group, fed in forward order; what they see does not depend on what they keep."""

    def __init__(self, policy: Policy, batch: int = 1, layers: int = LAYERS, padding: Any = None, **settings: Any):
        g, self.group = torch.Generator().manual_seed(3), LayerGroup()
        self.layers = [KVLayer(policy, i, i, layers, group=self.group, **settings) for i in range(layers)]
        scale = torch.tensor([0.3, 3.0, 1.0] * layers)[:layers].view(-1, 1, 1, 1, 1)
        self.q = torch.randn(layers, batch, H, LENGTH, D, generator=g, dtype=torch.float64) * scale
        self.k = torch.randn(layers, batch, HKV, LENGTH, D, generator=g, dtype=torch.float64)
        self.padding, self.at = padding, 0

    def one(self, i: int, t: int, hold: bool = False, observe: bool = True) -> None:
        part, layer = slice(self.at, self.at + t), self.layers[i]
        visibility = Visibility(self.at, t, None if self.padding is None else self.padding[:, : self.at + t])
        layer.append(self.k[i, :, :, part], -self.k[i, :, :, part])
        layer.attend(self.q[i, :, :, part], visibility)
        if observe:
            layer.observe(self.q[i, :, :, part], visibility, hold=hold)

    def feed(self, t: int, hold: bool = False) -> None:
        for i in range(len(self.layers)):
            self.one(i, t, hold)
        self.at += t

    def crop(self, count: int) -> None:
        for layer in self.layers:
            layer.crop(count)
        self.at -= count

    def held(self, row: int = 0) -> list[list[int]]:
        return [sorted(p for p in layer.store.read(POSITION)[row, 0].tolist() if p >= 0) for layer in self.layers]

    def sizes(self) -> list[int]:
        return [layer.store.longest for layer in self.layers]


def evict3r(budget: Any = 10, **settings: Any) -> Policy:
    return kvsieve.get_policy("evict3r", budget=budget, **settings)


@pytest.mark.parametrize("name", ["evict3r", "knorm", "streaming_llm"])
def test_all_are_cut_after_the_last_one(name):
    stack = Stack(kvsieve.get_policy(name, budget=10, share=LayerVariance(), protect=Protect(sink=2)))
    for i in range(LAYERS):
        assert stack.sizes()[:i] == [30] * i
        stack.one(i, 30)
    stack.at = 30
    assert sum(stack.sizes()) == 30
    assert len(set(stack.sizes())) > 1
    before = stack.sizes()
    stack.one(0, 2)
    stack.one(1, 2)
    assert stack.sizes() == [before[0] + 2, before[1] + 2, before[2]]
    stack.one(2, 2)
    assert sum(stack.sizes()) == 30
    assert not stack.group.waiting


@settings(max_examples=25, deadline=None)
@given(
    budget=st.integers(8, 20), layers=st.integers(1, 5), sink=st.integers(0, 4), recent=st.integers(0, 4),
    temp=st.sampled_from([0.01, 0.5, 100.0]), chunks=st.lists(st.sampled_from([1, 1, 2, 9, 25]), min_size=2, max_size=6)
)  # fmt: skip
def test_counts_add_up_and_protection_holds(budget, layers, sink, recent, temp, chunks):
    policy = evict3r(budget, temp=temp, protect=Protect(sink=sink, recent=recent))
    stack, held = Stack(policy, layers=layers), 0
    for t in chunks:
        stack.feed(t)
        held = min(held + t * layers, budget * layers)
        assert sum(stack.sizes()) == held
        safe = {*range(min(sink, stack.at)), *range(max(0, stack.at - recent), stack.at)}
        assert all(safe <= set(kept) for kept in stack.held())
        assert min(stack.sizes()) >= 1


@pytest.mark.parametrize("budget", [Ratio(0.4), OfStream(0.2, 50), Bytes(LAYERS * HKV * 16 * 8 * 40)])
def test_other_budgets(budget):
    stack = Stack(replace(evict3r(2, protect=Protect(sink=2)), budget=budget))
    for t in (20, 1, 1, 30, 1):
        stack.feed(t)
        if isinstance(budget, Ratio):
            assert sum(stack.sizes()) == int(stack.at * 0.4 * LAYERS)
        elif isinstance(budget, OfStream):
            assert sum(stack.sizes()) == min(stack.at * LAYERS, 10 * LAYERS)
        else:
            assert measure(stack.layers)["bytes_held"] <= budget.n


@pytest.mark.parametrize("tokens", [40, 300, 1000])
@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (0.0, 3.0, 3.0), (3.0, 0.0, 0.0)])
def test_a_byte_budget_holds_when_layers_differ(tokens, weights, monkeypatch):
    """Small layers have spare slots out of proportion; a long stretch of decoding fills all of them."""
    monkeypatch.setattr(LayerVariance, "weigh", lambda self, view: [weights[view.rank]])
    limit = tokens * LAYERS * HKV * 16 * 8
    group, g = LayerGroup(), torch.Generator().manual_seed(0)
    layers = [KVLayer(evict3r(f"{limit}B"), i, i, LAYERS, group=group) for i in range(LAYERS)]
    for t in (tokens * LAYERS, *[1] * 60, 5, 5, *[1] * 20):
        for layer in layers:
            kv = torch.randn(1, HKV, t, D, generator=g, dtype=torch.float64)
            layer.append(kv, kv)
            layer.observe(kv.repeat(1, 2, 1, 1)[:, :, -1:], Visibility(layer.seen - 1, 1))
    held = measure(layers)["bytes_held"]
    assert 0.9 * limit < held <= limit


def test_protection_beyond_the_budget():
    stack = Stack(evict3r(10, protect=Protect(kinds=(int(Kind.TEXT),))))
    for layer in stack.layers:
        layer.append(stack.k[0, :, :, :12], stack.k[0, :, :, :12], kind=torch.zeros(12, dtype=torch.uint8))
    for layer in stack.layers[:-1]:
        layer.observe(stack.q[0, :, :, :12], Visibility(0, 12))
    with pytest.raises(BudgetError, match="10 tokens per layer, on average, are below the 12 that are protected"):
        stack.layers[-1].observe(stack.q[0, :, :, :12], Visibility(0, 12))


def test_published_arithmetic_empties_a_layer():
    policy = replace(evict3r(10, protect=Protect(sink=4)), share=LayerVariance(1e-3, as_published=True))
    stack = Stack(policy)
    stack.feed(30)
    assert min(stack.sizes()) == 0, "its protected tokens included"


# ---- interruptions, copies, drafts


def test_an_interrupted_pass_is_forgotten():
    """The last layer never reported. The next pass decides with fresh reports."""
    stack = Stack(evict3r())
    stack.feed(20)
    stack.one(0, 5)
    stack.one(1, 5)
    stack.one(2, 5, observe=False)
    assert set(stack.group.waiting) == {0, 1}
    stack.at += 5
    stack.feed(4)
    assert sum(stack.sizes()) == 30
    assert not stack.group.waiting
    assert [layer.seen for layer in stack.layers] == [29] * 3


def test_a_layer_left_behind_is_an_error():
    stack = Stack(evict3r())
    stack.feed(20)
    stack.one(0, 5)
    stack.at += 5
    stack.one(0, 5)
    with pytest.raises(UnsupportedOperationError, match="layer 1 has seen 25 tokens where others have seen 30"):
        stack.one(1, 5)


def test_reset_after_an_interruption():
    stack, fresh = Stack(evict3r()), Stack(evict3r())
    stack.one(0, 20)
    for layer in stack.layers:
        layer.reset()
    assert not stack.group.waiting
    for t in (25, 1, 6):
        stack.feed(t)
        fresh.feed(t)
    assert stack.held() == fresh.held()


def test_a_copy_is_independent():
    stack, plain = Stack(evict3r()), Stack(evict3r())
    for s in (stack, plain):
        s.feed(25)
        s.one(0, 3)  # in the middle of a pass
    twin = copy.deepcopy(stack)
    assert twin.layers[0].group is twin.layers[1].group is twin.group
    assert twin.group is not stack.group
    assert [a is b for a, b in zip(twin.layers, twin.group.members, strict=True)] == [True] * 3
    assert twin.layers[0].policy is stack.layers[0].policy
    for i in (1, 2):
        stack.one(i, 3)
    assert twin.sizes() != stack.sizes()
    for s in (twin, plain):
        for i in (1, 2):
            s.one(i, 3)
    assert twin.held() == plain.held() == stack.held()
    for s in (stack, twin, plain):
        s.at += 3
        s.feed(5)
    assert twin.held() == plain.held() == stack.held()


@pytest.mark.parametrize("name", ["evict3r", "knorm", "frame_attention"])
@pytest.mark.parametrize("rejected", [0, 1, 4, 5])
def test_held_back_tokens_leave_no_trace(name, rejected):
    policy = kvsieve.get_policy(name, budget=10, share=LayerVariance(), protect=Protect(sink=2))
    draft, plain = Stack(policy), Stack(policy)
    for _ in range(3):
        for s in (draft, plain):
            s.feed(7)
        draft.feed(5, hold=True)
        assert all(layer.pending for layer in draft.layers), "the layers behind do not settle the same pass"
        draft.crop(rejected)
        if rejected < 5:
            plain.feed(5 - rejected)
        assert draft.held() == plain.held()
        assert draft.at == plain.at


def test_a_held_pass_is_settled_by_the_next_one_and_by_reordering():
    stack, plain, moved = Stack(evict3r(), batch=2), Stack(evict3r(), batch=2), Stack(evict3r(), batch=2)
    stack.feed(20, hold=True)
    moved.feed(20, hold=True)
    plain.feed(20)
    assert stack.sizes() == [20] * 3
    stack.one(0, 4)
    assert stack.sizes()[1:] == plain.sizes()[1:]
    for layer in moved.layers:
        layer.map_rows(torch.tensor([1, 0]))
    assert [moved.held(row) for row in (1, 0)] == [plain.held(row) for row in (0, 1)]


def test_crop_refuses_what_has_been_counted():
    stack = Stack(evict3r(100))
    stack.feed(20)
    with pytest.raises(UnsupportedOperationError, match="already counted"):
        stack.layers[0].crop(2)
    cut = Stack(kvsieve.get_policy("knorm", budget=10, share="layer_variance"))
    cut.feed(20)
    with pytest.raises(UnsupportedOperationError, match="has evicted"):
        cut.layers[0].crop(2)


def test_crop_before_any_eviction():
    policy = kvsieve.get_policy("knorm", budget=18, share="layer_variance")
    stack, plain = Stack(policy), Stack(policy)
    stack.feed(12)
    stack.feed(5)
    stack.crop(3)
    plain.feed(14)
    for t in (9, 1, 1):
        stack.feed(t)
        plain.feed(t)
        assert stack.held() == plain.held()


def test_a_layer_on_its_own():
    alone = KVLayer(evict3r(8))
    other = KVLayer(evict3r(8))
    assert alone.group is not None
    assert alone.group is not other.group
    q = torch.randn(1, H, 30, D)
    alone.append(q[:, :2], q[:, :2])
    alone.observe(q, Visibility(0, 30))
    assert alone.store.longest == 8
    assert KVLayer(kvsieve.get_policy("knorm", budget=8), group=LayerGroup()).group is None


# ---- rows, triggers, numbers


@pytest.mark.parametrize("pads", [0, 9, 20])
def test_rows_do_not_depend_on_each_other(pads):
    """A row decides as it does alone, and padding takes no part: not even where all of a first chunk is padding."""
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, :pads] = False
    both = Stack(evict3r(10, protect=Protect(sink=2)), batch=2, padding=padding if pads else None)
    rows = [Stack(evict3r(10, protect=Protect(sink=2))) for _ in range(2)]
    for i, row in enumerate(rows):
        row.q, row.k = both.q[:, i : i + 1], both.k[:, i : i + 1]
    rows[1].q, rows[1].k = rows[1].q[:, :, :, pads:], rows[1].k[:, :, :, pads:]
    for t in (20, 3, 1, 1, 12, 1):
        both.feed(t)
        rows[0].feed(t)
        if both.at > pads:
            rows[1].feed(t if both.at - t >= pads else both.at - pads)
        assert both.held(0) == rows[0].held()
        if both.at > pads:
            assert [[p - pads for p in kept] for kept in both.held(1)] == rows[1].held()
    assert both.held(0) != both.held(1)


def test_rows_share_a_decision_where_storage_is_one_block():
    stack = Stack(evict3r(10, protect=Protect(sink=2)), batch=2, room=6)
    for _ in range(6):
        stack.feed(6)
        lengths = [layer.store.lengths for layer in stack.layers]
        assert all(n.unique().numel() == 1 for n in lengths)
        assert sum(stack.sizes()) == min(stack.at, 10) * LAYERS


def test_one_layer_over_a_length_is_enough():
    """Layers hold different numbers; a trigger that looks at them fires for all at once."""
    stack = Stack(kvsieve.get_policy("evict3r", budget=10, when="over:16", protect=Protect(sink=2)))
    stack.feed(30)
    assert sum(stack.sizes()) == 30
    assert len(set(stack.sizes())) > 1
    for _ in range(40):
        before = [n + 1 for n in stack.sizes()]
        stack.feed(1)
        assert sum(stack.sizes()) == (30 if max(before) > 16 else sum(before))
        assert max(stack.sizes()) <= 16 or sum(stack.sizes()) == 30


def test_a_trigger_that_does_not_fire_leaves_all():
    stack = Stack(kvsieve.get_policy("evict3r", budget=10, when="every:50"))
    for t, total in ((30, 90), (10, 120), (11, 30), (5, 45)):
        stack.feed(t)
        assert sum(stack.sizes()) == total
    assert not stack.group.waiting


def test_attention_that_is_not_finite():
    stack = Stack(evict3r())
    stack.k[1, :, :, 3] = torch.nan
    with pytest.raises(ScoreError, match=r"attention of layers \[1\] is not finite"):
        stack.feed(20)


def test_attention_is_formed_once_per_pass(monkeypatch):
    """Scorer and share both ask for it."""
    calls, original, counting = [], KVLayer.attention_mass, attention.attend_and_count
    monkeypatch.setattr(KVLayer, "attention_mass", lambda *a: calls.append("again") or original(*a))
    monkeypatch.setattr("kvsieve.attended.attend_and_count", lambda *a, **k: calls.append("here") or counting(*a, **k))
    stack = Stack(evict3r())
    stack.feed(20)
    assert calls == ["here"] * LAYERS
    for layer in stack.layers:
        layer.store.ordered = False  # then queries need a mask, and attention is formed again, once
    stack.feed(5)
    assert calls == ["here"] * LAYERS + ["again"] * LAYERS


def test_measure():
    stack = Stack(evict3r(10), batch=2)
    assert measure(stack.layers) == {
        "tokens_seen": [], "tokens_held": {}, "bytes_held": 0, "bytes_spare": 0, "bytes_ledger": 0, "bytes_full": 0,
        "compression_ratio": 0.0, "evictions": 0,
    }  # fmt: skip
    stack.feed(30)
    found, each = measure(stack.layers), 2 * D * 8
    assert found["tokens_seen"] == [30, 30]
    assert sum(map(sum, (row for counts in found["tokens_held"].values() for row in counts))) == 2 * HKV * 10 * LAYERS
    assert found["bytes_full"] == 2 * HKV * 30 * LAYERS * each
    assert found["bytes_held"] == sum(layer.store.bytes_of((KEY, VALUE)) for layer in stack.layers)
    assert found["bytes_held"] - found["bytes_spare"] == 2 * HKV * 10 * LAYERS * each
    assert found["compression_ratio"] == pytest.approx(2 / 3)
    assert found["evictions"] == sum(n < 30 for n in stack.sizes())
    assert found["bytes_ledger"] > 0


def test_the_view_of_a_waiting_layer_is_that_of_its_pass():
    stack = Stack(evict3r())
    stack.one(0, 20)
    view = stack.group.waiting[0]
    assert isinstance(view, LayerView)
    assert (view.seen, view.new, view.held) == (20, 20, 20)
