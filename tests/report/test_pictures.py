"""Pictures of traces and results: numbers against a naive twin, and what the pictures say."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from kvsieve.errors import DataError, KvsieveError
from kvsieve.report.picture_data import bin_edges, binned, held_over_time, layer_shares, lifetimes
from kvsieve.report.picture_results import depth_by_length, layer_survival, quality_against_bytes, survival_by_layer
from kvsieve.report.pictures import layers_by_positions, lifetime, save, to_svg
from kvsieve.trace import Trace


def make(tokens: int = 103, **about) -> Trace:
    """Three layers of two heads that let tokens go at random, read in uneven passes."""
    rng = np.random.default_rng(1)
    seen = np.array([10, 40, 41, 80, tokens], dtype=np.int32)
    arrived = np.searchsorted(seen, np.arange(tokens), side="right")
    steps = arrived + rng.integers(0, 4, size=(3, 2, tokens))
    left = np.where(steps < len(seen), seen[np.minimum(steps, len(seen) - 1)], 0).astype(np.int32)
    return Trace(left, seen, (0, 1, 7), {"method": "snapkv", "budget": "0.25", **about})


def images(figure) -> list[np.ndarray]:
    return [np.ma.filled(one.get_array(), np.nan) for axes in figure.axes for one in axes.images]


def texts(figure) -> str:
    return " | ".join(
        "".join(one.itertext()).strip() for one in ElementTree.fromstring(to_svg(figure)).iter() if "text" in one.tag
    )


@pytest.mark.parametrize("bins", [1, 7, 103, 500])
def test_lifetimes_are_what_the_trace_says(bins):
    trace = make()
    edges, table = bin_edges(trace.tokens, bins), lifetimes(trace, bins)
    assert table.shape == (min(bins, 103), 5)
    for k, seen in enumerate(trace.seen):
        for b, (first, end) in enumerate(pairwise(edges)):
            read = trace.share(int(seen))[first : min(end, seen)]
            assert table[b, k] == pytest.approx(read.mean() if read.size else np.nan, nan_ok=True)


def test_share_over_time_is_what_the_trace_says():
    trace = make()
    whole, some = held_over_time(trace), held_over_time(trace, np.array([50, 42, 9]))
    for k, seen in enumerate(trace.seen):
        share = trace.share(int(seen))
        assert whole[k] == pytest.approx(share[:seen].mean())
        assert some[k] == pytest.approx(share[[i for i in (9, 42, 50) if i < seen]].mean())
    assert np.isnan(held_over_time(trace, np.array([90]))[:4]).all()


@pytest.mark.parametrize("bins", [1, 10, 64, 80])
def test_bins_weigh_every_token_alike(bins):
    shares = layer_shares(make(), 80)
    edges = bin_edges(80, bins)
    naive = np.stack([shares[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)
    np.testing.assert_allclose(binned(shares, bins), naive)
    assert np.diff(edges).max() - np.diff(edges).min() <= 1
    with pytest.raises(DataError, match="bins must be 1 or more, not 0"):
        binned(shares, 0)


def test_layers_by_positions_shows_the_shares_and_the_boundaries():
    trace = make(answers=[[42, 44]], question=70, asked=80)
    figure = layers_by_positions(trace, sink_tokens=4, recent_tokens=20)
    axes, (picture, *_) = figure.axes[0], images(figure)
    np.testing.assert_allclose(picture, trace.held(80)[..., :80].mean(axis=1))
    assert axes.images[0].origin == "lower"
    assert axes.images[0].get_extent() == [0, 80, -0.5, 2.5]
    lines = {line.get_xdata()[0]: line for line in axes.lines}
    assert {x: line.get_color() for x, line in lines.items()} == {4: "#E74C3C", 60: "#2ECC71"}
    assert lines[4].get_linestyle() != "-" != lines[60].get_linestyle()
    assert lines[4]._dash_pattern != lines[60]._dash_pattern
    held = int(trace.held(80)[..., 42:44].all(axis=-1).sum())
    said = texts(figure)
    for part in ("sink: first 4", "recent: last 20", f"answer ({held}/6 heads)", "question", "snapkv 0.25", "7"):
        assert part in said
    assert not layers_by_positions(trace, 41).axes[0].lines
    for wrong in ({"seen": 104}, {"sink_tokens": -1}, {"bins": 0}):
        with pytest.raises(DataError):
            layers_by_positions(trace, **wrong)


def test_lifetime_shows_recorded_steps_only():
    trace = make(answers=[[42, 44]], question=70, asked=80)
    figure = lifetime(trace)
    picture = next(one for one in images(figure) if one.shape == (103, 103))
    for column in range(103):
        seen = int(next(s for s in trace.seen if s > column))
        share = trace.share(seen)
        share[seen:] = np.nan
        np.testing.assert_allclose(picture[:, column], share)
    said = texts(figure)
    assert "the answer" in said
    assert "the question begins" in said
    assert "the answer" not in texts(lifetime(make()))


def test_same_picture_same_bytes(tmp_path):
    first, second = (save(lifetime(make()), tmp_path / name) for name in ("a.svg", "deep/b.svg"))
    assert first.read_bytes() == second.read_bytes()
    svg = first.read_text(encoding="utf-8")
    assert "dc:date" not in svg
    assert "<text" in svg
    png = [save(layers_by_positions(make()), tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert png[0] == png[1]
    assert png[0].startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"\.svg or \.png, not as a\.pdf"):
        save(lifetime(make()), tmp_path / "a.pdf")
    assert not list(tmp_path.rglob("*.part"))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KvsieveError, match=r"pip install 'kvsieve\[plot\]'"):
        lifetime(make())


def result(method: str, length: int, score: float, survival: float | None, **other):
    cells = [
        {"depth": 0.0, "score": score, "survival": survival, "samples": 1},
        {"depth": 0.5, "score": 100.0, "survival": None, "samples": 3},
    ]
    held = None if survival is None else {"answerable": 4, "share": survival, "by_layer": [survival, 1.0]}
    return {"method": method, "task": "t", "length": length, "by_depth": cells, "survival": held} | other


@pytest.fixture
def summary():
    overall = [
        {"method": "full", "score": 90.0, "interval": [80.0, 95.0], "bytes_held": 1000, "bytes_full": 1000},
        {"method": "snapkv", "score": 40.0, "interval": [30.0, 55.0], "bytes_held": 250, "bytes_full": 1000},
        {"method": "broken", "score": None, "interval": None, "bytes_held": 0, "bytes_full": 1000},
    ]
    results = [
        result("full", 512, 90.0, 1.0), result("full", 1024, 80.0, 1.0), result("snapkv", 512, 20.0, 0.25),
        result("snapkv", 1024, 10.0, 0.0), result("snapkv", 1024, 40.0, 0.0, task="u"),
    ]  # fmt: skip
    return {"run": {"model": "mini-lm"}, "overall": overall, "results": results}


def test_quality_against_bytes(summary):
    figure = quality_against_bytes(summary)
    axes = figure.axes[0]
    points = [
        tuple(one.get_offsets()[0])
        for one in axes.collections
        if len(one.get_offsets()) and hasattr(one, "get_sizes") and len(one.get_sizes())
    ]
    assert sorted(points) == [(25.0, 40.0), (100.0, 90.0)]
    bars = [one.get_segments()[0] for one in axes.collections if hasattr(one, "get_segments")]
    assert sorted((x, low, high) for (x, low), (_, high) in bars) == [(25.0, 30.0, 55.0), (100.0, 80.0, 95.0)]
    assert [line.get_ydata()[0] for line in axes.lines] == [90.0]
    assert "snapkv" in texts(figure)
    assert "broken" not in texts(figure)
    with pytest.raises(DataError, match="no method has a score"):
        quality_against_bytes(summary | {"overall": summary["overall"][2:]})


def test_depth_by_length_tells_lost_from_ignored(summary):
    figure = depth_by_length(summary)
    first, second, *_ = images(figure)
    np.testing.assert_allclose(first, [[90, 80], [100, 100]])
    np.testing.assert_allclose(second, [[20, 25], [100, 100]])
    patches = figure.axes[1].patches
    hatched = [one for one in patches if one.get_hatch()]
    assert [(one.get_x(), one.get_y()) for one in hatched] == [(0.5, -0.5)]
    bars = [one.get_width() / 0.88 for one in patches if not one.get_hatch()]
    assert bars == pytest.approx([1, 0.25])
    assert "snapkv" not in texts(depth_by_length(summary, "full"))
    np.testing.assert_allclose(images(depth_by_length(summary, ["snapkv"], task="u"))[0], [[40], [100]])
    for wrong in ("tova", ["full", "tova"]):
        with pytest.raises(DataError, match="no results by depth for tova"):
            depth_by_length(summary, wrong)


def test_survival_by_layer(summary):
    names, shares = layer_survival(summary)
    assert names == ["full", "snapkv"]
    np.testing.assert_allclose(shares, [[1, 1], [0.25 / 3, 1]])
    figure = survival_by_layer(summary)
    np.testing.assert_allclose(images(figure)[0], shares)
    assert re.search(r"\b8\b.*\b100\b", texts(figure))
    with pytest.raises(DataError, match="did not record which tokens survived"):
        survival_by_layer(summary | {"results": [result("full", 512, 1.0, None)]})
    odd = result("full", 512, 1.0, 1.0)
    odd["survival"]["by_layer"] = [1.0]
    with pytest.raises(DataError, match="different numbers of layers"):
        survival_by_layer(summary | {"results": [*summary["results"], odd]})


def test_points_at_one_memory_stand_side_by_side():
    from kvsieve.report.picture_results import _GAP, _side_by_side

    assert _side_by_side([25.0, 100.0, 25.1, 24.9]) == pytest.approx([25.0, 100.0, 25.1 + _GAP, 24.9 - _GAP])
    assert _side_by_side([10.0, 50.0]) == [10.0, 50.0]
    assert _side_by_side([]) == []
