"""Shares and budgets: sharing out within bounds, weights of layers, ratios of what may leave."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve.attention_naive import probabilities_naive
from kvsieve.budgets import Bytes, EvictRatio, OfStream, Ratio, Tokens
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.layer import KVLayer
from kvsieve.ledger import POSITION, VALUE, Kind
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.shares import AcrossHeads, LayerVariance, Pyramid, Share, Uniform, water_fill
from kvsieve.triggers import Between, EveryForward
from kvsieve.view import LayerView, Visibility

B, H, HKV, D = 2, 4, 2, 8

# ---- sharing out within bounds

BOUNDS = st.lists(
    st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=8
)


def split(parts: list[tuple[float, int, int]]) -> tuple[list[float], list[int], list[int]]:
    return [w for w, _, _ in parts], [low for _, low, _ in parts], [low + more for _, low, more in parts]


def pour(total: int, weights: list[float], floors: list[int], ceilings: list[int]) -> list[int]:
    """Everyone begins with the floor; one token after the other goes to whoever has least for its weight."""
    counts = list(floors)
    total = min(max(total, sum(floors)), sum(ceilings))
    while sum(counts) < total:
        open_ = [i for i in range(len(counts)) if counts[i] < ceilings[i]]
        counts[min(open_, key=lambda i: ((counts[i] + 0.5) / max(weights[i], 1e-12), i))] += 1
    return counts


def largest_remainder(total: int, weights: list[int]) -> list[int]:
    exact = [Fraction(total * w, sum(weights)) for w in weights]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], -weights[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@settings(max_examples=300, deadline=None)
@given(parts=BOUNDS, total=st.integers(0, 400))
def test_water_fill_adds_up_within_bounds(parts, total):
    weights, floors, ceilings = split(parts)
    counts = water_fill(total, weights, floors, ceilings)
    assert sum(counts) == min(max(total, sum(floors)), sum(ceilings))
    assert all(low <= n <= high for low, n, high in zip(floors, counts, ceilings, strict=True))
    assert counts == water_fill(total, weights, floors, ceilings)


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=8), total=st.integers(0, 200))
def test_water_fill_without_bounds_is_largest_remainder(weights, total):
    counts = water_fill(total, [float(w) for w in weights], [0] * len(weights), [total] * len(weights))
    assert counts == largest_remainder(total, weights)


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0, 1), min_size=2, max_size=8), low=st.integers(0, 9), more=st.integers(0, 40),
       total=st.integers(0, 300))  # fmt: skip
def test_a_larger_weight_never_gets_less(weights, low, more, total):
    n = len(weights)
    counts = water_fill(total, weights, [low] * n, [low + more] * n)
    for i, j in itertools.permutations(range(n), 2):
        assert weights[i] <= weights[j] or counts[i] >= counts[j]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 10), st.integers(0, 30)), min_size=1, max_size=6),
       total=st.integers(0, 150))  # fmt: skip
def test_water_fill_is_within_one_of_a_common_level(parts, total):
    """Where bounds do not bind, tokens over weight are the same level for all, up to rounding to whole tokens."""
    weights, floors, ceilings = split(parts)
    counts = water_fill(total, weights, floors, ceilings)
    lows = [(n - 1) / w for n, w, low in zip(counts, weights, floors, strict=True) if n > low]
    highs = [(n + 1) / w for n, w, high in zip(counts, weights, ceilings, strict=True) if n < high]
    assert max(lows, default=0.0) <= min(highs, default=math.inf) + 1e-6


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 10), st.integers(0, 30)), min_size=1, max_size=4),
       total=st.integers(0, 80))  # fmt: skip
def test_water_fill_is_near_what_filling_token_by_token_gives(parts, total):
    weights, floors, ceilings = split(parts)
    counts, poured = water_fill(total, weights, floors, ceilings), pour(total, weights, floors, ceilings)
    assert sum(counts) == sum(poured)
    assert max(abs(a - b) for a, b in zip(counts, poured, strict=True)) <= 1


@pytest.mark.parametrize(
    ("total", "weights", "floors", "ceilings", "want"),
    [
        (10, [0.5, 0.5], [0, 0], [20, 20], [5, 5]),
        (10, [0.0, 1.0], [0, 0], [20, 20], [0, 10]),
        (10, [0.0, 1.0], [0, 0], [20, 4], [6, 4]),  # what the one cannot hold goes to the weightless other
        (10, [0.0, 0.0], [0, 0], [20, 20], [5, 5]),
        (9, [1e-300, 5e-324], [0, 0], [20, 20], [5, 4]),
        (9, [5e-324, 1e-300], [0, 0], [20, 20], [4, 5]),
        (10, [0.9, 0.1], [0, 4], [20, 20], [6, 4]),
        (10, [0.9, 0.1], [8, 8], [20, 20], [8, 8]),
        (100, [0.9, 0.1], [0, 0], [7, 8], [7, 8]),
        (10, [1 / 3, 1 / 3, 1 / 3], [0, 0, 0], [9, 9, 9], [4, 3, 3]),
        (0, [1.0], [0], [5], [0]),
        (5, [], [], [], []),
    ],
)
def test_water_fill_by_hand(total, weights, floors, ceilings, want):
    assert water_fill(total, weights, floors, ceilings) == want


# ---- weights of layers


def feed(layer: KVLayer, t: int, g: torch.Generator, padding: torch.Tensor | None = None, spread: float = 1.0,
         batch: int = B, everything: bool = False) -> torch.Tensor:  # fmt: skip
    q = torch.randn(batch, H, t, D, generator=g, dtype=torch.float64) * spread
    kv = torch.randn(2, batch, HKV, t, D, generator=g, dtype=torch.float64)
    visibility = Visibility(layer.seen, t, None if padding is None else padding[:, : layer.seen + t],
                            everything=everything)  # fmt: skip
    layer.append(kv[0], kv[1])
    layer.attend(q, visibility)
    layer.observe(q, visibility)
    return q


class Peek(LayerVariance):
    """Also writes down what it was asked, with a naive answer."""

    def weigh(self, view: LayerView) -> list[float]:
        got = super().weigh(view)
        q, keys = view.queries, view.keys
        causal = view.positions[:, :, None, :] <= view.new_positions[:, None]
        mask = causal & view.real[:, :, None, :]
        p = probabilities_naive(q, keys, None, mask.repeat_interleave(H // HKV, 1), None, None)
        if view.real_queries is not None:
            p = p * view.real_queries[:, None, :, None]
        want = []
        for b in range(q.shape[0]):
            received: dict[int, float] = {}
            for h, n in itertools.product(range(H), range(keys.shape[2])):
                kv = h // (H // HKV)
                if bool(view.valid[b, kv, n]):
                    position = int(view.positions[b, kv, n])
                    received[position] = received.get(position, 0.0) + float(p[b, h, :, n].sum()) / H
            values = torch.tensor(list(received.values()), dtype=torch.float64)
            want.append(float(((values - values.mean()) ** 2).mean()) if len(values) else 0.0)
        assert got == pytest.approx(want, rel=1e-9)
        Peek.asked += 1  # type: ignore[attr-defined]
        return got


Peek.asked = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["evict3r", "knorm", "random"])
@pytest.mark.parametrize("pads", [0, 5, 12])
def test_weights_are_variances_of_attention_received(name, pads):
    """`random` and `knorm` choose other tokens in every head; a row of a first chunk may be nothing but padding."""
    padding = torch.ones(B, 40, dtype=torch.bool)
    padding[1, :pads] = False
    policy = kvsieve.get_policy(name, budget=7, share=Peek())
    layer, g, before = KVLayer(policy), torch.Generator().manual_seed(1), Peek.asked
    for t in (10, 4, 1, 1, 5):
        feed(layer, t, g, padding if pads else None)
    assert Peek.asked == before + 5


@pytest.mark.parametrize("temp", [0.0, -1.0, math.inf, math.nan])
def test_temperature_is_positive(temp):
    with pytest.raises(PolicyError, match="temp must be a positive number"):
        LayerVariance(temp)


def test_published_arithmetic_by_hand():
    """`keep = min(held, ceil(total * share))`, nothing given back, nothing guaranteed."""
    share = LayerVariance(as_published=True)
    assert not share.strict
    assert share.allocate(10, [1.0, 1.0, 1.0], [5, 5, 5], [20, 20, 20], 20) == [10, 10, 10]
    assert share.allocate(10.5, [1.0, 1.0], [5, 5], [20, 20], 20) == [11, 11]  # ceil
    assert share.allocate(10, [1.0, 1.0], [5, 5], [7, 20], 20) == [7, 10]  # what the one does not hold is lost
    # softmax(0, -6 / 0.5) of 20 tokens: 19.9999 and 0.0001
    assert share.allocate(10, [0.0, 3.0, 3.0], [5, 5, 5], [40, 40, 40], 40)[1:] == [1, 1]
    # a layer with one strong sink: its share underflows, and everything leaves
    assert share.allocate(10, [0.0, 60.0], [5, 5], [20, 20], 20) == [20, 0]


def test_guaranteed_arithmetic_by_hand():
    share = LayerVariance()
    assert share.strict
    assert share.allocate(10, [1.0, 1.0, 1.0], [5, 5, 5], [20, 20, 20], 20) == [10, 10, 10]
    assert share.allocate(10.5, [1.0, 1.0], [5, 5], [20, 20], 20) == [11, 10]
    assert share.allocate(10, [1.0, 1.0], [5, 5], [7, 20], 20) == [7, 13]
    assert share.allocate(10, [0.0, 60.0], [5, 5], [20, 20], 20) == [15, 5]
    assert share.allocate(10, [0.0, 60.0], [0, 0], [20, 20], 20) == [19, 1]
    assert share.allocate(10, [0.0, 60.0], [0, 0], [20, 0], 20) == [20, 0]


@settings(max_examples=150, deadline=None)
@given(
    layers=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=8),
    amount=st.floats(1, 60), temp=st.sampled_from([0.01, 0.5, 1e6]),
)  # fmt: skip
def test_guaranteed_shares_never_cut_into_protection(layers, amount, temp):
    weights, floors, held = split(layers)
    counts = LayerVariance(temp).allocate(amount, weights, floors, held, 100)
    total = min(max(int(amount * len(layers)), sum(max(low, min(1, n)) for low, n in zip(floors, held, strict=True))),
                sum(held))  # fmt: skip
    assert sum(counts) == total
    assert all(low <= n <= most for low, n, most in zip(floors, counts, held, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 12))
def test_published_choice_among_real_tokens(data, n):
    """By score, protection as an infinite score; among real tokens only."""
    scores = torch.tensor(data.draw(st.permutations(range(n)))).double().expand(1, 2, n)
    positions = torch.tensor(data.draw(st.permutations(range(n))), dtype=torch.int32).expand(1, 2, n)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))).expand(1, 2, n)
    closed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))).expand(1, 2, n) & valid
    count = data.draw(st.integers(0, n))
    keep = LayerVariance(as_published=True).choose(scores, positions, valid, closed, torch.full((1, 2), count))
    real, hidden = int(valid[0, 0].sum()), int(closed[0, 0].sum())
    assert keep.sum(-1).tolist() == [[min(count, real)] * 2]
    assert not bool((keep & ~valid).any())
    if count >= hidden:
        plain = LayerVariance().choose(scores, positions, valid, closed, torch.full((1, 2), count))
        assert torch.equal(keep, plain)
    else:
        assert not bool((keep & ~closed).any())


def test_base_class_and_properties():
    for share, joint, even, strict in [
        (Uniform(), False, True, True), (AcrossHeads(), False, True, True), (Pyramid(), False, False, True),
        (LayerVariance(), True, False, True), (LayerVariance(as_published=True), True, False, False),
    ]:  # fmt: skip
        assert (share.joint, share.even, share.strict) == (joint, even, strict)
    for call in (lambda: Share().weigh(None), lambda: Share().allocate(1, [], [], [], 1)):
        with pytest.raises(NotImplementedError):
            call()


# ---- budgets


def random_policy(budget, **settings) -> Policy:
    return replace(kvsieve.get_policy("random", budget=1, protect=Protect(), **settings), budget=budget)


@pytest.mark.parametrize("removed", [0.0, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("protect", [Protect(), Protect(sink=3, recent=2)])
def test_evict_ratio_counts(removed, protect):
    layer = KVLayer(replace(random_policy(EvictRatio(removed)), protect=protect))
    g, held, seen = torch.Generator().manual_seed(0), 0, 0
    for t in (9, 1, 4, 1, 1, 7, 20, 1, 1):
        feed(layer, t, g)
        held, seen = held + t, seen + t
        closed = min(seen, protect.sink + protect.recent) if protect.sink else 0
        held -= int((held - closed) * removed)
        assert layer.store.lengths.unique().tolist() == [held]


@pytest.mark.parametrize("removed", [0.1, 0.3, 0.5, 0.9])
def test_evict_ratio_settles(removed):
    m, layer, g = 40, KVLayer(random_policy(EvictRatio(removed))), torch.Generator().manual_seed(0)
    for _ in range(80):
        feed(layer, m, g, batch=1)
    assert abs(layer.store.longest - m * (1 - removed) / removed) <= 1 / removed


def test_evict_ratio_across_heads_counts_what_all_heads_hold():
    """Heads that hold less than others do not excuse the others from giving up their part."""
    knorm = kvsieve.get_policy("knorm", budget=1)
    policy = replace(knorm, budget=EvictRatio(0.25), share=AcrossHeads(0.0))
    layer, g = KVLayer(policy), torch.Generator().manual_seed(4)
    for t in (20, 20, 20):
        before = layer.store.lengths + t if layer.seen else torch.full((B, HKV), t)
        feed(layer, t, g)
        want = (before - (before.double() * 0.25).long()).sum(-1) // HKV * HKV
        assert torch.equal(layer.store.lengths.sum(-1), want)
    assert bool((layer.store.lengths[:, 0] != layer.store.lengths[:, 1]).any())


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan])
def test_evict_ratio_is_a_share_removed(bad):
    with pytest.raises(BudgetError, match="share removed"):
        EvictRatio(bad)


def test_of_stream():
    layer, g = KVLayer(random_policy(OfStream(0.3, 50))), torch.Generator().manual_seed(0)
    for t, held in ((10, 10), (4, 14), (10, 15), (1, 15), (25, 15)):
        feed(layer, t, g)
        assert layer.store.lengths.unique().tolist() == [held]
    for kept, tokens, message in ((0.0, 5, r"\(0, 1\]"), (1.1, 5, r"\(0, 1\]"), (0.5, 0, "at least one token")):
        with pytest.raises(BudgetError, match=message):
            OfStream(kept, tokens)
    tight = KVLayer(replace(random_policy(OfStream(0.1, 50)), protect=Protect(sink=7)))
    with pytest.raises(BudgetError, match="smallest legal budget here is 7"):
        feed(tight, 10, g)


def test_between():
    layer, g = KVLayer(replace(random_policy(Tokens(5)), trigger=Between(8, 20))), torch.Generator().manual_seed(0)
    for t, held in ((8, 8), (1, 5), (10, 5), (1, 6), (9, 15)):  # seen: 8, 9, 19, 20, 29
        feed(layer, t, g)
        assert layer.store.longest == held


@pytest.mark.parametrize(
    "policy",
    [
        random_policy(EvictRatio(0.3)),
        random_policy(OfStream(0.3, 700)),
        random_policy(Bytes(1 << 20)),
        replace(random_policy(Tokens(5)), trigger=Between(3, 9)),
        replace(random_policy(Tokens(5)), share=LayerVariance(2.0, as_published=True)),
        replace(random_policy(Tokens(5)), protect=Protect(1, 2, (int(Kind.SPECIAL), int(Kind.PATCH)), 4, (0, 3))),
        kvsieve.get_policy("evict3r", budget=40, temp=1.5),
        kvsieve.get_policy("frame_attention", budget=EvictRatio(0.3), aggregation="max"),
        kvsieve.get_policy("knorm", budget=0.3, share="layer_variance", when="every_forward"),
    ],
    ids=lambda policy: f"{policy.name}-{type(policy.budget).__name__}",
)
def test_round_trip_as_json(policy):
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_only_amounts_of_tokens_are_shared_between_layers():
    with pytest.raises(PolicyError, match="EvictRatio cannot be shared between layers"):
        replace(random_policy(EvictRatio(0.3)), share=LayerVariance())
    with pytest.raises(PolicyError, match="cannot be shared"):
        kvsieve.get_policy("evict3r", threshold=0.1, share="layer_variance")
    for budget in (Tokens(5), Ratio(0.5), Bytes(1000), OfStream(0.5, 100)):
        policy = replace(random_policy(budget), share=LayerVariance())
        assert (policy.joint, policy.evicts, policy.exact_fit) == (True, True, False)
    assert not kvsieve.get_policy("full", share="layer_variance").joint
    assert kvsieve.get_policy("evict3r", budget=9, temp=2.0).share == LayerVariance(2.0)
    assert isinstance(kvsieve.get_policy("evict3r", threshold=0.1).trigger, EveryForward)


def test_bytes_leave_room_for_the_next_pass():
    assert Bytes(1000).tokens(10, exact=True) == 99
    assert Bytes(1000).tokens(10, exact=True, room=40) == 60
    assert Bytes(1000).tokens(10, exact=False) == 91
    assert Bytes(10_000).tokens(10, exact=False) == 968
    assert Bytes(10_000).tokens(10, exact=False, layers=1000) == 960
    assert Bytes(10_000).tokens(10, exact=False, layers=2) == 964
    assert Bytes(1000).tokens(10, exact=False, layers=2) == 91, "no layer can be large enough"
    for settings_ in ({"exact": True, "room": 7}, {"exact": False}, {"exact": False, "layers": 9, "room": 3}):
        with pytest.raises(BudgetError, match="smallest legal budget is") as error:
            Bytes(9).tokens(10, **settings_)
        least = int(str(error.value).split("budget is ")[1].split()[0])
        assert Bytes(least).tokens(10, **settings_) == 1
        with pytest.raises(BudgetError):
            Bytes(least - 1).tokens(10, **settings_)


def test_positions_and_values_belong_together_after_all():
    """What the random policy left is where its record says."""
    layer, g = KVLayer(random_policy(EvictRatio(0.3))), torch.Generator().manual_seed(0)
    kept = []
    for t in (9, 9, 9):
        kv = torch.randn(2, 1, 1, t, D, generator=g)
        layer.append(kv[0], kv[1])
        layer.observe(kv[0], Visibility(layer.seen - t, t))
        kept.append(kv[1])
    values = torch.cat(kept, 2).gather(2, layer.store.read(POSITION).long()[..., None].expand(-1, -1, -1, D))
    assert torch.equal(layer.store.read(VALUE), values)
