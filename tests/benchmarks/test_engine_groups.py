"""The groups of `benchmarks/engine.py` at toy size: they run, they compare like with like, their probes see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvsieve import SieveCache, get_policy
from kvsieve.ledger import VALUE

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import bench as bench_module
from engine import compiled, decode, evict, fill, gpu, holds, likelihood, memory, models, resident, stream
from engine.bench import Bench
from engine.models import Size
from engine.peer import Peer
from engine.timing import Clock

TOY = Size(layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=97)
FLOAT = torch.float32


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(models, "QUICK", {"S": TOY, "M": TOY})
    monkeypatch.setattr(bench_module, "SHRINK", 32)
    made = Bench(True, 1, 1, "cpu", Peer(tmp_path), stream=200, long_stream=3200)
    yield made
    made.peer.close()


def test_both_caches_get_the_same_and_go_on_alike() -> None:
    stock = models.build(TOY)
    managed = models.twin(stock)
    assert all(a is b for a, b in zip(stock.parameters(), managed.parameters(), strict=True))
    mine, theirs = SieveCache(managed, get_policy("full")), DynamicCache(config=stock.config)
    fill.fill_sieve(mine, TOY, 50, FLOAT, chunk=20)
    fill.fill_stock(theirs, TOY, 50, FLOAT)
    assert stock.config._attn_implementation == "sdpa"  # the twin's switch did not touch it
    for core, layer in zip((x.core for x in mine.managed), theirs.layers, strict=True):
        assert torch.equal(core.store.read("key"), layer.keys)
        assert torch.equal(core.store.read("value"), layer.values)
    ids = torch.tensor([[5]])
    with torch.no_grad():
        logits = [m(ids, past_key_values=c).logits for m, c in ((managed, mine), (stock, theirs))]
    torch.testing.assert_close(*logits)
    assert mine.get_seq_length() == theirs.get_seq_length() == 51


@pytest.mark.parametrize("name", ["knorm", "snapkv", "adakv_snapkv", "kvzap"])
def test_filled_caches_are_reduced_and_can_decode(name: str) -> None:
    model = models.build(TOY)
    cache = SieveCache(model, fill.removing(name, TOY, 0.75))
    fill.fill_sieve(cache, TOY, 400, FLOAT)
    slack = 0.75 * 128 / 400 + 0.1 if name == "kvzap" else 0.001  # the window stays whatever the threshold
    assert sum(fill.held(cache)) / 2 / 400 == pytest.approx(0.25, abs=slack)
    fill.steps(model, cache, 2)
    assert cache.get_seq_length() == 402


def test_a_cache_filled_in_chunks_is_at_its_budget() -> None:
    cache = decode.full_to(models.build(TOY), TOY, get_policy("h2o", budget=64), 256, FLOAT)
    assert list(fill.held(cache)) == [64.0, 64.0]
    assert cache.get_seq_length() == 256


@pytest.mark.parametrize("name", ["knorm", "adakv_snapkv"])
def test_the_probe_sees_nothing_evicted_and_would_see_it(name: str) -> None:
    model, ids = models.build(TOY), models.token_ids(TOY, 96)
    policy = fill.removing(name, TOY, 0.5)

    def cache() -> SieveCache:
        made = SieveCache(model, policy)
        with torch.no_grad():
            model(ids[:, :90], past_key_values=made)
        return made

    assert holds.evicted_mass(model, cache(), ids[:, 90:]) == 0.0
    broken = cache()
    before = holds.mark_what_is_not_held

    def leave_one(store: object) -> None:
        before(store)
        store.columns[VALUE].view(-1, TOY.head_dim)[3] = 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holds, "mark_what_is_not_held", leave_one)
        assert holds.evicted_mass(model, broken, ids[:, 90:]) > 1e-4
    weights = [layer.self_attn.v_proj.weight for layer in model.model.layers]
    assert all(bool(weight.any()) for weight in weights)  # put back


def test_layer_case_evicts_what_a_model_would() -> None:
    case = evict.layer_case(TOY, "snapkv", 200)
    case.store()
    assert case.cache.managed[0].core.store.longest == 200
    case.evict()
    kept = case.cache.kept_positions(0)
    assert kept.shape == (1, 2, 100)
    case.store()
    case.evict()
    assert torch.equal(case.cache.kept_positions(0), kept)


def test_rise_sees_what_comes_and_goes() -> None:
    size = 64 << 20

    def come_and_go() -> None:
        torch.ones(size // 4)

    passing = resident.rise(come_and_go)
    staying = resident.rise(lambda: torch.ones(size // 4))
    assert passing["peak"] == pytest.approx(size, rel=0.25)
    assert passing["stays"] < size / 4
    assert staying["stays"] == pytest.approx(size, rel=0.25)


@pytest.mark.parametrize("method", ["plain", "h2o"])
def test_memory_cases_can_be_prepared(method: str) -> None:
    assert memory.prefill(TOY, method, 64)() is not None
    assert memory.evict(TOY, "knorm", 64)() is not None


def test_decode_groups_run(bench: Bench) -> None:
    for group in (decode.plain, decode.every_step, decode.long, decode.ragged):
        group(bench)
    targets = {line.target for line in bench.lines}
    assert {0.70, 0.45, 0.25, 1.15, 0.13, 0.06, 0.60, 0.50} <= targets
    measured = [line for line in bench.lines if not line.what.startswith("peer:")]
    assert len(measured) == 3 + 2 + 2 + 4
    assert all(line.value is not None and line.value > 0 for line in measured)
    without = [line for line in bench.lines if line.section == "ragged"]
    assert all("no peer environment" in line.notes for line in without)


def test_compiling_is_counted(bench: Bench) -> None:
    compiled.measure(bench, "Llama", "eager")
    graphs, breaks, differing, ratio = bench.lines
    assert (graphs.value, breaks.value, differing.value) == (1, 0, 0)
    assert {line.status for line in (graphs, breaks, differing)} == {"met"}
    assert ratio.value is not None
    assert ratio.value > 0


def test_likelihood_runs(bench: Bench) -> None:
    likelihood.likelihood(bench)
    assert {line.target for line in bench.lines} == {1.5, 2.0, None}


def test_stream_is_measured_in_parts(bench: Bench) -> None:
    stream.stream(bench)
    assert [line.target for line in bench.lines] == 2 * [1.1, 1.02, 1.0]
    assert [bench.lines[i].value for i in (2, 5)] == [1.0, 1.0]
    bench.stream = 10
    with pytest.raises(ValueError, match="too short"):
        stream.stream(bench)


def test_gpu_says_that_there_is_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.gpu(bench)
    assert {line.status for line in bench.lines} == {"not measured"}
    assert {line.reason for line in bench.lines} == {"no GPU"}


def test_gpu_group_runs_on_any_device(bench: Bench) -> None:
    gpu.measure(bench, TOY, "cpu", Clock("wall"), [256, 512], batch=2)
    assert sorted(line.target for line in bench.lines if line.target) == [1.6, 2.0]
    assert all(line.value is not None and line.value > 0 for line in bench.lines)


def test_sizes_survive_json() -> None:
    assert Size(**asdict(models.SIZES["M"])) == models.SIZES["M"]
    assert models.SIZES["M"].bytes_per_token(FLOAT) == 1024
