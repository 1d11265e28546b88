"""What is written can be read back, by parsers written here from the formats."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from kvsieve.errors import DataError, PolicyError
from kvsieve.geometry.export import (
    SCALE_KEY,
    colourise,
    point_cloud,
    write_depth_png,
    write_glb,
    write_ply,
    write_raw_depth_png,
)


def read_ply(path):
    """Points and colours of a binary little-endian PLY, by its own header."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    types = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], types[line.split()[1]]) for line in lines if line.startswith("property")]
    table = np.frombuffer(body, dtype=np.dtype(fields))
    assert len(table) == count
    columns = [np.stack([table[name] for name in names], 1) for names in ("xyz", ("red", "green", "blue"))]
    return [torch.from_numpy(column) for column in columns]


def read_glb(path):
    """The JSON document and the accessors' arrays of a GLB."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    chunks, at = {}, 12
    while at < length:
        size, kind = struct.unpack_from("<I4s", data, at)
        assert size % 4 == 0
        chunks[kind] = data[at + 8 : at + 8 + size]
        at += 8 + size
    document = json.loads(chunks[b"JSON"])
    assert document["buffers"][0]["byteLength"] <= len(chunks[b"BIN\0"])
    arrays = []
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        kind = {5126: "<f4", 5123: "<u2"}[accessor["componentType"]]
        part = chunks[b"BIN\0"][view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        arrays.append(np.frombuffer(part, dtype=kind).reshape(accessor["count"], int(accessor["type"][3])))
    return document, arrays


def test_colours_go_from_dark_to_light_evenly():
    ramp = colourise(torch.linspace(1, 2, 64), (1.0, 2.0)) / 255.0
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    steps = np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() < 2 * steps.mean()
    assert lightness[-1] - lightness[0] > 70


def test_invalid_depth_is_grey_and_limits_clamp():
    depth = torch.tensor([[0.5, 1.0, 3.0], [9.0, 0.0, torch.nan], [-1.0, torch.inf, 2.0]])
    colours = colourise(depth, (1.0, 3.0))
    assert (colours[0, 0] == colours[0, 1]).all()
    assert (colours[0, 2] == colours[1, 0]).all()
    for row, column in ((1, 1), (1, 2), (2, 0), (2, 1)):
        assert colours[row, column].tolist() == [128, 128, 128]


def test_coloured_depth_is_written(tmp_path):
    depth = torch.linspace(1, 5, 12 * 16).view(12, 16)
    low, high = write_depth_png(tmp_path / "new" / "depth.png", depth)
    assert 1 < low < 1.2 < 4.8 < high < 5
    with Image.open(tmp_path / "new" / "depth.png") as picture:
        assert picture.size == (16, 12)
        assert (np.asarray(picture) == colourise(depth, (low, high))).all()
    assert write_depth_png(str(tmp_path / "again.png"), depth, (0.0, 9.0)) == (0.0, 9.0)
    low, high = write_depth_png(tmp_path / "flat.png", torch.ones(2, 2))
    assert low < high


@pytest.mark.parametrize(("largest", "scale"), [(5.0, 1000), (65.535, 1000), (100.0, 655.35), (1e-3, 1000)])
def test_raw_depth_reads_back(tmp_path, largest, scale):
    depth = torch.linspace(0, largest, 20, dtype=torch.float64).view(4, 5)
    depth[0, 1], depth[0, 2], depth[0, 3] = torch.nan, -1, torch.inf
    assert write_raw_depth_png(tmp_path / "raw.png", depth) == pytest.approx(scale)
    with Image.open(tmp_path / "raw.png") as picture:
        values = np.asarray(picture)
        assert float(picture.text[SCALE_KEY]) == pytest.approx(scale)
    assert values.dtype == np.uint16
    assert (values[0, :4] == 0).all()
    expected = depth.flatten()[4:].numpy()
    assert np.abs(values.flatten()[4:] / scale - expected).max() <= 0.5 / scale + 1e-6


def test_raw_depth_keeps_a_given_scale_or_says_why_not(tmp_path):
    depth = torch.full((2, 2), 2.0)
    assert write_raw_depth_png(tmp_path / "a.png", depth, scale=20_000) == 20_000
    with pytest.raises(DataError, match=r"at most 32767\.5"):
        write_raw_depth_png(tmp_path / "a.png", depth, scale=1e5)
    for bad in (0, -1, float("nan")):
        with pytest.raises(PolicyError, match="above 0"):
            write_raw_depth_png(tmp_path / "a.png", depth, scale=bad)
    assert write_raw_depth_png(tmp_path / "b.png", torch.zeros(2, 2)) == 1000


def test_bad_depth_is_refused(tmp_path):
    for write in (write_depth_png, write_raw_depth_png):
        with pytest.raises(DataError, match=r"one map \[H, W\]"):
            write(tmp_path / "a.png", torch.ones(1, 2, 2))
    with pytest.raises(DataError, match="no depth is valid"):
        write_depth_png(tmp_path / "a.png", torch.zeros(2, 2))
    with pytest.raises(PolicyError, match="first below the second"):
        write_depth_png(tmp_path / "a.png", torch.ones(2, 2), (2.0, 1.0))


@pytest.fixture
def cloud():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(11, 3, generator=generator), torch.randint(0, 256, (11, 3), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_ply_reads_back(tmp_path, cloud, count):
    points, colours = (part[:count] for part in cloud)
    write_ply(tmp_path / "new" / "cloud.ply", points, colours)
    got_points, got_colours = read_ply(tmp_path / "new" / "cloud.ply")
    assert torch.equal(got_points, points)
    assert torch.equal(got_colours, colours)


@pytest.mark.parametrize("count", [1, 11])
def test_glb_reads_back_with_y_up(tmp_path, cloud, count):
    points, colours = (part[:count] for part in cloud)
    write_glb(tmp_path / "new" / "cloud.glb", points.double(), colours)
    document, (places, light) = read_glb(tmp_path / "new" / "cloud.glb")
    primitive = document["meshes"][0]["primitives"][0]
    assert primitive["mode"] == 0, "points"
    assert primitive["attributes"] == {"POSITION": 0, "COLOR_0": 1}
    assert (places == points.numpy() * np.array([1, -1, -1])).all()
    assert document["accessors"][0]["min"] == places.min(0).tolist()
    assert document["accessors"][0]["max"] == places.max(0).tolist()
    assert (light[:, 3] == 65535).all()
    value = light[:, :3] / 65535
    srgb = np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055) * 255
    assert (np.rint(srgb) == colours.numpy()).all()


def test_glb_is_read_by_trimesh(tmp_path, cloud):
    trimesh = pytest.importorskip("trimesh")
    write_glb(tmp_path / "cloud.glb", *cloud)
    scene = trimesh.load(tmp_path / "cloud.glb")
    (shape,) = scene.geometry.values()
    assert np.allclose(shape.vertices, cloud[0].numpy() * np.array([1, -1, -1]))
    write_ply(tmp_path / "cloud.ply", *cloud)
    shape = trimesh.load(tmp_path / "cloud.ply")
    assert np.allclose(shape.vertices, cloud[0])
    assert (np.asarray(shape.colors)[:, :3] == cloud[1].numpy()).all()


def test_bad_clouds_are_refused(tmp_path, cloud):
    points, colours = cloud
    for write in (write_ply, write_glb):
        with pytest.raises(DataError, match="are needed"):
            write(tmp_path / "a", points, colours.float())
        with pytest.raises(DataError, match="are needed"):
            write(tmp_path / "a", points[:3], colours)
        with pytest.raises(DataError, match="1 of 11 points"):
            write(tmp_path / "a", torch.where(torch.arange(11)[:, None] == 4, torch.nan, points), colours)
        with pytest.raises(DataError, match="11 of 11 points"):
            write(tmp_path / "a", torch.full((11, 3), 1e300, dtype=torch.float64), colours)
    with pytest.raises(DataError, match="at least one point"):
        write_glb(tmp_path / "a", points[:0], colours[:0])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return {
        "world_points": torch.randn(2, 4, 5, 3, generator=generator),
        "world_points_conf": 1 + torch.randperm(40, generator=generator).view(2, 4, 5).float(),
        "images": torch.rand(2, 3, 4, 5, generator=generator),
        "pose_enc": torch.zeros(2, 9),
    }


def naive_cloud(predictions, bound):
    points, colours = [], []
    for s in range(2):
        for y in range(4):
            for x in range(5):
                if predictions["world_points_conf"][s, y, x] >= bound:
                    points.append(predictions["world_points"][s, y, x])
                    colours.append((predictions["images"][s, :, y, x] * 255).round().to(torch.uint8))
    return torch.stack(points), torch.stack(colours)


def test_a_cloud_is_the_confident_pixels_with_their_colours(predictions):
    points, colours = point_cloud(predictions)
    expected_points, expected_colours = naive_cloud(predictions, 12.7)  # 30 % of the way from 1 to 40
    assert len(points) == 28
    assert torch.equal(points, expected_points)
    assert torch.equal(colours, expected_colours)
    everything, _ = point_cloud(predictions, conf_percentile=0)
    assert len(everything) == 40


def test_a_large_cloud_is_thinned_by_the_seed(predictions):
    whole = {tuple(point) for point in point_cloud(predictions)[0].tolist()}
    first, again, other = (point_cloud(predictions, max_points=6, seed=seed)[0] for seed in (0, 0, 1))
    assert first.shape == (6, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert {tuple(point) for point in first.tolist()} < whole


def test_points_that_are_not_finite_are_left_out(predictions):
    predictions["world_points"][0, 0, 0, 1] = torch.nan
    predictions["world_points_conf"][1, 2, 3] = torch.inf
    points, _ = point_cloud(predictions, conf_percentile=0)
    assert len(points) == 38
    assert points.isfinite().all()
    predictions["world_points"][:] = torch.nan
    with pytest.raises(DataError, match="none of 40 points"):
        point_cloud(predictions)


def test_equal_confidence_keeps_everything(predictions):
    predictions["world_points_conf"][:] = 1
    assert len(point_cloud(predictions, conf_percentile=90)[0]) == 40


def test_bad_predictions_are_refused(predictions):
    with pytest.raises(DataError, match="lack world_points_conf"):
        point_cloud({name: value for name, value in predictions.items() if name != "world_points_conf"})
    with pytest.raises(DataError, match="one sequence of a batch"):
        point_cloud({name: value[None] for name, value in predictions.items()})
    with pytest.raises(DataError, match="as the points"):
        point_cloud(predictions | {"images": torch.zeros(2, 4, 5, 3)})
    with pytest.raises(PolicyError, match="conf_percentile=100"):
        point_cloud(predictions, conf_percentile=100)
    with pytest.raises(PolicyError, match="max_points=0"):
        point_cloud(predictions, max_points=0)
