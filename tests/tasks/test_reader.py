"""Reading and answering: against the model on its own, and against naive twins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvsieve import SieveCache, get_policy, zoo
from kvsieve.errors import DataError, PolicyError, ScoreError
from kvsieve.tasks import needle
from kvsieve.tasks.items import procedural_item
from kvsieve.tasks.reader import answer, survival


@pytest.fixture(scope="module")
def mini():
    return zoo.load("mini-lm")


@pytest.fixture(scope="module")
def items(mini):
    return [procedural_item(one, mini[1]) for one in needle.generate(mini[1], 220, 3, needles=2)]


def _answer(mini, policy, item, **more):
    cache = SieveCache(mini[0], policy)
    return answer(*mini, cache, item, **more), cache


@pytest.mark.parametrize("chunk", [7, 64, 512])
@pytest.mark.parametrize("aware", [True, False])
def test_the_full_cache_says_what_the_model_says(mini, items, chunk, aware):
    model, tokenizer = mini
    for item in items:
        found, cache = _answer(mini, get_policy("full"), item, chunk_size=chunk, aware=aware)
        wanted = model.generate(
            torch.tensor([item.prompt]), max_new_tokens=item.max_new_tokens, do_sample=False, pad_token_id=0
        )
        assert found.text == tokenizer.decode(wanted[0, len(item.prompt) :], skip_special_tokens=True)
        assert found.kept_share == 1.0
        assert found.survival.share == 1.0
        assert found.trace is None
        assert found.report["tokens_seen"] == [len(item.prompt)]
        assert cache.report()["bytes_full"] > found.report["bytes_full"]


@pytest.mark.parametrize("aware", [True, False])
def test_a_share_is_kept_of_what_was_read_before_the_eviction(mini, items, aware):
    for item in items:
        found, _ = _answer(mini, get_policy("streaming_llm", budget=0.25, when="request"), item, aware=aware)
        read = len(item.prompt) if aware else len(item.context)
        later = len(item.prompt) - read
        assert found.tokens_kept == max(1, int(read * 0.25)) + later
        assert found.report["bytes_held"] < 0.6 * found.report["bytes_full"]


def test_the_first_token_of_an_answer_pays_for_what_was_evicted(mini, items):
    """Read in one go, the first token would come from attention over everything."""
    policy = get_policy("streaming_llm", budget=0.05, when="request")
    full = [_answer(mini, get_policy("full"), item)[0].text.split()[0] for item in items]
    less = [_answer(mini, policy, item)[0].text.split()[0] for item in items]
    assert full != less


def test_tokens_are_held_at_every_step(mini, items):
    found, cache = _answer(mini, get_policy("h2o", budget=48), items[0], chunk_size=16, record=True)
    assert found.tokens_kept == 48
    trace = found.trace
    assert all(trace.held(int(n)).sum(-1).max() <= 48 for n in trace.seen)
    assert trace.tokens == cache.report()["tokens_seen"][0]


def test_what_a_trace_says(mini, items):
    item = items[0]
    found, cache = _answer(mini, get_policy("knorm", budget=0.5, when="request"), item, record=True)
    about = found.trace.about
    assert about["asked"] == len(item.prompt)
    assert about["question"] == len(item.context)
    assert len(about["offsets"]) == found.trace.tokens
    assert "".join(about["text"][a:b] for a, b in about["offsets"][1:]) == about["text"]
    low, high = about["answers"][0]
    start, end = about["offsets"][low][0], about["offsets"][high - 1][1]
    assert about["text"][start:end].strip() == item.expected[0]
    assert about["answer"] == found.text
    held = found.trace.held(about["asked"])
    assert held[..., low:high].all(-1).mean() == pytest.approx(found.survival.share)
    for layer in range(4):
        kept = cache.kept_positions(layer)[0]
        wanted = [row[row >= 0].tolist() for row in kept]
        assert [np.flatnonzero(row).tolist() for row in found.trace.held()[layer]] == wanted


def _naive_survival(held, answers, every):
    layers, heads, _ = held.shape
    shares = []
    for which in sorted({one for *_, one in answers}):
        table = np.zeros((layers, heads))
        for layer in range(layers):
            for head in range(heads):
                for low, high, one in answers:
                    if one == which and all(held[layer, head, i] for i in range(low, high)):
                        table[layer, head] = 1
        shares.append(table)
    best = max(shares, key=lambda table: table.mean())
    chosen = sum(shares) / len(shares) if every else best
    return chosen.mean(), chosen.mean(1)


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_survival_equals_its_naive_twin(every, seed):
    rng = np.random.default_rng(seed)
    held = rng.random((3, 2, 30)) < 0.8
    answers = [(3, 5, 0), (10, 11, 0), (12, 16, 1), (20, 21, 2)]
    found = survival(held, answers, every)
    share, by_layer = _naive_survival(held, answers, every)
    assert found.share == pytest.approx(share)
    assert found.by_layer == pytest.approx(by_layer)


def test_an_answer_that_is_half_gone_is_gone():
    held = np.ones((1, 1, 4), dtype=bool)
    held[0, 0, 2] = False
    assert survival(held, [(1, 3, 0)], False).share == 0.0
    assert survival(held, [(1, 3, 0), (3, 4, 0)], False).share == 1.0
    assert survival(held, [(1, 3, 0), (3, 4, 1)], True).share == 0.5


def test_stop_tokens_end_an_answer_but_do_not_begin_it(mini, items):
    _model, tokenizer = mini
    plain, _ = _answer(mini, get_policy("full"), items[0])
    first, second = tokenizer.encode(plain.text, add_special_tokens=False)[:2]
    stopped, _ = _answer(mini, get_policy("full"), replace(items[0], stop_token_ids=(second,)))
    assert stopped.tokens == 2
    barred, _ = _answer(mini, get_policy("full"), replace(items[0], stop_token_ids=(first,)))
    assert tokenizer.encode(barred.text, add_special_tokens=False)[0] != first
    early, _ = _answer(mini, get_policy("full"), replace(items[0], finished=lambda text: len(text) > 2))
    assert early.tokens < plain.tokens


def test_what_cannot_be_read_is_refused(mini, items):
    item = items[0]
    with pytest.raises(DataError, match="query-aware"):
        _answer(mini, get_policy("full"), replace(item, question=()), aware=False)
    with pytest.raises(DataError, match="at least two tokens"):
        _answer(mini, get_policy("full"), replace(item, context=(1,), question=()))
    with pytest.raises(PolicyError, match="chunk_size"):
        _answer(mini, get_policy("full"), item, chunk_size=0)


def test_no_number_is_no_answer(mini, items, monkeypatch):
    model, _ = mini
    forward = model.forward

    def broken(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[:] = float("nan")
        return out

    broken.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(ScoreError, match="not a number"):
        _answer(mini, get_policy("full"), items[0])


@pytest.mark.parametrize("name", ["tova", "snapkv"])
def test_a_method_that_may_know_the_question_decides_with_its_last_token(mini, items, name):
    """The kept set is that of the whole prompt read at once, and the answer comes from it alone."""
    model, _ = mini
    more = {"window_size": 8} if name == "snapkv" else {}
    policy = get_policy(name, budget=0.3, when="request", **more)
    for item in items:
        found, _ = _answer(mini, policy, item, chunk_size=1000, record=True)
        plain = SieveCache(model, policy)
        with torch.no_grad():
            model(torch.tensor([item.prompt]), past_key_values=plain)
        plain.evict()
        held = found.trace.held(len(item.prompt))
        for layer in range(4):
            wanted = [sorted({*row.tolist(), len(item.prompt) - 1}) for row in plain.kept_positions(layer)[0]]
            assert [np.flatnonzero(row).tolist() for row in held[layer]] == wanted
        mask = torch.tensor(held)
        assert mask.sum(-1).max() < 0.32 * len(item.prompt)


def test_a_model_with_other_layers_reads_its_last_token_last(mini, items, monkeypatch):
    monkeypatch.setattr(SieveCache, "take_back", lambda self: pytest.fail("nothing may be taken back here"))
    monkeypatch.setattr(SieveCache, "managed", property(lambda self: self.layers[:-1]))
    found, _ = _answer(mini, get_policy("streaming_llm", budget=0.25, when="request"), items[0])
    assert found.tokens_kept == int(0.25 * (len(items[0].prompt) - 1)) + 1


def test_a_token_that_was_taken_back_is_read_as_if_for_the_first_time(mini, items):
    model, ids = mini[0], torch.tensor([items[0].prompt])
    one, two = (SieveCache(model, get_policy("full")) for _ in range(2))
    with torch.no_grad():
        want = model(ids, past_key_values=one).logits[0, -1]
        model(ids, past_key_values=two)
        two.take_back()
        got = model(ids[:, -1:], past_key_values=two).logits[0, -1]
    assert two.report()["tokens_seen"] == [ids.shape[1]]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
