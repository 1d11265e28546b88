"""Rendered sequences: the same for the same seed, and depth, points, poses and colours agree with each other."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from kvsieve.geometry.pose import (  # noqa: E402
    decode_pose,
    matrix_to_quaternion,
    pose_encoding,
    quaternion_to_matrix,
)
from kvsieve.geometry.scenes import HELD_OUT, Sequence3D, render_sequence  # noqa: E402


def _unproject(sequence: Sequence3D) -> torch.Tensor:
    """World points from depth and pose, in double precision."""
    height, width = sequence.depth.shape[1:]
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).double()
    rays = torch.einsum("sij,hwj->shwi", sequence.intrinsics.double().inverse(), pixels)
    camera = rays * sequence.depth[..., None].double()
    rotation, translation = sequence.extrinsics.double().split((3, 1), -1)
    return torch.einsum("sji,shwj->shwi", rotation, camera - translation[:, None, None, :, 0])


def _project(sequence: Sequence3D, frame: int, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel coordinates [n, 2] and depth [n] of world points [n, 3] in a frame."""
    rotation, translation = sequence.extrinsics[frame].split((3, 1), -1)
    camera = points @ rotation.T + translation[:, 0]
    pixels = camera @ sequence.intrinsics[frame].T
    return pixels[:, :2] / pixels[:, 2:], camera[:, 2]


def test_same_seed_same_sequence() -> None:
    first, again, other = render_sequence(5, 3), render_sequence(5, 3), render_sequence(6, 3)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.images, other.images)


def test_longer_sequence_begins_like_shorter() -> None:
    short, long = render_sequence(8, 3, (32, 32)), render_sequence(8, 11, (32, 32))
    for name in vars(short):
        torch.testing.assert_close(getattr(long, name)[:3], getattr(short, name), atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("size", [(64, 64), (40, 56)])
def test_shapes_and_ranges(size: tuple[int, int]) -> None:
    sequence = render_sequence(HELD_OUT, 5, size)
    assert sequence.images.shape == (5, 3, *size)
    assert sequence.depth.shape == (5, *size)
    assert sequence.points.shape == (5, *size, 3)
    assert sequence.extrinsics.shape == (5, 3, 4)
    assert sequence.intrinsics.shape == (5, 3, 3)
    for value in vars(sequence).values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    assert 0 <= sequence.images.min() < sequence.images.max() <= 1
    assert sequence.depth.min() > 0.02
    assert torch.equal(sequence.extrinsics[0], torch.eye(3, 4))


@pytest.mark.parametrize("seed", range(12))
def test_depth_points_and_poses_agree(seed: int) -> None:
    sequence = render_sequence(seed, 24, (48, 64))
    torch.testing.assert_close(_unproject(sequence).float(), sequence.points, atol=1e-4, rtol=0)
    assert sequence.points[0].norm(dim=-1).mean().item() == pytest.approx(1, abs=1e-5)
    rotation = sequence.extrinsics[:, :, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(24, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotation) > 0).all()


def test_visible_points_have_the_same_depth_and_colour_in_other_views() -> None:
    depth_errors, colour_errors, shuffled = [], [], []
    for seed in range(20, 26):
        sequence = render_sequence(seed, 6)
        points, colours = sequence.points[0].reshape(-1, 3), sequence.images[0].flatten(1).T
        pixels, depth = _project(sequence, 3, points)
        inside = ((pixels > 1) & (pixels < 63)).all(1) & (depth > 0)
        grid = (pixels[inside] / 32 - 1)[None, None]  # -1 and 1 are the outer edges of the image
        stacked = torch.cat([sequence.depth[3][None], sequence.images[3]])[None]
        seen = torch.nn.functional.grid_sample(stacked, grid, align_corners=False)[0, :, 0].T
        relative = (seen[:, 0] - depth[inside]).abs() / depth[inside]
        visible = relative < 0.03
        assert visible.float().mean() > 0.6
        depth_errors.append(relative[visible].median())
        difference = (seen[:, 1:] - colours[inside]).abs().mean(1)[visible]
        colour_errors.append(difference.median())
        shuffled.append((seen[:, 1:] - colours[inside].roll(97, 0)).abs().mean(1).median())
    assert torch.stack(depth_errors).max() < 3e-3
    assert torch.stack(colour_errors).mean() < 0.02
    assert torch.stack(shuffled).mean() > 4 * torch.stack(colour_errors).mean()


def test_the_camera_travels_and_comes_back() -> None:
    ways, returns = [], []
    for seed in range(10):
        sequence = render_sequence(HELD_OUT + seed, 64, (8, 8))
        rotation, translation = sequence.extrinsics.split((3, 1), -1)
        place = -(rotation.mT @ translation)[..., 0]
        way = place.norm(dim=1)
        ways.append(way.max())
        far = int(way.argmax())
        returns.append(way[far:].min())
        step = (place[1:] - place[:-1]).norm(dim=1)
        assert step.max() < 2
    assert torch.stack(ways).mean() > 0.5
    assert torch.stack(returns).median() < 0.5 * torch.stack(ways).median()


@pytest.mark.parametrize("frames", [0, -1])
def test_nothing_to_render(frames: int) -> None:
    with pytest.raises(ValueError, match="nothing to render"):
        render_sequence(0, frames)


def test_pose_round_trip() -> None:
    sequence = render_sequence(3, 9, (40, 64))
    pose = pose_encoding(sequence.extrinsics, sequence.intrinsics, (40, 64))
    assert pose.shape == (9, 9)
    torch.testing.assert_close(pose[0, :7], torch.tensor([0.0, 0, 0, 0, 0, 0, 1]))
    assert (pose[:, 6] >= 0).all()
    pose[:, 3:7] *= 2.5  # the length of the quaternion does not matter
    extrinsics, intrinsics = decode_pose(pose, (40, 64))
    torch.testing.assert_close(extrinsics, sequence.extrinsics, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(intrinsics, sequence.intrinsics, atol=1e-3, rtol=1e-5)


def test_fields_of_view_are_vertical_then_horizontal() -> None:
    intrinsics = torch.tensor([[20.0, 0, 30], [0, 20, 20], [0, 0, 1]])
    pose = pose_encoding(torch.eye(3, 4), intrinsics, (40, 60))
    assert pose[7].item() == pytest.approx(math.pi / 2)
    assert pose[8].item() == pytest.approx(2 * math.atan(1.5))


def test_quaternions_of_every_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    quaternion = torch.nn.functional.normalize(torch.randn(4, 50, 4, generator=generator, dtype=torch.float64), dim=-1)
    quaternion[0] = torch.eye(4, dtype=torch.float64).repeat(13, 1)[:50]  # half turns about each axis
    matrix = quaternion_to_matrix(quaternion)
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(matrix)), matrix)
    same = (matrix_to_quaternion(matrix) * quaternion).sum(-1).abs()
    torch.testing.assert_close(same, torch.ones_like(same))
