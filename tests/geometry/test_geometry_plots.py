"""Pictures are pictures: of the right kind, not empty, and drawn for a single frame too."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kvsieve.errors import DataError, KvsieveError
from kvsieve.geometry.export import colourise
from kvsieve.geometry.plots import depth_strip, growth, quality_against_budget, tokens_over_frames, trajectory


def pixels(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def colours(png):
    """The colours of a picture as the numbers 0xRRGGBB."""
    red, green, blue = np.moveaxis(pixels(png).astype(np.uint32), -1, 0)
    return set(np.unique(red << 16 | green << 8 | blue).tolist())


def has_colour(png, colour):
    return int(colour[1:], 16) in colours(png)


def path(frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(frames, 3, 1, generator=generator).cumsum(0)
    return torch.cat([torch.eye(3).repeat(frames, 1, 1), shift], dim=2)


def counts(frames, layers=4):
    return [[10 * (frame + 1) + layer for layer in range(layers)] for frame in range(frames)]


ROWS = [
    {"method": "full", "held": 1.0, "value": 0.1},
    {"method": "random", "held": 0.5, "value": 0.3, "label": "random 50 %"},
    {"method": "random", "held": 0.25, "value": 0.5},
    {"method": "evict3r", "held": 0.5, "value": 0.3},
]


@pytest.mark.parametrize("frames", [1, 40])
def test_every_picture_shows_both_runs(frames):
    images = torch.rand(frames, 3, 14, 28, generator=torch.Generator().manual_seed(0))
    depth = torch.rand(frames, 14, 28, generator=torch.Generator().manual_seed(1)) + 0.5
    series = {name: {"bytes": [2**20 * (i + 1) for i in range(frames)], "seconds": [0.1] * frames} for name in "ab"}
    draw = {
        "tokens": lambda: tokens_over_frames({"full": counts(frames), "half": [[6] * 4] * frames}),
        "path": lambda: trajectory({"full": path(frames), "half": path(frames, 1)}),
        "truth": lambda: trajectory({"full": path(frames), "half": path(frames, 1)}, truth=path(frames, 2)),
        "growth": lambda: growth(series),
        "depth": lambda: depth_strip(images, {"full": depth, "truth": depth}),
    }
    for name, picture in draw.items():
        png = picture()
        assert len(colours(png)) > 20, name
        if name != "depth":
            assert has_colour(png, "#0072B2"), name
            assert has_colour(png, "#D55E00"), name


def test_many_runs_are_drawn_the_same_again():
    runs = {f"run {seed}": path(4, seed) for seed in range(9)}
    assert trajectory(runs) == trajectory(runs)


def test_cameras_in_one_place_are_drawn():
    still = torch.eye(3, 4).repeat(5, 1, 1)
    assert has_colour(trajectory({"still": still}, truth=path(5)), "#0072B2")


def test_a_path_in_another_world_looks_the_same():
    here = path(6).double()
    scaled = here.clone()
    scaled[:, :, 3] *= 3
    alike = (pixels(trajectory({"a": other}, truth=here)).astype(int) for other in (here, scaled))
    difference = np.abs(next(alike) - next(alike))
    assert (difference.max(axis=-1) > 40).mean() < 1e-3


def test_depth_has_one_scale_of_colours_that_of_the_truth():
    images = torch.zeros(2, 3, 14, 14)
    truth = torch.linspace(1, 2, 2 * 14 * 14).view(2, 14, 14)
    far = torch.full((2, 28, 28), 50.0)
    png = depth_strip(images, {"run": far, "truth": truth}, frames=[0, -1])
    first, last = ("#" + bytes(colour.tolist()).hex() for colour in colourise(torch.tensor([1.0, 2.0]), (1.0, 2.0)))
    assert has_colour(png, first)
    assert has_colour(png, last)
    assert depth_strip(images, {"run": far, "truth": truth}, frames=[0, 1], numbers=[0, 1]) == png
    assert depth_strip(images, {"run": far, "truth": truth}, frames=[0, 1], numbers=[0, 70]) != png


def test_quality_shows_methods_and_the_full_cache():
    png = quality_against_budget(ROWS)
    assert has_colour(png, "#0072B2")
    assert has_colour(png, "#D55E00")
    nothing = [{"method": "nan", "held": 0.5, "value": value} for value in (math.inf, math.nan)]
    for rows in (ROWS[:1], ROWS[1:2], nothing):
        pixels(quality_against_budget(rows, ylabel="distance to the full cache"))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: tokens_over_frames({}), "no run"),
        (lambda: tokens_over_frames({"a": []}), "one count per layer"),
        (lambda: tokens_over_frames({"a": [[1, 2], [1]]}), r"\[1, 2\]"),
        (lambda: trajectory({}), "no run"),
        (lambda: trajectory({"a": path(3), "b": path(2)}), "'b' has 2 cameras"),
        (lambda: trajectory({"a": path(3)[0]}), r"\[S, 3, 4\]"),
        (lambda: growth({}), "no run"),
        (lambda: growth({"a": {"bytes": [1]}}), "no 'seconds'"),
        (lambda: quality_against_budget([]), "no row"),
        (lambda: quality_against_budget([{"method": "a", "held": 1}]), "lacks value"),
        (lambda: depth_strip(torch.zeros(2, 3, 4, 4), {}), "no depth"),
        (lambda: depth_strip(torch.zeros(3, 4, 4), {"a": torch.ones(2, 4, 4)}), r"\[S, 3, H, W\]"),
        (lambda: depth_strip(torch.zeros(2, 3, 4, 4), {"a": torch.ones(1, 4, 4)}), "with 2 frames"),
        (lambda: depth_strip(torch.zeros(2, 3, 4, 4), {"a": torch.ones(2, 4, 4)}, frames=[2]), "0 to 1"),
        (lambda: depth_strip(torch.zeros(2, 3, 4, 4), {"a": torch.zeros(2, 4, 4)}), "no depth is valid"),
        (lambda: depth_strip(torch.zeros(2, 3, 4, 4), {"a": torch.ones(2, 4, 4)}, None, [5]), "1 numbers"),
    ],
)
def test_nothing_to_draw_is_said(draw, message):
    with pytest.raises(DataError, match=message):
        draw()


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KvsieveError, match=r"pip install 'kvsieve\[geometry\]'"):
        growth({"a": {"bytes": [1], "seconds": [1]}})
