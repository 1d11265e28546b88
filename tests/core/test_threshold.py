"""Thresholds, which at a decode step look at one token per head only, against the rule applied to every token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve.errors import ScoreError
from kvsieve.layer import KVLayer
from kvsieve.measure import kept_positions
from kvsieve.policy import Policy
from kvsieve.protect import Protect
from kvsieve.view import Visibility

B, HKV, D, N = 2, 3, 4, 80
TRIGGERS = ("every_forward", "prefill", "every:3")


class Rule:
    """Every pass on which the trigger fires: what is neither protected nor scored high enough leaves."""

    def __init__(self, keys: torch.Tensor, threshold: float, sink: int, recent: int, when: str) -> None:
        self.bad = -keys.norm(dim=-1) < threshold
        self.sink, self.recent, self.when = sink, recent, when
        self.held = [[set[int]() for _ in range(HKV)] for _ in range(B)]
        self.seen = 0

    def feed(self, t: int) -> None:
        before, self.seen = self.seen, self.seen + t
        fires = {"every_forward": True, "prefill": t > 1, "every:3": self.seen // 3 > before // 3}[self.when]
        for b in range(B):
            for h in range(HKV):
                self.held[b][h] |= set(range(before, self.seen))
                if fires:
                    open_ = range(self.sink, self.seen - self.recent)
                    self.held[b][h] -= {p for p in open_ if self.bad[b, h, p]}


class Stream:
    def __init__(self, policy: Policy, keys: torch.Tensor) -> None:
        self.layer, self.keys = KVLayer(policy), keys

    def feed(self, t: int) -> None:
        s = self.layer.seen
        keys = self.keys[:, :, s : s + t]
        self.layer.append(keys, keys)
        self.layer.observe(None, Visibility(s, t))

    def held(self) -> list[list[set[int]]]:
        return [[{p for p in head if p >= 0} for head in row] for row in kept_positions(self.layer).tolist()]


def random_keys(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, HKV, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy(threshold: float, sink: int, recent: int, when: str = "every_forward") -> Policy:
    return kvsieve.get_policy("knorm", threshold=threshold, when=when, protect=Protect(sink=sink, recent=recent))


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 1, 2, 9]), min_size=1, max_size=30),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), sink=st.integers(0, 3), recent=st.integers(0, 6),
    when=st.sampled_from(TRIGGERS), crop=st.sampled_from([None, 1, 3]), seed=st.integers(0, 5),
)  # fmt: skip
def test_the_rule_is_kept_to(chunks, share, sink, recent, when, crop, seed):
    keys = random_keys(seed)
    threshold = float((-keys.norm(dim=-1)).quantile(share))
    rule, stream = Rule(keys, threshold, sink, recent, when), Stream(policy(threshold, sink, recent, when), keys)
    for i, t in enumerate(chunks):
        if stream.layer.seen + t > N:
            break
        rule.feed(t)
        stream.feed(t)
        assert stream.held() == rule.held
        assert stream.layer.store.tokens == sum(len(head) for row in rule.held for head in row)
        if crop is not None and i == len(chunks) // 2 and stream.layer.evicted_at <= stream.layer.seen - crop >= 0:
            stream.layer.crop(crop)
            rule.seen -= crop
            rule.held = [[{p for p in head if p < rule.seen} for head in row] for row in rule.held]
            if not stream.layer.seen:
                break


def test_a_score_on_the_threshold_stays():
    """In the precision of the scores: 0.1 as float32 lies above 0.1, and its negative below -0.1."""
    keys = torch.full((1, 2, 12, 1), 0.5)
    keys[:, 1] = 0.1
    stream = Stream(policy(-0.1, 0, 3), keys)
    for _ in range(12):
        stream.feed(1)
    assert stream.held() == [[{9, 10, 11}, set(range(12))]]


def test_a_decode_step_reads_no_padded_table():
    """What makes it fast: neither scores nor positions are laid out again."""
    keys = random_keys()
    stream = Stream(policy(float((-keys.norm(dim=-1)).median()), 1, 4), keys)
    stream.feed(40)
    reads: list[str] = []
    store = stream.layer.store
    padded = store._padded
    store._padded = lambda: reads.append("table") or padded()
    before = store.tokens
    for _ in range(6):
        stream.feed(1)
    assert stream.layer.store is store
    assert before < store.tokens < before + 6 * B * HKV  # some left
    assert len(reads) <= 1  # when the buffer grew


def test_tokens_leave_even_where_most_do():
    """Dropping one at a time gives memory back."""
    keys = random_keys()
    stream = Stream(policy(0.0, 0, 2), keys)  # every score is negative
    for _ in range(N):
        stream.feed(1)
    store = stream.layer.store
    assert store.tokens == B * HKV * 2
    assert store.bytes_of(("key",)) <= (2 + 1 + 8) * B * HKV * D * 8


@pytest.mark.parametrize("chunk", [1, 30])
def test_nan_is_refused(chunk):
    keys = random_keys()
    keys[0, 1, 25] = float("nan")
    stream = Stream(policy(-1.5, 0, 4), keys)

    def feed_all() -> None:
        for _ in range(0, 60, chunk):
            stream.feed(chunk)

    with pytest.raises(ScoreError):
        feed_all()
