"""One layer of a stream of frames: every new token sees every key, segments expire, storage fits a frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve.attention_naive import attend_naive, probabilities_naive
from kvsieve.budgets import EvictRatio
from kvsieve.errors import PolicyError
from kvsieve.layer import KVLayer
from kvsieve.ledger import KEY, KIND, POSITION, SEGMENT, VALUE, Kind
from kvsieve.methods.frame_attention import FrameAttention
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.shares import Uniform
from kvsieve.view import LayerView, Visibility

H, HKV, D, FRAME, SPECIALS = 4, 2, 8, 7, 2
KINDS = torch.tensor([int(Kind.SPECIAL)] * SPECIALS + [int(Kind.PATCH)] * (FRAME - SPECIALS), dtype=torch.uint8)


class Stream:
    """Feeds frames in float64; attention is compared with the naive one after every pass."""

    def __init__(self, policy: Policy, batch: int = 1, collect: bool = True, everything: bool = True, **settings: Any):
        self.layer, self.collect, self.everything = KVLayer(policy, **settings), collect, everything
        self.g, self.batch, self.frames = torch.Generator().manual_seed(5), batch, 0
        self.views: list[LayerView] = []

    def feed(self, frames: int = 1, hold: bool = False) -> None:
        layer, t = self.layer, frames * FRAME
        q = torch.randn(self.batch, H, t, D, generator=self.g, dtype=torch.float64)
        kv = torch.randn(2, self.batch, HKV, t, D, generator=self.g, dtype=torch.float64)
        segment = torch.arange(self.frames, self.frames + frames, dtype=torch.int32).repeat_interleave(FRAME)
        layer.append(kv[0], kv[1], KINDS.repeat(frames), segment)
        visibility = Visibility(layer.seen - t, t, everything=self.everything)
        out = layer.attend(q, visibility)
        positions, live = layer.store.read(POSITION), layer.store.live
        if not self.collect:
            layer._collected = None
        mask = (
            live[:, :, None]
            if self.everything
            else (positions[:, :, None] <= torch.arange(visibility.start, layer.seen)[:, None]) & live[:, :, None]
        )
        mask = mask.expand(-1, -1, t, -1).repeat_interleave(H // HKV, 1)
        want = attend_naive(q, layer.store.read(KEY), layer.store.read(VALUE), mask=mask)
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        self.frames += frames
        self.q = q
        layer.observe(q, visibility, hold=hold)

    def held(self, row: int = 0, head: int = 0) -> list[int]:
        return sorted(p for p in self.layer.store.read(POSITION)[row, head].tolist() if p >= 0)

    def check_records(self) -> None:
        store = self.layer.store
        position, live = store.read(POSITION).long(), store.live
        assert torch.equal(store.read(SEGMENT).long()[live], (position // FRAME)[live])
        assert torch.equal(store.read(KIND).long()[live], KINDS.long()[position[live] % FRAME])


def frame(i: int) -> list[int]:
    return list(range(i * FRAME, (i + 1) * FRAME))


def specials(i: int) -> list[int]:
    return frame(i)[:SPECIALS]


PROTECT = Protect(kinds=(int(Kind.SPECIAL),), segments=(0,))


# ---- expiry and protection by age


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_segments_expire_under_a_policy_that_keeps_all(window, chunk):
    stream = Stream(kvsieve.get_policy("full"), window=window)
    for _ in range(5):
        stream.feed(chunk)
        last = stream.frames - 1
        want = sorted({0, *range(max(0, last - window + 1), last + 1)})
        assert stream.held() == [p for i in want for p in frame(i)]
        stream.check_records()


@pytest.mark.parametrize("window", [1, 3])
def test_segments_expire_under_a_policy_that_evicts(window):
    """The first frame and what is protected stay; of the window, what the policy keeps."""
    policy = replace(kvsieve.get_policy("random", budget=1), budget=EvictRatio(0.5), protect=PROTECT)
    stream = Stream(policy, window=window, batch=2)
    for _ in range(8):
        stream.feed()
        last = stream.frames - 1
        held = set(stream.held(1, 1))
        assert held >= {*frame(0), *(p for i in range(last + 1) for p in specials(i))}
        old = [p for p in held if 0 < p // FRAME <= last - window and p % FRAME >= SPECIALS]
        assert not old
        stream.check_records()


def test_expiry_under_a_joint_policy_and_a_quiet_trigger():
    policy = kvsieve.get_policy("evict3r", budget=1000, when="every:10000")
    stream = Stream(policy, window=2)
    for _ in range(6):
        stream.feed()
    assert stream.held() == [*frame(0), *(p for i in (1, 2, 3) for p in specials(i)), *frame(4), *frame(5)]


@pytest.mark.parametrize("recent", [None, 0, 1, 3])
def test_kinds_stay_in_the_latest_segments(recent):
    protect = replace(PROTECT, kinds_recent=recent)
    policy = replace(kvsieve.get_policy("random", budget=1), budget=EvictRatio(0.999), protect=protect)
    stream = Stream(policy)
    for _ in range(7):
        stream.feed()
        view = LayerView(stream.layer, stream.q, Visibility(stream.layer.seen - FRAME, FRAME, everything=True))
        position = view.positions
        kept = (position // FRAME == 0) | (
            (position % FRAME < SPECIALS) & (position // FRAME > stream.frames - 1 - (99 if recent is None else recent))
        )
        assert torch.equal(view.protected, kept)
        last = stream.frames - 1
        young = range(0 if recent is None else max(0, last - recent + 1), last + 1)
        assert set(stream.held()) >= {*frame(0), *(p for i in young for p in specials(i))}
    if recent is not None:
        assert len(stream.held()) < FRAME + SPECIALS * 7
    with pytest.raises(PolicyError, match="kinds_recent must be zero or more"):
        Protect(kinds_recent=-1)


def test_the_segment_of_a_pass():
    layer = KVLayer(kvsieve.get_policy("full"))
    keys = torch.randn(1, 1, 4, D)
    for segment, latest in ((3, 3), (torch.tensor(5), 5), (torch.tensor([6, 6, 7, 7]), 7)):
        layer.append(keys, keys, segment=segment)
        assert layer.segment == latest
    layer.append(keys, keys, segment=torch.tensor([[8, 8, 9, 9]]))
    assert layer.store.read(SEGMENT)[0, 0].tolist() == [3] * 4 + [5] * 4 + [6, 6, 7, 7, 8, 8, 9, 9]
    layer.reset()
    assert layer.segment == 0


# ---- storage fitted to a frame


@pytest.mark.parametrize("name", ["evict3r", "frame_attention", "random"])
@pytest.mark.parametrize("budget", [25, EvictRatio(0.3)])
def test_storage_fits_what_is_kept_and_one_frame(name, budget):
    """To the byte, once something was evicted; contents and attention are those of a layer without that."""
    share = None if budget == 25 else Uniform()
    policy = kvsieve.get_policy(name, budget=budget, share=share, protect=replace(PROTECT, kinds_recent=1))
    fitted, plain = Stream(policy, room=FRAME), Stream(policy)
    buffers = set()
    for _ in range(14):
        fitted.feed()
        plain.feed()
        assert all(fitted.held(0, h) == plain.held(0, h) for h in range(HKV))
        fitted.check_records()
        store = fitted.layer.store
        if fitted.layer.evictions:
            assert store.bytes_of((KEY, VALUE)) == HKV * (store.longest + FRAME) * store.bytes_per_token
            buffers.add(store.columns[KEY].data_ptr())
    assert fitted.layer.evictions > 5
    assert len(buffers) == 1 or budget != 25, "a steady stream moves tokens, not buffers"


def test_storage_fits_when_single_tokens_leave():
    """The fast path of a decode step, too."""
    policy = kvsieve.get_policy("knorm", budget=EvictRatio(0.05), protect=Protect())
    layer, g = KVLayer(policy, room=1), torch.Generator().manual_seed(0)
    plain = KVLayer(policy)
    for i in range(90):
        kv = torch.randn(1, 2, 1, D, generator=g)
        for one in (layer, plain):
            one.append(kv, kv)
            one.observe(kv, Visibility(i, 1))
        assert torch.equal(layer.store.read(POSITION).sort(-1).values, plain.store.read(POSITION).sort(-1).values)
        if layer.evictions:
            assert layer.store.bytes_of((KEY, VALUE)) == 2 * (layer.store.longest + 1) * layer.store.bytes_per_token
    assert layer.evictions > 50


@pytest.mark.parametrize("name", ["evict3r", "frame_attention", "knorm"])
def test_a_byte_budget_holds_with_room_for_a_frame(name):
    limit = 40 * HKV * 2 * D * 8
    stream = Stream(kvsieve.get_policy(name, budget=f"{limit}B", protect=replace(PROTECT, kinds_recent=2)), room=FRAME)
    for _ in range(12):
        stream.feed()
        assert stream.layer.store.bytes_of((KEY, VALUE)) <= limit
    assert stream.layer.store.longest == 40 - FRAME


def test_order_of_slots_does_not_matter():
    """Closing gaps moves tokens; sorted back by position, everything goes on alike."""
    policy = kvsieve.get_policy("evict3r", budget=25)
    moved, sorted_ = Stream(policy, room=FRAME), Stream(policy, room=FRAME)
    for _ in range(9):
        moved.feed()
        sorted_.feed()
        store = sorted_.layer.store
        order = store.read(POSITION).argsort(-1)
        for column in store.columns.values():
            where = order if column.dim() == 3 else order[..., None].expand(-1, -1, -1, column.shape[-1])
            column[:, :, : store.n] = column[:, :, : store.n].gather(2, where)
        assert moved.held() == sorted_.held()
    assert not moved.layer.store.ordered


# ---- everything is visible


@pytest.mark.parametrize("name", ["full", "evict3r", "knorm", "adakv_snapkv"])
@pytest.mark.parametrize("everything", [True, False])
def test_attention_equals_naive(name, everything):
    """`Stream` compares; chunks of several frames and heads of different length are among them."""
    hyper = {"window_size": 2} if name == "adakv_snapkv" else {}
    policy = kvsieve.get_policy(
        name, **({} if name == "full" else {"budget": 20, "protect": Protect(recent=2)}), **hyper
    )
    stream = Stream(policy, batch=2, everything=everything)
    for chunk in (2, 1, 3, 1, 1):
        stream.feed(chunk)
        stream.check_records()


def test_padding_stays_unseen_where_all_else_is_visible():
    layer = KVLayer(kvsieve.get_policy("full"))
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, H, 9, D, generator=g, dtype=torch.float64)
    kv = torch.randn(2, HKV, 9, D, generator=g, dtype=torch.float64)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :4] = False
    layer.append(kv, kv)
    out = layer.attend(q, Visibility(0, 9, padding, everything=True))
    want = attend_naive(q, kv, kv, mask=padding[:, None, None].expand(-1, H, 9, -1))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


# ---- statistics


@pytest.mark.parametrize("name", ["evict3r", "frame_attention"])
@pytest.mark.parametrize("rejected", [None, 0, 3])
def test_attention_counted_on_the_way_is_that_of_a_second_pass(name, rejected):
    hyper = {"aggregation": "max"} if name == "frame_attention" else {}
    policy = kvsieve.get_policy(name, budget=25, **hyper)
    counted, again = Stream(policy), Stream(policy, collect=False)
    for _ in range(6):
        for stream in (counted, again):
            stream.feed(hold=rejected is not None)
            if rejected is not None:
                assert (stream.layer._pending.collected is not None) == stream.collect
                stream.layer.crop(rejected)
        assert counted.held() == again.held()
        if name == "evict3r":
            order = [s.layer.store.read(POSITION).argsort(-1) for s in (counted, again)]
            mass = [s.layer.store.read("mass").gather(-1, o) for s, o in zip((counted, again), order, strict=True)]
            torch.testing.assert_close(*mass, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce", ["sum", "max", "square"])
def test_only_what_was_counted_is_taken_from_the_count(reduce):
    """Another reduction, other queries or weights mean a pass of their own."""
    policy = kvsieve.get_policy("evict3r", budget=1000)
    stream = Stream(policy)
    stream.feed(2)
    layer, visibility = stream.layer, Visibility(0, 2 * FRAME, everything=True)
    wrong = torch.full(layer.store.read(POSITION).shape, -1.0)
    view = LayerView(layer, stream.q, visibility, None, ("sum", wrong))
    p = probabilities_naive(stream.q, view.keys, None, None, None, None).unflatten(1, (HKV, -1))
    want = {"sum": p.sum((2, 3)), "max": p.amax((2, 3)), "square": p.square().sum((2, 3))}[reduce]
    got = view.attention_mass(reduce=reduce)
    assert torch.equal(got, wrong) if reduce == "sum" else torch.allclose(got, want)
    torch.testing.assert_close(view.attention_mass(stream.q, reduce=reduce), want)
    torch.testing.assert_close(view.attention_mass(weights=torch.ones(1, 1, 2 * FRAME), reduce=reduce), want)


@settings(max_examples=40, deadline=None)
@given(how=st.sampled_from(["causal", "everything", "function"]), pads=st.integers(0, 12),
       chunks=st.lists(st.integers(1, 90), min_size=1, max_size=4), evict=st.booleans())  # fmt: skip
def test_exposure_counts_queries(how, pads, chunks, evict):
    total = sum(chunks)
    padding = torch.ones(2, total, dtype=torch.bool)
    padding[1, :pads] = False
    layer = KVLayer(kvsieve.get_policy("knorm", budget=20) if evict else kvsieve.get_policy("full"))
    function = (lambda b, h, q, kv: (kv <= q) & (kv + 11 > q)) if how == "function" else None
    for t in chunks:
        start = layer.seen
        kv = torch.randn(2, 1, t, D)
        layer.append(kv, kv)
        visibility = Visibility(start, t, padding[:, : start + t], function, how == "everything")
        layer.mark_padding(visibility)
        view = LayerView(layer, kv, visibility)
        got = view.exposure()
        assert got.dtype == torch.float32
        real = padding[:, start : start + t]
        for b in range(2):
            for n, position in enumerate(view.positions[b, 0].tolist()):
                if not bool(view.real[b, 0, n]):
                    continue
                queries = [q for q in range(start, start + t) if real[b, q - start]]
                if how == "causal":
                    queries = [q for q in queries if q >= position]
                if how == "function":
                    queries = [q for q in queries if q - 11 < position <= q]
                assert float(got[b, 0, n]) == len(queries)
        layer.observe(kv, visibility)


# ---- the two methods, over several passes with evictions in between


def naive_mass(layer: KVLayer, q: torch.Tensor, everything: bool, t: int) -> torch.Tensor:
    """`[B, H, t, seen]` probabilities by position."""
    positions = layer.store.read(POSITION).long()
    mask = torch.ones(1, HKV, t, positions.shape[-1], dtype=torch.bool)
    if not everything:
        mask = positions[:, :, None] <= torch.arange(layer.seen - t, layer.seen)[:, None]
    p = probabilities_naive(q, layer.store.read(KEY), None, mask.repeat_interleave(H // HKV, 1), None, None)
    table = torch.zeros(*p.shape[:3], layer.seen, dtype=p.dtype)
    where = positions.repeat_interleave(H // HKV, 1)[:, :, None].expand(-1, -1, t, -1)
    return table.scatter_(-1, where, p)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("room", [None, FRAME])
def test_evict3r_is_its_formula(everything, room, monkeypatch):
    """Attention averaged over heads times what was held, summed over passes, over the queries that could look."""
    stream = Stream(kvsieve.get_policy("evict3r", budget=23), batch=1, everything=everything, room=room)
    layer, original, seen = stream.layer, KVLayer.cut, []
    mass, exposure = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)

    def cut(self, view, counts=None):
        nonlocal mass, exposure
        t = view.new
        table = naive_mass(self, view.queries, everything, t)
        mass = torch.cat([mass, mass.new_zeros(t)]) + table.sum(2).mean(1)[0] * self.store.longest
        exposure = torch.cat([exposure, exposure.new_zeros(t)])
        for p in range(self.seen):
            exposure[p] += t if everything else sum(q >= p for q in range(self.seen - t, self.seen))
        want = (mass / exposure)[view.positions.long()]
        torch.testing.assert_close(view._layer.policy.scorer.score(view), want, rtol=1e-6, atol=1e-9)
        seen.append(self.store.longest)
        before = set(stream.held())
        original(self, view, counts)
        gone = before - set(stream.held())
        stay = [p for p in stream.held() if p >= FRAME and p % FRAME >= SPECIALS]
        worth = mass / exposure
        assert not gone or not stay or max(worth[p] for p in gone) <= min(worth[p] for p in stay) + 1e-9

    monkeypatch.setattr(KVLayer, "cut", cut)
    for chunk in (2, 1, 1, 3, 1):
        stream.feed(chunk)
    assert layer.evictions >= 3
    assert len(seen) == 5


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max"])
@pytest.mark.parametrize("everything", [True, False])
def test_frame_attention_is_its_formula(aggregation, everything, monkeypatch):
    """Attention from the queries of the last pass alone, per key-value head."""
    policy = kvsieve.get_policy("frame_attention", budget=EvictRatio(0.4), aggregation=aggregation)
    stream, asked, original = Stream(policy, batch=2, everything=everything), [], FrameAttention.score

    def score(self, view):
        got, t = original(self, view), view.new
        p = probabilities_naive(
            view.queries, view.keys, None,
            None if everything else
            (view.positions[:, :, None] <= view.new_positions[:, None]).repeat_interleave(H // HKV, 1), None, None,
        ).unflatten(1, (HKV, -1))  # fmt: skip
        want = p.amax((2, 3)) if aggregation == "max" else p.sum((2, 3))
        if aggregation == "mean":
            could = (view.positions[:, :, None] <= view.new_positions[:, None]).sum(2)
            want = want / (t if everything else could)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        asked.append(view.held)
        return got

    monkeypatch.setattr(FrameAttention, "score", score)
    for chunk in (2, 1, 1, 3, 1):
        stream.feed(chunk)
        stream.check_records()
    assert len(asked) == 5
    with pytest.raises(PolicyError, match="median"):
        FrameAttention("median")
