"""Streams: what eviction may never do, exactness of what it does, and what goes in and out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import DEPTH, TOKENS, frames, stream, tiny
from torch import Tensor

from kvsieve import BudgetError, DataError, PolicyError, UnsupportedOperationError, get_policy
from kvsieve.geometry import StreamSession, plan
from kvsieve.geometry.aggregator import SPECIALS
from kvsieve.ledger import KEY, POSITION, VALUE
from kvsieve.shares import water_fill

EVICTING: dict[str, dict[str, Any]] = {
    "frame_attention": {"use_kv_compression": True},
    "frame_attention_max": {"use_kv_compression": True, "importance_aggregation": "max", "eviction_ratio": 0.5},
    "frame_attention_mean": {"use_kv_compression": True, "importance_aggregation": "mean"},
    "layerwise": {"use_layerwise_eviction": True, "num_frames": 10, "budget_ratio": 0.5, "temp": 0.02},
    "layerwise_small": {"use_layerwise_eviction": True, "num_frames": 10, "budget_ratio": 0.34, "temp": 0.02},
    "evict3r": {"policy": get_policy("evict3r", budget=80, temp=0.02)},
    "evict3r_bytes": {"policy": get_policy("evict3r", budget="100kB")},
    "random": {"policy": get_policy("random", budget=80)},
    "recent": {"policy": get_policy("sink_recent", budget=80)},
    "h2o": {"policy": get_policy("h2o", budget=80, window_size=8)},
    "snapkv": {"policy": get_policy("snapkv", budget=80, window_size=8)},
    "ratio": {"policy": get_policy("evict3r", budget=0.6)},
}
EACH = 2 * DEPTH * 32 * 4
"""Bytes of a token's key and value in all layers."""


def kept_by_frame(session: StreamSession, layer: int) -> list[list[set[int]]]:
    """Per head and frame, the places of the tokens held."""
    kept = session.kept_tokens(layer)
    table = []
    for frame, place in zip(kept["frame"][0], kept["place"][0], strict=True):
        table.append([set(place[frame == f].tolist()) for f in range(session.frames)])
    return table


@pytest.mark.parametrize("mode", ["causal", "window"])
@pytest.mark.parametrize("name", EVICTING)
def test_anchor_and_specials_never_leave(name, mode):
    session = StreamSession(tiny(), mode, **EVICTING[name])
    for i, image in enumerate(frames(14)):
        session.forward_stream(image[None])
        recent = session.report()["special_frames"]
        for layer in range(DEPTH):
            for head in kept_by_frame(session, layer):
                assert head[0] == set(range(TOKENS))
                for f, places in enumerate(head):
                    if recent is None or f > i - recent:
                        assert set(range(SPECIALS)) <= places, (layer, f)
                    if mode == "window" and 0 < f <= i - 5:
                        assert places <= set(range(SPECIALS)), "patches outside the window must leave"


@pytest.mark.parametrize("name", ["layerwise", "layerwise_small", "evict3r"])
def test_layer_budgets_add_up(name):
    session = StreamSession(tiny(), **EVICTING[name])
    total = {"layerwise": 105, "layerwise_small": math.floor(0.34 * 210 * 3) / 3, "evict3r": 80}[name] * DEPTH
    spread = set()
    for i, image in enumerate(frames(16)):
        session.forward_stream(image[None])
        sizes = session.tokens_per_layer()
        assert sum(sizes) == min((i + 1) * TOKENS * DEPTH, total)
        spread.add(max(sizes) - min(sizes))
    assert max(spread) > 0, "all layers were treated alike: the shares do nothing"


def test_nothing_changes_at_num_frames():
    session = StreamSession(tiny(), num_frames=6, use_layerwise_eviction=True, budget_ratio=0.7)
    sizes = stream(session, frames(12))
    assert [sum(row) for row in sizes[4:]] == [math.floor(0.7 * 6 * TOKENS * DEPTH)] * 8


def test_reference_has_the_published_cliff():
    session = StreamSession(
        tiny(), num_frames=6, use_layerwise_eviction=True, budget_ratio=0.5, temp=1e6, fidelity="reference"
    )
    sizes = [row[0] for row in stream(session, frames(9))]
    assert sizes[3:] == [63, 63, 84, 105, 126, 147]


@pytest.mark.parametrize(("ratio", "want"), [(0.3, [21, 38, 51, 62, 71, 79, 86]), (0.5, [21, 34, 43, 50, 56])])
def test_frame_attention_removes_a_share_of_what_is_evictable(ratio, want):
    session = StreamSession(tiny(), use_kv_compression=True, eviction_ratio=ratio)
    assert stream(session, frames(len(want))) == [[n] * DEPTH for n in want]


def test_repeated_ratio_settles():
    """After t frames about `16 * (1 - r) / r` patches stay beside the anchor and five specials a frame."""
    session = StreamSession(tiny(), use_kv_compression=True, eviction_ratio=0.5, predictions="last")
    count = 40
    size = stream(session, frames(count))[-1][0]
    assert size - TOKENS - SPECIALS * (count - 1) in range(11, 17)


# ---- exactness


@pytest.mark.parametrize("count", [1, 6])
@torch.no_grad()
def test_a_stream_equals_the_causal_batch(count):
    images = frames(count)
    session = StreamSession(tiny())
    stream(session, images)
    whole = tiny()(images, mode="causal")
    for name, value in session.get_all_predictions().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


class Replay:
    """A memory that forgets nothing and masks what another session says it does not hold."""

    def __init__(self, kept: list[list[Tensor]]) -> None:
        self.kept, self.past, self.frame = kept, {}, -1

    @property
    def empty(self) -> bool:
        return self.frame == 0

    def begin(self, batch: int, count: int, size: tuple[int, int], tokens: int) -> None:
        self.frame += 1

    def finish(self) -> None:
        pass

    def _attend(self, key: Any, mask: Callable[[int], Tensor] | None) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.past.get(key, (k[:, :, :0], v[:, :, :0]))
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            self.past[key] = keys, values
            logits = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                logits = logits.masked_fill(~mask(keys.shape[2])[:, :, None], -math.inf)
            return logits.softmax(-1) @ values

        return attend

    def trunk_attention(self, layer: int) -> Callable[..., Tensor]:
        def seen(n: int) -> Tensor:
            mask = torch.zeros(1, 2, n, dtype=torch.bool)
            mask[..., n - TOKENS :] = True
            if self.frame:
                mask.scatter_(2, self.kept[self.frame - 1][layer], True)
            return mask

        return self._attend(layer, seen)

    def camera_attention(self, round_: int, block: int) -> Callable[..., Tensor]:
        return self._attend((round_, block), None)


@pytest.mark.parametrize("name", ["frame_attention", "layerwise", "evict3r", "random", "h2o"])
@torch.no_grad()
def test_eviction_equals_masking(name):
    """Through slots that are refilled, gathers and growth: attention is over just those keys that are reported."""
    images, kept = frames(10), []
    session = StreamSession(tiny(), camera_policy=get_policy("full"), **EVICTING[name])
    for image in images:
        session.forward_stream(image[None])
        tables = [session.kept_tokens(layer) for layer in range(DEPTH)]
        kept.append([t["frame"] * TOKENS + t["place"] for t in tables])
    assert any(table.shape[-1] < 10 * TOKENS for table in kept[-1])
    memory: Any = Replay(kept)
    rows = [tiny()(image[None], memory=memory) for image in images]
    for key, value in session.get_all_predictions().items():
        torch.testing.assert_close(value, torch.cat([row[key] for row in rows], 1), rtol=1e-4, atol=2e-5)


class Watch:
    """Records the full attention maps of the trunk of a session."""

    def __init__(self, session: StreamSession) -> None:
        self.maps: dict[int, Tensor] = {}
        self.order: dict[int, Tensor] = {}
        inner = session.memory.trunk_attention
        session.memory.trunk_attention = lambda layer: self._watch(session, layer, inner(layer))  # type: ignore

    def _watch(self, session: StreamSession, layer: int, attend: Any) -> Any:
        def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = k
            if session.frames:
                keys = torch.cat([session.aggregator_kv_cache_list[layer][0], k], 2)
            self.maps[layer] = (q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)[0]
            return attend(q, k, v)

        return watched


def test_layerwise_against_a_naive_twin():
    """Cumulative attention, exposure and budgets of layers from full attention maps, token by token in Python."""
    session = StreamSession(tiny(), num_frames=8, use_layerwise_eviction=True, budget_ratio=0.5, temp=0.02)
    watch = Watch(session)
    held: list[dict[tuple[int, int], list[float]]] = [{} for _ in range(DEPTH)]
    evicted = 0
    for f, image in enumerate(frames(8)):
        session.forward_stream(image[None])
        spreads = []
        for layer in range(DEPTH):
            received = watch.maps[layer].mean(0).sum(0)
            spreads.append(float(received.var(correction=0)))
            names = [*sorted(held[layer]), *((f, place) for place in range(TOKENS))]
            assert len(names) == received.numel()
            for name, value in zip(names, received.tolist(), strict=True):
                mass, exposure = held[layer].get(name, [0.0, 0.0])
                held[layer][name] = [mass + value * len(names), exposure + TOKENS]
        alphas = torch.softmax(-torch.tensor(spreads) / 0.02, 0).tolist()
        floors = [sum(f == 0 or place < SPECIALS for f, place in layer) for layer in held]
        counts = water_fill(int(0.5 * 8 * TOKENS * DEPTH), alphas, floors, [len(layer) for layer in held])
        for layer in range(DEPTH):
            open_ = [name for name in held[layer] if name[0] > 0 and name[1] >= SPECIALS]
            open_.sort(key=lambda name: held[layer][name][0] / held[layer][name][1])
            for name in open_[: len(held[layer]) - counts[layer]]:
                del held[layer][name]
                evicted += 1
            for head in kept_by_frame(session, layer):
                assert {(i, p) for i, places in enumerate(head) for p in places} == set(held[layer])
    assert evicted > 50


def test_beyond_num_frames_the_oldest_specials_may_leave():
    """They are protected in as many frames as the stream was said to have; then the oldest make room."""
    session = StreamSession(tiny(), num_frames=6, use_layerwise_eviction=True, budget_ratio=0.4)
    stream(session, frames(30))
    assert session.report()["special_frames"] == 5
    assert sum(session.tokens_per_layer()) == math.floor(0.4 * 6 * TOKENS * DEPTH)


@pytest.mark.parametrize("how", ["sum", "max", "mean"])
def test_frame_attention_against_a_naive_twin(how):
    session = StreamSession(tiny(), use_kv_compression=True, importance_aggregation=how)
    watch = Watch(session)
    held = [[set[tuple[int, int]]() for _ in range(2)] for _ in range(DEPTH)]
    for f, image in enumerate(frames(7)):
        session.forward_stream(image[None])
        for layer in range(DEPTH):
            for head in range(2):
                map_ = watch.maps[layer][head]
                received = {"sum": map_.sum(0), "max": map_.amax(0), "mean": map_.mean(0)}[how].tolist()
                names = [*sorted(held[layer][head]), *((f, place) for place in range(TOKENS))]
                worth = dict(zip(names, received, strict=True))
                open_ = sorted((n for n in names if n[0] > 0 and n[1] >= SPECIALS), key=worth.__getitem__)
                held[layer][head] = set(names) - set(open_[: int(len(open_) * 0.3)])
            for head, places in enumerate(kept_by_frame(session, layer)):
                assert {(i, p) for i, row in enumerate(places) for p in row} == held[layer][head]


def test_frames_at_once_see_each_other_and_keep_their_specials():
    images = frames(6)
    session = StreamSession(tiny(), use_kv_compression=True, eviction_ratio=0.9)
    for pair in images.split(2):
        session.forward_stream(pair)
    for layer in range(DEPTH):
        for head in kept_by_frame(session, layer):
            assert head[0] == set(range(TOKENS))
            assert all(set(range(SPECIALS)) <= places for places in head)
    with torch.no_grad():
        both = tiny()(images[:2], mode="full")
    torch.testing.assert_close(session.predictions["depth"][:, :2], both["depth"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["frame_attention", "h2o", "recent"])
def test_streams_side_by_side_equal_streams_apart(name):
    a, b = frames(7), frames(7, seed=1)
    together = StreamSession(tiny(), **EVICTING[name])
    for pair in zip(a, b, strict=True):
        together.forward_stream(torch.stack(pair)[:, None])
    for row, images in enumerate((a, b)):
        alone = StreamSession(tiny(), **EVICTING[name])
        stream(alone, images)
        for key, value in alone.predictions.items():
            torch.testing.assert_close(together.predictions[key][row : row + 1], value, rtol=1e-3, atol=1e-4)


def test_layers_stay_blocks_with_streams_side_by_side():
    session = StreamSession(tiny(), policy=get_policy("evict3r", budget=80))
    for pair in zip(frames(8), frames(8, seed=1), strict=True):
        session.forward_stream(torch.stack(pair)[:, None])
    held = torch.tensor(list(session.report()["tokens_held"].values()))
    assert held.shape == (DEPTH, 2, 2)
    assert bool((held == held[:, :1, :1]).all())
    assert int(held[:, 0, 0].sum()) == 80 * DEPTH


# ---- memory


@pytest.mark.parametrize("name", ["evict3r", "random", "layerwise"])
def test_bytes_are_constant_once_the_budget_is_full(name):
    session = StreamSession(
        tiny(), predictions="last", camera_policy=get_policy("sink_recent", sink_tokens=1, budget=6), **EVICTING[name]
    )
    seen = []
    for image in frames(24):
        session.forward_stream(image[None])
        report = session.report()
        seen.append((report["bytes_held"], report["camera"]["bytes_held"], report["bytes_predictions"]))
    assert len(set(seen[8:])) == 1
    budget = 105 if name == "layerwise" else 80
    assert seen[-1][0] == (budget + TOKENS) * EACH
    assert report["bytes_spare"] == TOKENS * EACH


@pytest.mark.slow
def test_a_long_stream_stays_where_it_is():
    """Bytes to the byte, and the memory of the process, over 400 frames after 100 to get there."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory of a process is read from /proc")
    session = StreamSession(
        tiny(), policy=get_policy("evict3r", budget=80), predictions="last",
        camera_policy=get_policy("sink_recent", sink_tokens=1, budget=16),
    )  # fmt: skip
    images, held, memory = frames(10), set(), []
    for i in range(500):
        session.forward_stream(images[i % 10][None])
        if i >= 100:
            report = session.report()
            held.add((report["bytes_held"], report["bytes_ledger"], report["camera"]["bytes_held"]))
            memory.append(resident())
    assert len(held) == 1
    assert max(memory[-50:]) <= 1.05 * max(memory[:50])


def test_a_budget_in_bytes_holds_between_frames():
    session = StreamSession(tiny(), policy=get_policy("evict3r", budget="100kB"))
    for image in frames(20):
        session.forward_stream(image[None])
        assert session.report()["bytes_held"] <= 100_000
    assert session.report()["bytes_held"] > 100_000 - EACH * 3


def test_the_camera_head_is_bounded_too(monkeypatch):
    assert plan.CAMERA_FRAMES == 256
    monkeypatch.setattr(plan, "CAMERA_FRAMES", 7)
    session = StreamSession(tiny(), policy=get_policy("random", budget=60))
    stream(session, frames(10))
    held = session.report()["camera"]["tokens_held"]
    assert {n for counts in held.values() for row in counts for n in row} == {7}
    core = session.memory.camera[0]
    assert core.store.read(POSITION)[0, 0].sort().values.tolist() == [0, *range(4, 10)]


def test_reported_bytes_are_those_of_the_storage():
    session = StreamSession(tiny(), policy=get_policy("evict3r", budget=80))
    stream(session, frames(6))
    report = session.report()
    storages = [core.store.columns[name] for core in session.memory.trunk for name in (KEY, VALUE)]
    assert report["bytes_held"] == sum(x.untyped_storage().nbytes() for x in storages)
    assert report["bytes_full"] == 6 * TOKENS * EACH
    assert report["tokens_per_layer"] == session.tokens_per_layer()


# ---- what goes in and out


def test_names_of_the_earlier_session():
    session = StreamSession(tiny(), mode="causal")
    assert session.aggregator_kv_cache_list == [[None, None]] * DEPTH
    assert session.aggregator_kv_cache_depth == DEPTH
    assert (session.camera_head_iterations, session.camera_head_kv_cache_depth) == (4, 1)
    assert session.get_all_predictions() == {}
    out = session.forward_stream(frames(1))
    assert out["depth"].shape == (1, 1, 32, 32, 1)
    out = session.forward_stream(frames(2)[1:])
    assert set(out) == {"pose_enc", "depth", "depth_conf", "world_points", "world_points_conf", "images"}
    assert out["world_points"].shape == (1, 2, 32, 32, 3)
    assert torch.equal(session.get_last_prediction()["depth"], out["depth"][:, -1:])
    assert session.aggregator_kv_cache_list[0][0].shape == (1, 2, 2 * TOKENS, 16)
    assert session.camera_head_kv_cache_list[3][0][1].shape == (1, 2, 2, 32)
    session.clear()
    assert session.frames == 0
    assert session.predictions == {}
    again = session.forward_stream(frames(1))
    torch.testing.assert_close(again["depth"], out["depth"][:, :1])


def test_predictions_that_were_returned_do_not_change():
    session = StreamSession(tiny())
    first = session.forward_stream(frames(1))
    copy_ = {name: value.clone() for name, value in first.items()}
    stream(session, frames(12)[1:])
    assert all(torch.equal(first[name], copy_[name]) for name in first)


def test_where_predictions_go(tmp_path):
    got: list[tuple[int, dict[str, Tensor]]] = []
    everything = StreamSession(tiny())
    handed = StreamSession(tiny(), predictions=lambda i, frame: got.append((i, frame)))
    last, disk = StreamSession(tiny(), predictions="last"), StreamSession(tiny(), predictions=tmp_path / "out")
    for pair in frames(4).split(2):
        for session in (everything, handed, last, disk):
            out = session.forward_stream(pair)
        assert out["depth"].shape[1] == 2
    want = everything.get_all_predictions()["depth"]
    assert [i for i, _ in got] == [0, 1, 2, 3]
    assert torch.equal(torch.cat([frame["depth"] for _, frame in got], 1), want)
    assert torch.equal(last.predictions["depth"], want[:, 2:])
    assert torch.equal(last.get_last_prediction()["depth"], want[:, 3:])
    from safetensors.torch import load_file

    files = sorted((tmp_path / "out").iterdir())
    assert [f.name for f in files] == [f"frame_{i:06d}.safetensors" for i in range(4)]
    assert torch.equal(torch.cat([load_file(f)["depth"] for f in files], 1), want)
    with pytest.raises(UnsupportedOperationError, match="does not keep all"):
        last.get_all_predictions()
    with pytest.raises(PolicyError, match="predictions='some'"):
        StreamSession(tiny(), predictions="some")


@pytest.mark.parametrize("name", ["layerwise", "evict3r", "frame_attention", "h2o", "random"])
@pytest.mark.parametrize("mode", ["causal", "window"])
def test_a_stored_stream_goes_on_where_it_was(name, mode, tmp_path):
    images = frames(10)
    session = StreamSession(tiny(), mode, **EVICTING[name])
    stream(session, images[:6])
    session.save(tmp_path / "stream.safetensors")
    loaded = StreamSession.load(tmp_path / "stream.safetensors", tiny())
    assert (loaded.plan, loaded.frames) == (session.plan, 6)
    assert stream(session, images[6:]) == stream(loaded, images[6:])
    for key, value in session.get_all_predictions().items():
        torch.testing.assert_close(loaded.predictions[key], value, rtol=1e-5, atol=1e-6)
    for layer in range(DEPTH):
        assert kept_by_frame(session, layer) == kept_by_frame(loaded, layer)
    assert session.report()["bytes_held"] == loaded.report()["bytes_held"]


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match="no file"):
        StreamSession.load(tmp_path / "none.safetensors", tiny())
    session = StreamSession(tiny())
    session.save(tmp_path / "empty.safetensors")
    assert StreamSession.load(tmp_path / "empty.safetensors", tiny()).frames == 0
    other = copy.deepcopy(tiny())
    other.config["depth"] = 7
    with pytest.raises(DataError, match=r"other sizes \(depth\)"):
        StreamSession.load(tmp_path / "empty.safetensors", other)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mode": "full"}, PolicyError, "causal, window"),
        ({"mode": "banana"}, PolicyError, "causal, window"),
        ({"num_frames": 0}, PolicyError, "num_frames must be 1 or more"),
        ({"use_layerwise_eviction": True}, BudgetError, "give num_frames"),
        ({"use_layerwise_eviction": True, "num_frames": 9, "budget_ratio": 0.0}, BudgetError, "0.0"),
        ({"use_layerwise_eviction": True, "num_frames": 9, "budget_ratio": -0.5}, BudgetError, "-0.5"),
        ({"use_layerwise_eviction": True, "num_frames": 9, "temp": 0.0}, PolicyError, "temp must be"),
        ({"use_kv_compression": True, "eviction_ratio": 1.0}, BudgetError, "1.0"),
        ({"use_kv_compression": True, "eviction_ratio": -0.1}, BudgetError, "-0.1"),
        ({"use_kv_compression": True, "importance_aggregation": "median"}, PolicyError, "median"),
        ({"fidelity": "exact"}, PolicyError, "guaranteed"),
        ({"fidelity": "reference"}, PolicyError, "use_layerwise_eviction"),
        ({"policy": "evict3r"}, PolicyError, "get_policy"),
        ({"policy": get_policy("expected_attention", budget=80)}, PolicyError, "cannot run in a stream"),
        ({"policy": get_policy("random", budget=80), "use_kv_compression": True}, PolicyError, "either policy="),
        ({"camera_policy": get_policy("evict3r", budget=80)}, PolicyError, "camera_policy"),
        ({"special_frames": 0}, PolicyError, "special_frames"),
    ],
)
def test_settings_that_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        StreamSession(tiny(), **settings)


@pytest.mark.parametrize(
    ("settings", "smallest"),
    [
        ({"policy": get_policy("evict3r", budget=25)}, {"policy": get_policy("evict3r", budget=26)}),
        ({"policy": get_policy("random", budget=21)}, {"policy": get_policy("random", budget=26)}),
        (
            {"policy": get_policy("evict3r", budget=f"{46 * EACH}B")},
            {"policy": get_policy("evict3r", budget=f"{47 * EACH}B")},
        ),
        (
            {"use_layerwise_eviction": True, "num_frames": 10, "budget_ratio": 0.31},
            {"use_layerwise_eviction": True, "num_frames": 10, "budget_ratio": 0.315},
        ),
    ],
)
def test_a_budget_below_what_is_protected_names_the_smallest(settings, smallest):
    session = StreamSession(tiny(), **settings)
    with pytest.raises(BudgetError, match="smallest legal budget here is") as error:
        session.forward_stream(frames(1))
    value = next(iter(smallest.values()))
    named = {"policy": lambda: str(value.budget.n), "use_layerwise_eviction": lambda: "budget_ratio=0.315"}
    assert named[next(iter(settings))]() in str(error.value)
    assert session.frames == 0
    legal = StreamSession(tiny(), **smallest)
    stream(legal, frames(14))


def test_the_newest_tokens_count_too():
    """Those that a method never evicts, beside the first frame and the special tokens."""
    with pytest.raises(BudgetError, match=r"the 24 newest .* is 45 tokens"):
        stream(StreamSession(tiny(), policy=get_policy("h2o", budget=44, window_size=24)), frames(1))
    stream(StreamSession(tiny(), policy=get_policy("h2o", budget=45, window_size=24)), frames(12))


def nan(images: Tensor) -> Tensor:
    images = images.clone()
    images[0, 0, 3, 3] = math.nan
    return images


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: frames(1)[:0], "no |empty"),
        (lambda: nan(frames(1)), "NaN|finite"),
        (lambda: frames(1, (40, 32)), "keep their size"),
        (lambda: frames(1, (33, 32)), "multiple"),
        (lambda: frames(1)[:, :2], "channel"),
        (lambda: frames(1)[0], "shape|rank|dim"),
        (lambda: frames(1) * 255, r"\[0, 1\]"),
        (lambda: frames(2)[:, None], "2 |side by side"),
    ],
)
def test_bad_frames_leave_the_stream_as_it_was(bad, words):
    images = frames(5)
    session, other = StreamSession(tiny(), **EVICTING["evict3r"]), StreamSession(tiny(), **EVICTING["evict3r"])
    stream(session, images[:3])
    with pytest.raises(DataError, match=words):
        session.forward_stream(bad())
    stream(session, images[3:])
    stream(other, images)
    assert all(torch.equal(session.predictions[k], other.predictions[k]) for k in other.predictions)
