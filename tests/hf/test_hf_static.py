"""A cache of fixed capacity decodes as the dynamic one does, and its step is one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import scenarios
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache

import models
from kvsieve import (
    BudgetError,
    Policy,
    PolicyError,
    ScoreError,
    SieveCache,
    StaticSieveCache,
    UnsupportedModelError,
    UnsupportedOperationError,
    get_policy,
)
from kvsieve.budgets import Tokens
from kvsieve.ledger import KEY, POSITION, VALUE
from kvsieve.protect import Protect
from kvsieve.scorer import SCORERS, Scorer
from kvsieve.static_layer import attend_slots
from kvsieve.surrogates import KVzapSurrogate, SurrogateShape

BUDGET, NEW = 24, 30
SETTINGS: dict[str, dict[str, Any]] = {
    "adakv_snapkv": {"share": "uniform"},
    "evict3r": {"share": "uniform", "protect": Protect()},
    "frame_attention": {"protect": Protect()},
    "pyramidkv": {"share": "uniform"},
}
"""What a method that has another share, or protects kinds of tokens, needs to have a fixed capacity."""
REFUSED = {"full": "number of tokens", "ladder": "tensors alone", "lagkv": "tensors alone"}
METHODS = [name for name in scenarios.METHODS if name not in REFUSED]
TRACED = ["evict3r", "expected_attention", "keydiff", "kvzap", "random", "sink_recent_uniform", "snapkv", "tova"]
"""Methods that do different things; the others score as one of them does, or as h2o."""
OUTPUT: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def policy(name: str, budget: int = BUDGET, family: str = "llama", **settings: Any) -> Policy:
    return scenarios.policy(name, budget, family, **{**SETTINGS.get(name, {}), **settings})


def both(model: PreTrainedModel, chosen: Policy, inputs: dict[str, Tensor], new: int = NEW, **how: Any) -> Any:
    """Generate with a dynamic and a static cache; returns both caches and both outputs."""
    caches = SieveCache(model, chosen), StaticSieveCache(model, chosen)
    settings = {**OUTPUT, "max_new_tokens": new}
    outputs = [
        model.generate(**inputs, past_key_values=cache, **settings, **(how if cache is caches[1] else {}))
        for cache in caches
    ]
    return *caches, *outputs


def check_same(dynamic: SieveCache, static: SieveCache, want: Any, got: Any, within: float) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=within, atol=within)
    for index in range(len(dynamic.layers)):
        assert torch.equal(static.kept_positions(index), dynamic.kept_positions(index))
    mine, theirs = static.report(), dynamic.report()
    for name in ("tokens_seen", "tokens_held", "compression_ratio", "evictions", "bytes_full"):
        assert mine[name] == theirs[name]


@pytest.mark.parametrize("length", [40, 10])
@pytest.mark.parametrize("name", METHODS)
def test_decodes_as_the_dynamic_cache(name: str, length: int) -> None:
    model = models.managed("llama", torch.float64)
    found = both(model, policy(name), models.prompt("llama", 2, length))
    check_same(*found, within=1e-9)
    assert found[1].report()["evictions"] == 2 * (NEW if length > BUDGET else length + NEW - 1 - BUDGET)


def test_logits_in_single_precision() -> None:
    found = both(models.managed("llama"), policy("h2o"), models.prompt("llama", 2, 40))
    scale = max(float(step.abs().max()) for step in found[2].logits)
    check_same(*found, within=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "gemma2", "gpt_oss"])
def test_pictures_softcap_and_sinks(family: str) -> None:
    all_full = {"layer_types": ["full_attention"] * 4} if family in models.EAGER else {}
    model = models.build(family, **all_full)
    found = both(model, policy("h2o", family=family), models.prompt(family, 2, 30), new=12)
    scale = max(float(step.abs().max()) for step in found[2].logits)
    check_same(*found, within=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("name", ["h2o", "random", "snapkv", "sink_recent_uniform", "expected_attention", "keydiff"])
def test_rows_with_padding_fill_up_one_by_one(name: str) -> None:
    model = models.managed("llama", torch.float64)
    inputs = models.prompt("llama", 3, 22, padded=True)  # rows of 16, 19 and 22 tokens
    dynamic, static, want, got = both(model, policy(name, 20), inputs)
    check_same(dynamic, static, want, got, within=1e-9)


@pytest.mark.parametrize("how", scenarios.HOW)
def test_ways_to_generate(how: str) -> None:
    model, chosen = models.managed("llama", torch.float64), policy("tova", 14)
    outputs = [
        scenarios.generate(model, "llama", how, cache(model, chosen)) for cache in (SieveCache, StaticSieveCache)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


def test_one_slot_more_than_the_budget() -> None:
    model = models.managed("llama")
    static = StaticSieveCache(model, policy("knorm"))
    model.generate(**models.prompt("llama", 2, 40), past_key_values=static, max_new_tokens=5, do_sample=False)
    report = static.report()
    each = 2 * 16 * 4  # key and value, head dim 16, float32
    assert report["bytes_held"] == 2 * 2 * 2 * (BUDGET + 1) * each  # layers, rows, heads
    assert report["bytes_spare"] == 2 * 2 * 2 * each
    assert report["managed_layers"] == [0, 1]
    assert static.is_compileable
    assert static.next_position == static.get_seq_length() == 44


def test_what_left_weighs_nothing() -> None:
    model = models.managed("llama")
    ids = models.words(1, 45)

    def logits(poison: bool) -> Tensor:
        cache = StaticSieveCache(model, policy("h2o"))
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
            for step in range(10, 45):
                if poison:  # slots that were never used, and the one whose token has just left
                    for layer in cache.layers:
                        empty = layer.slots.columns[POSITION] < 0
                        assert bool(empty.any())
                        for name in (KEY, VALUE):
                            layer.slots.columns[name][empty] = 1e4
                out = model(ids[:, step : step + 1], past_key_values=cache).logits
        return out

    assert torch.equal(logits(True), logits(False))


@pytest.mark.parametrize("extra", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("reduce", ["", "sum", "max", "square"])
def test_attention_over_slots(reduce: str, extra: dict[str, Any]) -> None:
    from kvsieve.attention_naive import attend_naive, attention_mass_naive

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 1), (2, 9), (2, 9)))
    live = torch.rand(2, 2, 9, generator=generator) > 0.4
    live[..., 3] = True
    mask = live.repeat_interleave(2, 1)[:, :, None]
    out, mass = attend_slots(q, k, v, live, reduce, **extra)
    torch.testing.assert_close(out, attend_naive(q, k, v, mask=mask, **extra))
    if not reduce:
        assert mass is None
        return
    torch.testing.assert_close(mass, attention_mass_naive(q, k, None, reduce, mask=mask, **extra))
    assert not bool(mass[~live].any())


# ---- going in and out of the slots


def test_a_second_prompt() -> None:
    model = models.managed("llama", torch.float64)
    ids = models.words(2, 90)
    outputs = []
    for cache in (SieveCache(model, policy("snapkv")), StaticSieveCache(model, policy("snapkv"))):
        parts = []
        with torch.no_grad():
            for start, end in [(0, 30), *((i, i + 1) for i in range(30, 50)), (50, 70), (70, 71), (71, 72), (72, 90)]:
                parts.append(model(ids[:, start:end], past_key_values=cache).logits)
        outputs.append((torch.cat(parts, 1), cache.kept_positions(1), cache.report()["evictions"]))
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[0][2] == outputs[1][2]


def test_a_text_that_begins_with_single_tokens() -> None:
    model = models.managed("llama")
    found = both(model, policy("h2o", 12), models.prompt("llama", 1, 1))
    check_same(*found, within=1e-4)


def test_copies_and_files_go_on_alike(tmp_path: Any) -> None:
    import copy

    model = models.managed("llama", torch.float64)
    ids = models.words(1, 60)
    cache = StaticSieveCache(model, policy("h2o"))

    def feed(cache: Any, start: int, end: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, end)], 1)

    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    feed(cache, 30, 40)
    twin = copy.deepcopy(cache)
    want = feed(cache, 40, 60)
    twin.save(str(tmp_path / "cache"))
    loaded = StaticSieveCache.load(str(tmp_path / "cache"), model)
    torch.testing.assert_close(feed(twin, 40, 60), want)
    torch.testing.assert_close(feed(loaded, 40, 60), want)
    assert torch.equal(loaded.kept_positions(1), cache.kept_positions(1))


def test_cropping_is_refused_where_the_dynamic_cache_refuses() -> None:
    model = models.managed("llama", torch.float64)
    ids = models.words(1, 40)
    caches = SieveCache(model, policy("knorm")), StaticSieveCache(model, policy("knorm"))
    outputs = []
    for cache in caches:
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
            for step in range(10, 20):
                model(ids[:, step : step + 1], past_key_values=cache)
            cache.crop(-5)
            assert cache.get_seq_length() == 15
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(15, 40)]
        outputs.append(torch.cat(steps))
        with pytest.raises(UnsupportedOperationError, match="evicted"):
            cache.crop(-3)
        cache.take_back()
        assert cache.get_seq_length() == 39
    torch.testing.assert_close(*outputs)


# ---- graphs


class Graphs:
    """A backend that counts graphs, and hands them on."""

    count = 0

    @classmethod
    def run(cls, graph: Any, inputs: Any) -> Callable[..., Any]:
        cls.count += 1
        return graph.forward

    @classmethod
    def lower(cls, graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        cls.count += 1
        return aot_eager(graph, inputs)


@contextmanager
def compiled(backend: Any, fullgraph: bool = True) -> Iterator[dict[str, Any]]:
    """Settings that make `generate` compile, in one graph or not at all with `fullgraph`."""
    torch._dynamo.reset()
    Graphs.count = 0
    config = CompileConfig(fullgraph=fullgraph, backend=backend, mode="default")
    config._compile_all_devices = True
    try:
        yield {"compile_config": config}
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_one_graph_for_all_steps_and_texts(family: str) -> None:
    layers = 2 if family == "llama" else 1
    model, chosen = models.build(family, num_hidden_layers=layers), policy("h2o", family=family)
    with compiled(Graphs.lower) as how:
        dynamic, static, want, got = both(model, chosen, models.prompt(family, 2, 40), **how)
        assert Graphs.count == 1
        scale = max(float(step.abs().max()) for step in want.logits)
        check_same(dynamic, static, want, got, within=1e-5 * scale)
        for length in (13, 50):  # shorter than the budget, and longer
            inputs = models.prompt(family, 2, length, seed=length)
            static.reset()
            want = model.generate(**inputs, past_key_values=SieveCache(model, chosen), max_new_tokens=NEW, **OUTPUT)
            got = model.generate(**inputs, past_key_values=static, max_new_tokens=NEW, **OUTPUT, **how)
            assert torch.equal(got.sequences, want.sequences)
        # another turn of the same text
        ids = torch.cat([got.sequences, models.words(2, 9)], 1)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=static, max_new_tokens=5, **how)
        assert Graphs.count == 1
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture(scope="module")
def flat() -> PreTrainedModel:
    """One layer, which is quick to trace."""
    return models.build("llama", num_hidden_layers=1)


@pytest.mark.parametrize("name", TRACED)
def test_methods_make_one_graph(name: str, flat: PreTrainedModel) -> None:
    settings = {"scorer": KVzapSurrogate(SurrogateShape(64, 2, None, 1))} if name == "kvzap" else {}
    with compiled(Graphs.run) as how:
        found = both(flat, policy(name, 12, **settings), models.prompt("llama", 2, 14), new=8, **how)
        assert Graphs.count == 1
        check_same(*found, within=1e-3)


@dataclass(frozen=True)
class Spoilt(Scorer):
    """Gives NaN to what came behind the prompt."""

    name: ClassVar[str] = "spoilt"

    def score(self, view: Any) -> Tensor:
        return torch.where(view.positions < 14, 1.0, torch.nan)


del SCORERS[Spoilt.name]  # no method for other tests


def test_nan_raises_at_once_or_at_the_next_look(flat: PreTrainedModel) -> None:
    inputs = models.prompt("llama", 1, 14)
    static = StaticSieveCache(flat, Policy(Spoilt(), Tokens(12)))
    with pytest.raises(ScoreError):
        flat.generate(**inputs, past_key_values=static, max_new_tokens=4, do_sample=False)
    static.reset()
    with compiled(Graphs.run) as how:
        flat.generate(**inputs, past_key_values=static, max_new_tokens=4, do_sample=False, **how)
        with pytest.raises(ScoreError, match="compiled"):
            static.report()
    static.reset()
    assert static.report()["tokens_seen"] == []


def test_a_length_that_was_asked_for_stays(flat: PreTrainedModel) -> None:
    static, ids = StaticSieveCache(flat, policy("knorm")), models.words(1, 12)
    with torch.no_grad():
        flat(ids, past_key_values=static)
        flat(ids[:, :1], past_key_values=static)
        before = static.get_seq_length()
        flat(ids[:, :1], past_key_values=static)
    assert (int(before), int(static.get_seq_length())) == (13, 14)


def test_slots_hold_no_graph_of_gradients_and_outlive_inference_mode(flat: PreTrainedModel) -> None:
    ids = models.words(1, 12)

    def run(static: StaticSieveCache) -> Tensor:
        flat(ids, past_key_values=static)
        return flat(ids[:, :1], past_key_values=static).logits

    static = StaticSieveCache(flat, policy("h2o", 8))
    assert any(parameter.requires_grad for parameter in flat.parameters())
    with torch.enable_grad():
        want = run(static).detach()
    assert not any(buffer.requires_grad for layer in static.layers for buffer in layer.slots.columns.values())
    for mode in (torch.inference_mode, torch.no_grad):
        static.reset()
        with mode():
            assert torch.equal(run(static), want)


def test_a_state_begun_too_late_is_refused(flat: PreTrainedModel) -> None:
    class Late(Scorer):
        def observe(self, view: Any) -> None:
            if view.new == 1:
                view.state["late"] = view.queries

        def score(self, view: Any) -> Tensor:
            return view.positions.float()

    Late.name = "late"  # only now: it is no method for other tests
    static = StaticSieveCache(flat, Policy(Late(), Tokens(8)))
    with torch.no_grad():
        flat(models.words(1, 12), past_key_values=static)
        with pytest.raises(UnsupportedOperationError, match="begins the state 'late'"):
            flat(models.words(1, 1), past_key_values=static)


def test_prompts_stay_outside_of_graphs(flat: PreTrainedModel) -> None:
    static = StaticSieveCache(flat, policy("h2o"))
    with compiled(Graphs.run), torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="outside_of_graphs"):
        torch.compile(flat, backend=Graphs.run, fullgraph=True)(models.words(2, 40), past_key_values=static)
    assert static.get_seq_length() == 0


def test_stock_caches_of_the_same_model_compile_as_before(flat: PreTrainedModel) -> None:
    inputs = models.prompt("llama", 2, 14)

    def stock() -> StaticCache:
        return StaticCache(flat.config, max_cache_len=32)

    StaticSieveCache(flat, policy("knorm"))
    want = flat.generate(**inputs, past_key_values=stock(), max_new_tokens=8, do_sample=False)
    with compiled(Graphs.run) as how:
        got = flat.generate(**inputs, past_key_values=stock(), max_new_tokens=8, do_sample=False, **how)
        assert Graphs.count in (1, 2)  # two in transformers 5.14.1
    assert torch.equal(got, want)


# ---- refusals


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (lambda: get_policy("knorm", budget=0.5), "number of tokens"),
        (lambda: get_policy("knorm", budget="1MiB"), "number of tokens"),
        (lambda: get_policy("knorm", threshold=-1.0), "number of tokens"),
        (lambda: get_policy("full"), "number of tokens"),
        (lambda: get_policy("knorm", budget=24, when="prefill"), "every forward pass"),
        (lambda: get_policy("knorm", budget=24, when="every:4"), "every forward pass"),
        (lambda: get_policy("knorm", budget=24, when="request"), "every forward pass"),
        (lambda: get_policy("knorm", budget=24, share="across_heads"), 'share="uniform"'),
        (lambda: get_policy("adakv_snapkv", budget=100), 'share="uniform"'),
        (lambda: get_policy("pyramidkv", budget=100), 'share="uniform"'),
        (lambda: get_policy("evict3r", budget=24), 'share="uniform"'),
        (lambda: get_policy("frame_attention", budget=24), "by position"),
        (lambda: get_policy("knorm", budget=24, protect=Protect(kinds=(2,))), "by position"),
        (lambda: get_policy("ladder", budget=24), "tensors alone"),
        (lambda: get_policy("lagkv", budget=24), "tensors alone"),
        (lambda: get_policy("kvzap", budget=200, scorer="somewhere/else"), "tensors alone"),
        (lambda: "knorm", "must be a Policy"),
    ],
)
def test_policies_that_are_refused(chosen: Callable[[], Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words) as caught:
        StaticSieveCache(models.managed("llama"), chosen())
    assert "SieveCache" in str(caught.value) or words == "must be a Policy"


def test_other_refusals() -> None:
    model = models.managed("llama")
    with pytest.raises(PolicyError, match="use SieveCache"):
        StaticSieveCache(model, policy("knorm"), positions="slot")
    with pytest.raises(UnsupportedModelError, match="use SieveCache"):
        StaticSieveCache(models.build("gemma3"), policy("knorm"))
    with pytest.raises(BudgetError):
        get_policy("h2o", budget=8)
    cache = StaticSieveCache(model, policy("knorm"))
    with pytest.raises(UnsupportedOperationError, match="segments"):
        cache.label(segment=1)
    ids = models.words(2, 12)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        mask = torch.ones(2, 13, dtype=torch.long)
        mask[0, -1] = 0
        with pytest.raises(UnsupportedOperationError, match="padding in prompts only"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedOperationError, match="mask"):
            model(ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 13), past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedOperationError, match="2 sequences"):
            model(ids[:1, :1], past_key_values=cache)
        cache.reset()
        mask = torch.ones_like(ids)
        mask[0, 3] = 0
        with pytest.raises(UnsupportedOperationError, match="left only"):
            model(ids, attention_mask=mask, past_key_values=cache)
