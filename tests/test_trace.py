"""What a cache held, recorded from the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvsieve import SieveCache, get_policy, zoo
from kvsieve.errors import DataError
from kvsieve.trace import NEVER, Recorder, Trace


@pytest.fixture(scope="module")
def model():
    return zoo.load("mini-lm")[0]


def _read(model, policy, tokens, chunk):
    cache = SieveCache(model, policy)
    recorder, states = Recorder(cache), {}
    ids = torch.arange(5, 5 + tokens)[None]
    with torch.no_grad():
        for start in range(0, tokens, chunk):
            model(ids[:, start : start + chunk], past_key_values=cache)
            recorder.step()
            now = min(tokens, start + chunk)
            states[now] = [cache.kept_positions(i)[0] for i in range(len(cache.managed))]
    return cache, recorder.trace(text="x"), states


@pytest.mark.parametrize(("name", "budget"), [("h2o", 40), ("adakv_snapkv", 70), ("full", None), ("streaming_llm", 36)])
def test_the_record_equals_what_the_cache_says_at_every_step(model, name, budget):
    policy = get_policy(name) if budget is None else get_policy(name, budget=budget)
    _, trace, states = _read(model, policy, 100, 16)
    assert trace.seen.tolist() == list(states)
    assert trace.tokens == 100
    assert trace.layers == (0, 1, 2, 3)
    assert trace.about == {"method": name, "text": "x"}
    for seen, layers in states.items():
        held = trace.held(seen)
        for layer, kept in enumerate(layers):
            for head in range(held.shape[1]):
                wanted = kept[head][kept[head] >= 0].tolist()
                assert np.flatnonzero(held[layer, head]).tolist() == wanted
    assert (trace.left == NEVER).any()
    assert (trace.held() == trace.held(100)).all()


def test_an_eviction_on_request_counts_for_the_forward_pass_before_it(model):
    cache = SieveCache(model, get_policy("knorm", budget=10, when="request"))
    recorder = Recorder(cache)
    with torch.no_grad():
        model(torch.arange(5, 55)[None], past_key_values=cache)
    recorder.step()
    cache.evict()
    recorder.step()
    trace = recorder.trace()
    assert trace.seen.tolist() == [50]
    assert trace.share().sum() == pytest.approx(10)
    assert set(np.unique(trace.left)) == {0, 50}


def test_shares_are_over_all_heads_of_all_layers():
    left = np.zeros((2, 2, 3), dtype=np.int32)
    left[0, 0, 0], left[1, :, 1] = 3, 2
    trace = Trace(left, np.array([2, 3], dtype=np.int32), (0, 5))
    assert trace.share().tolist() == [0.75, 0.5, 1.0]
    assert trace.share(2).tolist() == [1.0, 0.5, 0.0]
    assert trace.share(1).tolist() == [1.0, 0.0, 0.0]


def test_files_hold_all_of_it_and_are_the_same_every_time(tmp_path):
    left = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    trace = Trace(left, np.array([3], dtype=np.int32), (0, 5), {"text": "aé", "offsets": [[0, 1]]})
    one, two = trace.save(tmp_path / "a" / "one.npz"), trace.save(tmp_path / "two.npz")
    assert one.read_bytes() == two.read_bytes()
    back = Trace.load(one)
    assert (back.left == left).all()
    assert back.layers == (0, 5)
    assert back.about == trace.about
    assert back.left.dtype == np.int32
    assert back.with_about({"a": 1}).about == {"a": 1}


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Trace.load(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a recorded trace"):
        Trace.load(tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", left=np.zeros(3))
    with pytest.raises(DataError, match="not a recorded trace"):
        Trace.load(tmp_path / "other.npz")
    with pytest.raises(DataError, match="cannot hold"):
        Trace(np.zeros((1, 1, 1), np.int32), np.ones(1, np.int32), (0,), {"x": float("nan")}).save(tmp_path / "t.npz")


def test_nothing_recorded_is_said(model):
    recorder = Recorder(SieveCache(model, get_policy("full")))
    recorder.step()
    with pytest.raises(DataError, match="nothing was recorded"):
        recorder.trace()
