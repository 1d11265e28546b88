"""One layer under every method: what it computes equals full attention with the evicted keys masked, nothing protected
ever leaves, records stay true, memory stays flat."""

from __future__ import annotations

import copy
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve.attention_naive import attend_naive
from kvsieve.budgets import Tokens
from kvsieve.errors import BudgetError, ScoreError, UnsupportedOperationError
from kvsieve.layer import KVLayer
from kvsieve.ledger import KEY, KIND, POSITION, SEGMENT, VALUE, Kind
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.rope import Rotary
from kvsieve.scorer import Scorer
from kvsieve.triggers import EveryForward
from kvsieve.view import LayerView, Visibility

B, H, HKV, D = 2, 4, 2, 8


def rotary() -> Rotary:
    inv = 1.0 / 100 ** (torch.arange(0, D, 2).double() / D)

    def cos_sin(positions):
        angle = positions[..., None].double() * inv
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def apply(x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    return Rotary(cos_sin, apply)


SMALL = {"snapkv": {"window_size": 4}, "pyramidkv": {"window_size": 4}, "adakv_snapkv": {"window_size": 4}}
SMALL |= {"h2o": {"window_size": 4}, "lagkv": {"lag_size": 4}}
SMALL |= {"sink_recent_uniform": {"sink_tokens": 2, "recent_tokens": 4, "block_size": 2}}
POSITIONAL = ("ladder", "random", "sink_recent", "sink_recent_uniform", "streaming_llm")
RANKED = [name for name in kvsieve.list_methods() if name not in ("full", "kvzap")]


def policies(name: str) -> list[Policy]:
    hyper = SMALL.get(name, {})
    return [
        kvsieve.get_policy(name, budget=12, **hyper),
        kvsieve.get_policy(name, budget=0.4, **hyper),
        kvsieve.get_policy(name, budget=0.4, when="every_forward", **hyper),
        kvsieve.get_policy(name, budget=12, when="every:5", **hyper),
    ]


class Driver:
    """Feeds random tokens to a layer in float64 and compares with masked full attention after every call."""

    def __init__(self, policy: Policy, padding: torch.Tensor | None = None, seed: int = 0) -> None:
        self.layer = KVLayer(policy, layer_idx=1, rank=1, n_layers=3, rope=rotary())
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(B, H, 64, D, generator=g, dtype=torch.float64)
        self.k = torch.randn(B, HKV, 64, D, generator=g, dtype=torch.float64)
        self.v = torch.randn(B, HKV, 64, D, generator=g, dtype=torch.float64)
        self.padding = padding
        self.at = 0

    def held(self) -> torch.Tensor:
        """`[B, Hkv, 64]` bool: what the layer says it holds, by position."""
        mask = torch.zeros(B, HKV, 65, dtype=torch.bool)
        if self.layer.seen:
            position, live = self.layer.store.read(POSITION).long(), self.layer.store.live
            mask.scatter_(2, torch.where(live, position, 64), True)
        return mask[..., :64]

    def feed(self, t: int) -> None:
        s, e = self.at, self.at + t
        before = self.held()
        padding = None if self.padding is None else self.padding[:, :e]
        visibility = Visibility(s, t, padding)
        self.layer.append(self.k[:, :, s:e], self.v[:, :, s:e])
        out = self.layer.attend(self.q[:, :, s:e], visibility)
        self.layer.observe(self.q[:, :, s:e], visibility)
        self.at = e

        columns = torch.arange(64)
        seen = before | ((columns >= s) & (columns < e))
        if self.padding is not None:
            seen = seen & self.padding[:, None]
        mask = seen[:, :, None] & (columns <= torch.arange(s, e)[:, None])
        want = attend_naive(self.q[:, :, s:e], self.k, self.v, mask=mask.repeat_interleave(H // HKV, 1))
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)

    def check_records(self) -> None:
        store = self.layer.store
        position, live = store.read(POSITION).long(), store.live
        assert int(position[live].max()) < self.at
        for name, source in ((KEY, self.k), (VALUE, self.v)):
            index = position.clamp_min(0)[..., None].expand(-1, -1, -1, D)
            assert torch.equal(store.read(name)[live], source.gather(2, index)[live])
        assert torch.equal(store.live.sum(-1), store.lengths)
        held = [[set(position[b, h][live[b, h]].tolist()) for h in range(HKV)] for b in range(B)]
        assert all(len(held[b][h]) == int(store.lengths[b, h]) for b in range(B) for h in range(HKV)), "duplicates"


@pytest.mark.parametrize("name", RANKED)
@settings(max_examples=12, deadline=None)
@given(which=st.integers(0, 3), chunks=st.lists(st.sampled_from([1, 1, 1, 2, 7, 15]), min_size=3, max_size=9))
def test_masked_equivalence_and_records(name, which, chunks):
    driver = Driver(policies(name)[which])
    for t in chunks:
        if driver.at + t > 64:
            break
        driver.feed(t)
        driver.check_records()


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("which", range(3))
def test_padding_is_never_seen_nor_kept(name, which):
    padding = torch.ones(B, 64, dtype=torch.bool)
    padding[1, :9] = False
    driver = Driver(policies(name)[which], padding)
    for t in (20, 1, 1, 6, 1, 1, 1):
        driver.feed(t)
        driver.check_records()
        assert not bool((driver.held() & ~padding[:, None]).any())
    assert driver.layer.real_seen == [31, 22]
    assert driver.layer.first.tolist() == [0, 9]


@pytest.mark.parametrize("name", RANKED)
def test_token_budget_holds_after_every_forward(name):
    driver = Driver(kvsieve.get_policy(name, budget=12, **SMALL.get(name, {})))
    for t in (30, 1, 1, 9, 1, 1):
        driver.feed(t)
        assert driver.layer.store.tokens <= 12 * B * HKV
        assert driver.layer.store.tokens == min(driver.at, 12) * B * HKV


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("pads", [0, 9])
def test_byte_budget_holds_after_every_forward(name, pads):
    each = 3 * B * HKV * 2 * D * 8  # three layers, float64
    padding = torch.ones(B, 64, dtype=torch.bool)
    padding[1, :pads] = False
    driver = Driver(kvsieve.get_policy(name, budget=f"{25 * each}B", **SMALL.get(name, {})), padding)
    for t in (30, 1, 1, 9, *[1] * 20):
        driver.feed(t)
        held = driver.layer.store.bytes_of((KEY, VALUE))
        assert held <= 25 * each // 3
        if t == 1:
            assert held > 14 * each // 3, "and the budget is used"


@pytest.mark.parametrize("name", ["knorm", "adakv_snapkv"])
def test_a_byte_budget_too_small_for_a_token(name):
    driver = Driver(kvsieve.get_policy(name, budget="100B", protect=Protect(), **SMALL.get(name, {})))
    with pytest.raises(BudgetError, match="smallest legal budget is"):
        driver.feed(30)


@pytest.mark.parametrize("name", RANKED)
def test_protection_holds(name):
    protect = Protect(sink=3, recent=4)
    policy = kvsieve.get_policy(name, budget=12, protect=protect, **SMALL.get(name, {}))
    driver = Driver(policy)
    for t in (25, 1, 1, 10, 1):
        driver.feed(t)
        held = driver.held()
        assert bool(held[..., :3].all())
        assert bool(held[..., driver.at - 4 : driver.at].all())


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("which", range(4))
def test_fast_decode_path_equals_the_general_one(name, which, monkeypatch):
    policy = policies(name)[which]
    fast, general = Driver(policy), Driver(policy)
    for t in (20, *[1] * 12, 5, *[1] * 8):
        fast.feed(t)
        with monkeypatch.context() as patch:
            patch.setattr("kvsieve.layer.one_out", lambda policy, views, stores: [(False, None)] * len(views))
            general.feed(t)
        assert torch.equal(fast.held(), general.held())
        fast.check_records()


@pytest.mark.parametrize("name", RANKED)
def test_idempotent(name):
    driver = Driver(kvsieve.get_policy(name, budget=12, **SMALL.get(name, {})))
    driver.feed(30)
    view = LayerView(driver.layer, driver.q[:, :, 29:30], Visibility(29, 1))
    assert torch.equal(driver.layer.policy.keep(view), driver.layer.store.live), "asked again, it lets nothing go"


@pytest.mark.parametrize("name", RANKED)
def test_rows_do_not_depend_on_each_other(name):
    policy = kvsieve.get_policy(name, budget=12, **SMALL.get(name, {}))
    together, swapped = Driver(policy), Driver(policy)
    for part in ("q", "k", "v"):
        setattr(swapped, part, getattr(together, part).flip(0))
    for t in (25, 1, 1, 7, 1):
        together.feed(t)
        swapped.feed(t)
        assert torch.equal(together.held(), swapped.held().flip(0))


@pytest.mark.parametrize("name", RANKED)
def test_two_sequences_under_one_policy(name):
    policy = kvsieve.get_policy(name, budget=12, **SMALL.get(name, {}))
    a, b, alone = Driver(policy, seed=1), Driver(policy, seed=2), Driver(policy, seed=1)
    for t in (25, 1, 1, 7, 1):
        a.feed(t)
        b.feed(t)
    for t in (25, 1, 1, 7, 1):
        alone.feed(t)
    assert torch.equal(a.held(), alone.held())
    assert not torch.equal(a.held(), b.held()) or name in POSITIONAL


@pytest.mark.parametrize("name", RANKED)
def test_deepcopy_and_map_rows_go_on_exactly(name):
    policy = kvsieve.get_policy(name, budget=12, **SMALL.get(name, {}))
    driver, plain = Driver(policy), Driver(policy)
    for d in (driver, plain):
        d.feed(25)
        d.feed(1)
    driver.layer = copy.deepcopy(driver.layer)
    driver.layer.map_rows(torch.tensor([1, 0]))
    driver.layer.map_rows(torch.tensor([1, 0]))
    for t in (1, 4, 1):
        driver.feed(t)
        plain.feed(t)
    assert torch.equal(driver.held(), plain.held())


def test_a_policy_below_kind_protection_is_an_error_that_names_the_least():
    policy = kvsieve.get_policy("knorm", budget=4, protect=Protect(kinds=(int(Kind.SPECIAL),)))
    layer = KVLayer(policy)
    keys = torch.randn(1, 1, 10, D)
    kinds = torch.tensor([int(Kind.SPECIAL)] * 6 + [int(Kind.PATCH)] * 4)
    layer.append(keys, keys, kind=kinds, segment=3)
    with pytest.raises(BudgetError, match="smallest legal budget here is 6 tokens"):
        layer.observe(keys, Visibility(0, 10))


def test_kinds_and_segments_travel_with_their_tokens():
    protect = Protect(kinds=(int(Kind.SPECIAL),), segments=(0,))
    layer = KVLayer(Policy(kvsieve.get_policy("random", budget=1).scorer, Tokens(14), protect, EveryForward()))
    for frame in range(6):
        keys = torch.randn(1, 2, 8, D)
        kinds = torch.tensor([int(Kind.SPECIAL)] + [int(Kind.PATCH)] * 7)
        layer.append(keys, keys, kind=kinds, segment=frame)
        layer.observe(keys, Visibility(8 * frame, 8))
    position, kind, segment = (layer.store.read(c).long() for c in (POSITION, KIND, SEGMENT))
    assert torch.equal(segment, position // 8)
    assert torch.equal(kind == int(Kind.SPECIAL), position % 8 == 0)
    assert bool(((segment == 0).sum(-1) == 8).all()), "the first frame stays whole"
    assert bool(((kind == int(Kind.SPECIAL)).sum(-1) == 6).all()), "special tokens of every frame stay"


def test_nan_scores_raise():
    class Broken(Scorer):
        name = "broken_for_this_test"

        def score(self, view):
            return torch.full(view.positions.shape, float("nan"))

    layer = KVLayer(Policy(Broken(), Tokens(2)))
    keys = torch.randn(1, 1, 5, D)
    layer.append(keys, keys)
    try:
        with pytest.raises(ScoreError, match="NaN"):
            layer.observe(keys, Visibility(0, 5))
    finally:
        from kvsieve.scorer import SCORERS

        del SCORERS["broken_for_this_test"]


def test_crop():
    full = Driver(kvsieve.get_policy("full"))
    full.feed(20)
    full.layer.crop(5)
    full.at = 15
    full.feed(9)
    full.check_records()
    counted = Driver(kvsieve.get_policy("h2o", budget=30, window_size=4))
    counted.feed(20)
    with pytest.raises(UnsupportedOperationError, match="cannot be taken back"):
        counted.layer.crop(2)
    evicted = Driver(kvsieve.get_policy("knorm", budget=10))
    evicted.feed(20)
    with pytest.raises(UnsupportedOperationError, match="has evicted"):
        evicted.layer.crop(2)


@pytest.mark.parametrize("name", ["knorm", "h2o", "snapkv", "adakv_snapkv", "expected_attention"])
@pytest.mark.parametrize("rejected", [1, 3, 5])
def test_held_back_tokens_leave_no_trace(name, rejected):
    """Speculative decoding: propose five tokens, reject some, go on: as if they had never been fed."""
    policy = kvsieve.get_policy(name, budget=12, **SMALL.get(name, {}))
    speculative, plain = Driver(policy), Driver(policy)
    for d in (speculative, plain):
        d.feed(20)
    layer, s = speculative.layer, 20
    layer.append(speculative.k[:, :, s : s + 5], speculative.v[:, :, s : s + 5])
    visibility = Visibility(s, 5)
    layer.attend(speculative.q[:, :, s : s + 5], visibility)
    layer.observe(speculative.q[:, :, s : s + 5], visibility, hold=True)
    layer.crop(rejected)
    speculative.at = s + 5 - rejected
    if rejected < 5:
        plain.feed(5 - rejected)
    for t in (1, 1, 3):
        assert torch.equal(speculative.held(), plain.held())
        speculative.feed(t)
        plain.feed(t)
    assert torch.equal(speculative.held(), plain.held())


@pytest.mark.parametrize(("name", "steps"), [("streaming_llm", 20_000), ("h2o", 100_000)])
def test_a_long_stream_holds_constant_memory(name, steps):
    """Decoded tokens under a fixed budget."""
    layer = KVLayer(kvsieve.get_policy(name, budget=64))
    q, kv = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 1, 16)
    sizes, peak = set(), 0
    for i in range(steps):
        layer.append(kv, kv)
        visibility = Visibility(i, 1)
        layer.observe(q, visibility)
        if i == 2_000:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if i > 100 and i % 1000 == 0:
            sizes.add((layer.store.tokens, layer.store.bytes_of(layer.store.columns)))
    assert len(sizes) == 1
    assert layer.store.tokens == 64
    assert layer.store.bytes_of((KEY, VALUE)) == 65 * layer.store.bytes_per_token
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4 * 1024, "KiB"


def test_padding_taken_back_after_an_eviction_was_never_seen():
    padding = torch.ones(B, 64, dtype=torch.bool)
    padding[1, 8:10] = False
    driver = Driver(kvsieve.get_policy("knorm", budget=6), padding)
    driver.feed(10)
    assert driver.layer.real_seen == [10, 8]
    driver.layer.crop(1, regardless=True)
    assert driver.layer.real_seen == [9, 8]
