"""LaCache's ladder: its pattern, its compaction over and over, one set per layer, and errors that say what fits."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_streams import chunks_of, feed, kept

import models
from kvsieve import SieveCache, get_policy
from kvsieve.errors import BudgetError, PolicyError
from kvsieve.layer import KVLayer
from kvsieve.ledger import POSITION
from kvsieve.methods.ladder import Ladder
from kvsieve.policy import Policy


class NoRoomError(Exception):
    """The pattern does not fit into what is held, however wide its steps."""


class Naive:
    """All layers in plain lists: when they are too long, what LaCache keeps; it leaves nothing for later."""

    def __init__(self, layers: int, span: int, overlap: int, size: int, sink: int) -> None:
        self.before = 1 + math.ceil((layers - span) / (span - overlap))
        self.after = min(math.ceil(span / (span - overlap)), self.before)
        self.fewer = self.before - self.after
        self.layers, self.span, self.size, self.sink = layers, span, size, sink
        self.cursor, self.seen, self.steps = sink, 0, []
        self.held: list[list[int]] = [[] for _ in range(layers)]

    def feed(self, count: int) -> None:
        for held in self.held:
            held += range(self.seen, self.seen + count)
        self.seen += count
        need = len(self.held[0]) - self.size
        if need <= 0:
            return
        room = (self.size - self.cursor - self.layers) // self.after
        groups = min(math.ceil(need / self.fewer), room)
        self.compact(self.cursor, groups, 1)
        self.cursor += groups * self.after
        need -= groups * self.fewer
        if need > 0:
            in_one_go = (self.size - self.sink - self.layers) // self.after * self.fewer
            step = math.ceil(need / in_one_go)
            while True:
                groups = math.ceil(need / (self.length(step) - self.after))
                if self.sink + groups * self.length(step) <= len(self.held[0]) - self.span:
                    break
                if self.sink + self.length(step) > len(self.held[0]) - self.span:
                    raise NoRoomError  # LaCache knows no end here
                step += 1  # LaCache runs past the end here
            self.compact(self.sink, groups, step)
            self.cursor = self.sink + groups * self.after
            self.steps.append(step)

    def length(self, step: int) -> int:
        return self.before + (step - 1) * (self.before - 1)

    def compact(self, start: int, groups: int, step: int) -> None:
        length = self.length(step)
        ladders = [range(s, length, step)[: self.after] for s in range(length)]
        ladders = [ladder for ladder in ladders if len(ladder) == self.after]  # those that lie within the group
        for layer, held in enumerate(self.held):
            ladder = ladders[layer % len(ladders)]
            if step == 1:
                assert ladder[0] == layer % (self.fewer + 1)
            inside = [held[start + group * length + slot] for group in range(groups) for slot in ladder]
            self.held[layer] = held[:start] + inside + held[start + groups * length :]


def run(policy: Policy, layers: int, chunks: list[int], twin: Naive | None = None) -> list[KVLayer]:
    """All layers of a stream; what has not been given up is compared with the twin after every chunk."""
    cores = [KVLayer(policy, rank, rank, layers) for rank in range(layers)]
    for count in chunks:
        for core in cores:
            feed(core, count)
        if twin is not None:
            twin.feed(count)
            for core, want in zip(cores, twin.held, strict=True):
                assert core.store.tokens == min(core.seen, twin.size)
                assert set(want) <= set(kept(core))
                assert staying(core) == want
    return cores


def staying(core: KVLayer) -> list[int]:
    """Positions held that no group has given up."""
    positions = core.store.read(POSITION)[0, 0]
    if "leaving" not in core.store.columns:
        return kept(core)
    return positions[core.store.read("leaving")[0, 0] == 0].sort().values.tolist()


@pytest.mark.parametrize(
    ("layers", "span", "overlap", "groups"),
    [(32, 16, 0, (2, 1)), (32, 8, 4, (7, 2)), (24, 9, 7, (9, 5)), (32, None, None, (7, 2)), (2, None, None, (2, 1))],
)
def test_groups(layers, span, overlap, groups):
    assert Ladder(span=span, overlap=overlap).groups(layers)[1:] == groups


def test_by_hand():
    """Four layers, every token in two of them: pairs become one token, the first in even layers."""
    policy = get_policy("ladder", budget=12, span=2, overlap=0, n_sink=1)
    even, odd, *rest = run(policy, 4, [12, 1])
    assert kept(even) == [0, 1, *range(3, 13)]
    assert kept(odd) == [0, *range(2, 13)]
    assert [kept(core) for core in rest] == [kept(even), kept(odd)]
    even, odd, *_ = run(policy, 4, [12, 5])
    assert kept(even) == [0, 1, 3, 5, 7, 9, *range(11, 17)]
    assert kept(odd) == [0, 2, 4, 6, 8, 10, *range(11, 17)]
    even, odd, *_ = run(policy, 4, [12, *[1] * 9])  # seven pairs fit; then two pairs of pairs
    assert kept(even) == [0, 1, 5, 9, 11, 13, *range(15, 21)]
    assert kept(odd) == [0, 4, 8, 10, 12, 14, *range(15, 21)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_stays_is_what_lacache_keeps(data):
    layers = data.draw(st.integers(2, 9), "layers")
    span = data.draw(st.integers(1, layers - 1), "span")
    overlap = data.draw(st.integers(0, span - 1), "overlap")
    sink = data.draw(st.integers(0, 5), "sink")
    try:
        _, before, after = Ladder(span=span, overlap=overlap).groups(layers)
    except PolicyError:
        return
    size = sink + layers + before + after + data.draw(st.integers(0, 40), "more")
    chunks = data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 20, 150]), min_size=1, max_size=60), "chunks")
    policy = get_policy("ladder", budget=size, span=span, overlap=overlap, n_sink=sink)
    try:
        cores = run(policy, layers, chunks, Naive(layers, span, overlap, size, sink))
    except NoRoomError:
        return
    for core in cores:
        got = kept(core)
        assert got[:sink] == list(range(min(sink, core.seen)))
        assert got[-min(span, core.seen) :] == list(range(max(core.seen - span, 0), core.seen))


@pytest.mark.parametrize(
    ("span", "overlap", "size", "distinct"),
    # LaCache lets its cache grow by half of what a group saves, once: 256 + 2 in the second case
    [(16, 0, 256, 368), (8, 4, 258, 628)],
)
def test_the_reach_that_was_measured_of_lacache(span, overlap, size, distinct):
    twin = Naive(32, span, overlap, size, 4)
    for _ in range(1024):
        twin.feed(1)
    assert len(set().union(*twin.held)) == distinct


def test_layers_together_reach_further():
    twin = Naive(32, 16, 0, 256, 4)
    policy = get_policy("ladder", budget=256, span=16, overlap=0)
    cores = [KVLayer(policy, rank, rank, 32) for rank in (0, 1, 31)]
    for count in (300, 300, *[1] * 424):
        twin.feed(count)
        for core in cores:
            feed(core, count)
    assert [staying(core) for core in cores] == [twin.held[rank] for rank in (0, 1, 31)]
    assert len(set().union(*map(kept, cores))) > 1.4 * 256


def test_a_long_prompt_starts_over_in_larger_steps():
    twin = Naive(8, 2, 1, 40, 4)
    run(get_policy("ladder", budget=40, span=2, overlap=1), 8, [900, 1, 1, 300], twin)
    assert max(twin.steps) > 10


# ---- in a cache


@pytest.fixture(scope="module")
def model():
    return models.build("llama", num_hidden_layers=4)


def held_by(cache: SieveCache, row: int = 0) -> list[list[int]]:
    out = []
    for layer in range(4):
        first, *others = cache.kept_positions(layer)[row].tolist()
        assert all(other == first for other in others)
        out.append([p for p in first if p >= 0])
    return out


@pytest.mark.parametrize("positions", ["original", "slot"])
def test_layers_hold_as_much_of_different_things(model, positions):
    policy = get_policy("ladder", budget=24, span=2, overlap=0)
    cache, twin = SieveCache(model, policy, positions=positions), Naive(4, 2, 0, 24, 4)
    with torch.no_grad():
        for piece in models.words(1, 90).split([40, 7, *[1] * 43], dim=1):
            model(piece, past_key_values=cache)
            twin.feed(piece.shape[1])
            assert [len(held) for held in held_by(cache)] == [min(24, twin.seen)] * 4
    assert held_by(cache) == twin.held, "pairs: nothing waits"
    assert held_by(cache)[0] == held_by(cache)[2] != held_by(cache)[1]


def test_a_sequence_begins_anew(model):
    cache = SieveCache(model, get_policy("ladder", budget=24))
    ids = models.words(1, 70)

    def go_on(cache, pieces):
        with torch.no_grad():
            for piece in pieces:
                model(piece, past_key_values=cache)
        return held_by(cache)

    pieces = ids.split(10, dim=1)
    go_on(cache, pieces[:4])
    twin = copy.deepcopy(cache)
    want = go_on(cache, pieces[4:])
    assert go_on(twin, pieces[4:]) == want
    cache.reset()
    assert go_on(cache, pieces) == want


def test_rows_have_cursors_of_their_own(model):
    """Rows that begin with padding hold what they would hold alone."""
    padding, ids = torch.ones(3, 70, dtype=torch.long), models.words(3, 70)
    padding[1, :9] = padding[2, :31] = 0
    policy = get_policy("ladder", budget=24)
    cache = SieveCache(model, policy)
    with torch.no_grad():
        for start, end in ((0, 50), *((i, i + 1) for i in range(50, 70))):
            model(ids[:, start:end], attention_mask=padding[:, :end], past_key_values=cache)
    for row, pads in enumerate((0, 9, 31)):
        twin = Naive(4, 1, 0, 24, 4)
        for count in (50 - pads, *[1] * 20):
            twin.feed(count)
        for held, want in zip(held_by(cache, row), twin.held, strict=True):
            assert set(want) <= {p - pads for p in held}
            assert len(held) == 24


def test_batch_rows_can_be_reordered(model):
    cache, ids = SieveCache(model, get_policy("ladder", budget=24)), models.words(2, 50)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        for i in range(30, 50):
            model(ids[:, i : i + 1], past_key_values=cache)
    assert held_by(cache, 0) == held_by(cache, 1)


# ---- budgets and errors


def test_a_byte_budget():
    policy = get_policy("ladder", budget=f"{4 * 8 * 41}B", span=2, overlap=1)
    for core in run(policy, 4, chunks_of(200, 13)):
        assert core.store.tokens == 40


def test_a_ratio_never_goes_below_what_the_pattern_needs():
    assert [len(kept(core)) for core in run(get_policy("ladder", budget=0.5), 4, [100])] == [50] * 4
    assert [len(kept(core)) for core in run(get_policy("ladder", budget=0.1), 4, [40])] == [4 + 4 + 4 + 1] * 4
    every = get_policy("ladder", budget=0.1, when="every_forward")
    assert [len(kept(core)) for core in run(every, 4, [1] * 30)] == [13] * 4


@pytest.mark.parametrize("budget", [12, f"{4 * 8 * 13}B"])
@pytest.mark.parametrize("chunks", [[40], [1] * 14])
def test_a_budget_too_small_for_the_pattern(budget, chunks):
    with pytest.raises(BudgetError, match="may keep 12 tokens per head, but 13 are needed; the smallest legal budget"):
        run(get_policy("ladder", budget=budget), 4, chunks)
    with pytest.raises(BudgetError, match="4 sinks"):
        get_policy("ladder", budget=3)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"span": 0}, "1 layer or more, not 0"),
        ({"overlap": -1}, "zero or more"),
        ({"n_sink": -1}, "zero or more"),
        ({"span": 3, "overlap": 3}, "overlap=3 must be below span=3"),
    ],
)
def test_bad_settings(hyper, message):
    with pytest.raises(PolicyError, match=message):
        get_policy("ladder", budget=64, **hyper)


@pytest.mark.parametrize(
    ("hyper", "layers", "message"),
    [
        ({"span": 4}, 4, "span=4 and overlap=2 do not fit 4 managed layers"),
        ({"overlap": 1}, 4, "span=1 and overlap=1 do not fit"),
        ({}, 1, "span=1 and overlap=0 do not fit 1 managed layers"),
        ({"span": 20, "overlap": 18}, 24, "24 layers let nothing go"),
    ],
)
def test_patterns_that_do_not_fit_the_model(hyper, layers, message):
    with pytest.raises(PolicyError, match=message):
        feed(KVLayer(get_policy("ladder", budget=64, **hyper), n_layers=layers), 3)


def test_heads_that_differ_and_thresholds(model):
    with pytest.raises(PolicyError, match="name a budget"):
        run(get_policy("ladder", threshold=0.0), 4, [30])
    policy = get_policy("snapkv", budget=24, share="across_heads", window_size=4)
    cache = SieveCache(model, policy)
    with torch.no_grad():
        model(models.words(1, 40), past_key_values=cache)
        ladder = get_policy("ladder", budget=20)
        for layer in cache.managed:
            layer.core.policy = ladder
        with pytest.raises(PolicyError, match="share='uniform'"):
            model(models.words(1, 9), past_key_values=cache)


def test_it_is_plain_data():
    policy = get_policy("ladder", budget=64, span=8)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
