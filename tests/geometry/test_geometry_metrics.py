"""Depth, trajectory and point errors: small cases by hand, naive twins, and properties on random data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsieve.errors import DataError, PolicyError
from kvsieve.geometry import metrics
from kvsieve.geometry.alignment import align_scale, camera_centres, umeyama
from kvsieve.geometry.metrics import (
    ate,
    depth_metrics,
    distance_to,
    nearest_distances,
    point_metrics,
    rpe,
    trajectory_metrics,
    unproject,
)
from kvsieve.geometry.scenes import render_sequence

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None)


def random_rotation(generator):
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q).sign()


def random_path(frames, seed):
    generator = torch.Generator().manual_seed(seed)
    turns = torch.stack([random_rotation(generator) for _ in range(frames)])
    return torch.cat([turns, torch.randn(frames, 3, 1, generator=generator, dtype=torch.float64)], dim=2)


def move(extrinsics, scale, rotation, translation):
    """The same cameras in a world that was scaled, turned and shifted: x -> scale * rotation @ x + translation."""
    turns = extrinsics[:, :, :3] @ rotation.T
    return torch.cat([turns, scale * extrinsics[:, :, 3:] - (turns @ translation)[:, :, None]], dim=2)


def poses_4x4(extrinsics):
    last = np.array([[[0.0, 0.0, 0.0, 1.0]]])
    return np.linalg.inv(np.concatenate([extrinsics.double().numpy(), np.repeat(last, len(extrinsics), 0)], axis=1))


# Depth


def test_depth_by_hand():
    gt = torch.tensor([[1.0, 2.0, 4.0, 0.0, math.nan, -1.0, math.inf]])
    pred = torch.tensor([[1.2, 2.0, 8.0, 5.0, math.nan, 5.0, 5.0]])
    got = depth_metrics(pred, gt, align="none")
    assert got["valid_pixels"] == 3
    assert got["scale"] == 1
    assert got["abs_rel"] == pytest.approx((0.2 + 0 + 1) / 3)
    assert got["sq_rel"] == pytest.approx((0.04 + 0 + 4) / 3)
    assert got["rmse"] == pytest.approx(math.sqrt((0.04 + 16) / 3))
    assert got["log_rmse"] == pytest.approx(math.sqrt((math.log(1.2) ** 2 + math.log(2) ** 2) / 3))
    assert [got[f"delta_1.25{power}"] for power in ("", "^2", "^3")] == pytest.approx([2 / 3, 2 / 3, 2 / 3])


def test_negative_predictions_have_finite_errors():
    got = depth_metrics(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0]), align="none")
    assert got["log_rmse"] == pytest.approx(math.log(1e5) / math.sqrt(2))
    assert got["delta_1.25^3"] == 0.5


def test_a_mask_leaves_pixels_out():
    gt, pred = torch.ones(2, 3), torch.ones(2, 3)
    pred[0, 0] = math.nan
    with pytest.raises(DataError, match="NaN or infinite at 1 of 6"):
        depth_metrics(pred, gt)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 0] = False
    assert depth_metrics(pred, gt, mask)["valid_pixels"] == 5


@few
@given(seeds, st.floats(0.01, 100), st.sampled_from(["scale", "median"]))
def test_perfect_depth_up_to_scale_has_no_error(seed, scale, align):
    gt = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    got = depth_metrics(gt / scale, gt, align=align)
    assert got["scale"] == pytest.approx(scale, rel=1e-9)
    assert max(got[name] for name in ("abs_rel", "sq_rel", "rmse", "log_rmse")) < 1e-9
    assert got["delta_1.25"] == 1


@few
@given(seeds, st.floats(0.1, 10))
def test_scale_is_found_among_outliers(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(400, generator=generator, dtype=torch.float64) + 0.5
    pred = gt / scale
    pred[:40] *= 1 + 2 * torch.rand(40, generator=generator, dtype=torch.float64)
    for method in ("scale", "median"):
        assert align_scale(pred, gt, method=method) == pytest.approx(scale, rel=0.15)
    least_squares = float((pred * gt).sum() / (pred * pred).sum())
    assert abs(align_scale(pred, gt) - scale) <= abs(least_squares - scale)
    assert align_scale(pred, gt) == pytest.approx(scale, rel=1e-3)


@few
@given(seeds)
def test_scale_matches_ten_steps_written_out(seed):
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(50, generator=generator) + 0.1
    pred = torch.rand(50, generator=generator) + 0.1
    p, g = pred.tolist(), gt.tolist()
    scale = sum(g) / sum(p)
    for _ in range(10):
        weights = [1 / (abs(scale * a - b) + 1e-8) for a, b in zip(p, g, strict=True)]
        scale = sum(w * a * b for w, a, b in zip(weights, p, g, strict=True)) / sum(
            w * a * a for w, a in zip(weights, p, strict=True)
        )
    assert align_scale(pred, gt) == pytest.approx(scale, rel=1e-9)


def test_scale_has_a_floor():
    assert align_scale(torch.full((4,), 1e9), torch.ones(4)) == 1e-3


def test_bad_depth_is_refused():
    ones = torch.ones(2, 2)
    with pytest.raises(DataError, match="none of 4 pixels"):
        depth_metrics(ones, torch.zeros(2, 2))
    with pytest.raises(DataError, match="none of 4 pixels"):
        depth_metrics(ones, ones, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(DataError, match="must be equal"):
        depth_metrics(torch.ones(2, 2, 1), ones)
    with pytest.raises(DataError, match="must be bool"):
        depth_metrics(ones, ones, ones)
    with pytest.raises(DataError, match="has no scale"):
        depth_metrics(-ones, ones)
    for function in (depth_metrics, align_scale):
        with pytest.raises(PolicyError, match="is not one of scale, median, none"):
            function(ones, ones, None, "affine")


# Cameras


@few
@given(seeds, st.integers(3, 20), st.floats(1e-3, 1e3))
def test_umeyama_recovers_a_similarity(seed, count, scale):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    rotation, shift = random_rotation(generator), torch.randn(3, generator=generator, dtype=torch.float64)
    target = scale * points @ rotation.T + shift
    got = umeyama(points, target)
    assert got.scale == pytest.approx(scale, rel=1e-6)
    assert torch.allclose(got.rotation, rotation, atol=1e-5)
    assert torch.allclose(got.apply(points), target, atol=1e-6 * max(scale, 1))
    assert umeyama(points, points @ rotation.T + shift, with_scale=False).scale == 1


@few
@given(seeds)
def test_umeyama_never_reflects_and_no_small_change_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    target = points * torch.tensor([1.0, 1.0, -1.0]) + 0.1 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    best = umeyama(points, target)
    assert torch.linalg.det(best.rotation) == pytest.approx(1)
    assert torch.allclose(best.rotation @ best.rotation.T, torch.eye(3, dtype=torch.float64))
    loss = (best.apply(points) - target).square().sum()
    for _ in range(20):
        skew = 1e-3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
        other = best._replace(
            scale=best.scale * (1 + 1e-3 * float(torch.randn((), generator=generator))),
            rotation=torch.linalg.matrix_exp(skew - skew.T) @ best.rotation,
            translation=best.translation + 1e-3 * torch.randn(3, generator=generator, dtype=torch.float64),
        )
        assert (other.apply(points) - target).square().sum() >= loss


def test_points_in_a_plane_are_aligned():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [3, 1, 0]])
    rotation = random_rotation(torch.Generator().manual_seed(1))
    got = umeyama(points, 2 * points.double() @ rotation.T)
    assert torch.allclose(got.rotation, rotation)


def test_points_on_a_line_take_the_smallest_turn():
    points = torch.arange(4.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0], dtype=torch.float64)
    same = umeyama(points, 3 * points + 1)
    assert same.scale == pytest.approx(3)
    assert torch.allclose(same.rotation, torch.eye(3, dtype=torch.float64), atol=1e-6)
    turned = umeyama(points, points[:, [1, 0, 2]])
    assert torch.allclose(turned.apply(points), points[:, [1, 0, 2]], atol=1e-6)
    assert turned.rotation.trace() == pytest.approx(1, abs=1e-6), "a quarter turn"


def test_points_without_an_alignment_are_refused():
    points = torch.randn(4, 3)
    with pytest.raises(DataError, match="1 points"):
        umeyama(points[:1], points[:1])
    with pytest.raises(DataError, match="first set coincide"):
        umeyama(torch.ones(4, 3), points)
    with pytest.raises(DataError, match="second set coincide"):
        umeyama(points, torch.ones(4, 3))
    with pytest.raises(DataError, match=r"\[N, 3\]"):
        umeyama(points, points[:3])
    with pytest.raises(DataError, match="NaN"):
        umeyama(points, points * math.nan)


@few
@given(seeds, st.floats(0.01, 100))
def test_a_path_in_another_world_has_no_error(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    path = random_path(5, seed)
    other = move(path, scale, random_rotation(generator), torch.randn(3, generator=generator, dtype=torch.float64))
    got = trajectory_metrics(other, path)
    assert got["scale"] == pytest.approx(1 / scale, rel=1e-6)
    assert max(got["ate"], got["rpe_translation"], got["rpe_rotation_deg"]) < 1e-6
    assert ate(path.float(), path.float()) < 1e-6


def wobbly_paths(frames=6):
    """A true and a predicted path in closed form, for numbers that were computed elsewhere."""

    def turn(i, j, angle):
        matrix = torch.eye(3, dtype=torch.float64)
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
        return matrix

    def pose(a, b, c, shift):
        return torch.cat([turn(0, 1, a) @ turn(1, 2, b) @ turn(0, 2, c), shift[:, None]], dim=1)

    truth, pred = [], []
    for i in range(frames):
        shift = torch.tensor([math.sin(i), 0.5 * i, math.cos(2 * i)], dtype=torch.float64)
        off = torch.tensor([math.cos(3 * i), math.sin(i), 0.1 * i], dtype=torch.float64)
        a, b, c = 0.3 * i, 0.2 * math.sin(i), -0.1 * i
        truth.append(pose(a, b, c, shift))
        pred.append(pose(a + 0.02 * math.cos(i), b - 0.01 * i, c, 0.4 * shift + 0.03 * off))
    return torch.stack(pred), torch.stack(truth)


def test_path_errors_equal_those_of_evo():
    """evo 1.38.1: APE and RPE, aligned with scale, all pairs."""
    pred, truth = wobbly_paths()
    got = trajectory_metrics(pred, truth)
    assert got["scale"] == pytest.approx(2.5681973154026028, rel=1e-12)
    assert got["ate"] == ate(pred, truth) == pytest.approx(0.07277448562816011, rel=1e-10)
    assert rpe(pred, truth) == pytest.approx((0.14971135418335038, 0.9645628735341837), rel=1e-10)
    assert rpe(pred, truth, delta=2) == pytest.approx((0.10667414934682437, 1.8057943006783654), rel=1e-10)


@few
@given(seeds, st.integers(1, 3))
def test_path_errors_equal_those_of_4x4_matrices(seed, delta):
    pred, truth = random_path(6, seed), random_path(6, seed + 1)
    got = trajectory_metrics(pred, truth, delta)
    sim3 = umeyama(camera_centres(pred), camera_centres(truth))
    estimated, true = poses_4x4(pred), poses_4x4(truth)
    estimated[:, :3, 3] = sim3.scale * estimated[:, :3, 3] @ sim3.rotation.numpy().T + sim3.translation.numpy()
    estimated[:, :3, :3] = sim3.rotation.numpy() @ estimated[:, :3, :3]
    distances = np.linalg.norm(estimated[:, :3, 3] - true[:, :3, 3], axis=1)
    errors = []
    for i in range(6 - delta):
        q, p = (np.linalg.inv(poses[i]) @ poses[i + delta] for poses in (true, estimated))
        errors.append(np.linalg.inv(q) @ p)
    angles = [math.degrees(math.acos(np.clip((np.trace(e[:3, :3]) - 1) / 2, -1, 1))) for e in errors]
    assert got["ate"] == pytest.approx(math.sqrt((distances**2).mean()), rel=1e-9)
    assert got["rpe_translation"] == pytest.approx(math.sqrt(np.mean([e[:3, 3] @ e[:3, 3] for e in errors])), rel=1e-9)
    assert got["rpe_rotation_deg"] == pytest.approx(math.sqrt(np.mean(np.square(angles))), rel=1e-6)


def test_centres_are_where_the_cameras_stand():
    path = random_path(4, 0)
    assert np.allclose(camera_centres(path), poses_4x4(path)[:, :3, 3])


def test_a_straight_drive_has_an_error_of_zero():
    path = torch.cat([torch.eye(3).repeat(4, 1, 1), -torch.arange(4.0)[:, None, None] * torch.ones(3, 1)], dim=2)
    assert ate(path, path) < 1e-9


def test_bad_paths_are_refused():
    path = random_path(4, 0)
    with pytest.raises(DataError, match="3 predicted and 4 true"):
        ate(path[:3], path)
    with pytest.raises(DataError, match=r"\[S, 3, 4\]"):
        ate(path[None], path[None])
    with pytest.raises(DataError, match="NaN"):
        ate(path * math.nan, path)
    with pytest.raises(DataError, match="differs from the identity"):
        ate(2 * path, path)
    with pytest.raises(DataError, match="reflection"):
        ate(path * torch.tensor([-1.0, 1, 1, 1]), path)
    with pytest.raises(DataError, match="no pair of frames"):
        ate(path[:1], path[:1])
    with pytest.raises(DataError, match="coincide"):
        ate(torch.eye(3, 4).repeat(4, 1, 1), path)


# Points


@pytest.mark.parametrize(("count", "size"), [(1, 1), (50, 70), (0, 3)])
@pytest.mark.parametrize("blocks", [(256, 512), (16, 7)])
def test_nearest_distances_equal_all_pairs(monkeypatch, count, size, blocks):
    monkeypatch.setattr(metrics, "_QUERIES", blocks[0])
    monkeypatch.setattr(metrics, "_CLOUD", blocks[1])
    generator = torch.Generator().manual_seed(0)
    points, cloud = torch.randn(count, 3, generator=generator), torch.randn(size, 3, generator=generator)
    expected = (points.double()[:, None] - cloud.double()[None]).square().sum(-1).sqrt().amin(dim=1)
    assert torch.allclose(nearest_distances(points, cloud), expected, rtol=1e-12, atol=0)


def test_near_points_far_from_the_origin_keep_their_distance():
    cloud = torch.tensor([[1e6, 0, 0], [1e6 + 1e-3, 0, 0]], dtype=torch.float64)
    assert nearest_distances(cloud[:1] + 1e-4, cloud)[0] == pytest.approx(math.sqrt(3) * 1e-4, rel=1e-5)


def test_points_to_search_are_checked():
    with pytest.raises(DataError, match="empty"):
        nearest_distances(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(DataError, match=r"finite \[N, 3\]"):
        nearest_distances(torch.full((2, 3), math.nan), torch.zeros(1, 3))


def test_points_by_hand():
    gt = torch.tensor([[0.0, 0, 0], [10, 0, 0], [20, 0, 0], [math.nan, 0, 0]])
    pred = torch.tensor([[0.0, 1, 0], [10, 0, 3], [10, 0, 0], [5, 5, 5]])
    got = point_metrics(pred, gt, align="none")
    assert got["points"] == 3
    assert got["accuracy_mean"] == pytest.approx((1 + 3 + 0) / 3)
    assert got["accuracy_median"] == 1
    assert got["completeness_mean"] == pytest.approx((1 + 0 + 10) / 3)
    assert got["completeness_median"] == 1


@few
@given(seeds, st.floats(0.01, 100))
def test_points_in_another_world_have_no_error(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    gt = torch.randn(2, 5, 6, 3, generator=generator, dtype=torch.float64)
    rotation = random_rotation(generator)
    got = point_metrics(scale * gt @ rotation.T + 5, gt, max_points=20, seed=seed)
    assert max(got[f"{name}_{kind}"] for name in ("accuracy", "completeness") for kind in ("mean", "median")) < 1e-6
    assert got["points"] == 20
    assert point_metrics(scale * gt, gt, align="scale")["scale"] == pytest.approx(1 / scale)
    assert point_metrics(gt, gt, align="none")["accuracy_mean"] == 0


def test_the_choice_of_points_follows_the_seed():
    gt, noise = torch.randn(40, 3), torch.randn(40, 3)
    first, again, other = (point_metrics(gt + noise, gt, max_points=10, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    mask = torch.zeros(40, dtype=torch.bool)
    mask[:7] = True
    assert point_metrics(gt + noise, gt, mask, max_points=None)["points"] == 7


def test_bad_points_are_refused():
    gt = torch.randn(4, 3)
    with pytest.raises(DataError, match="both must be"):
        point_metrics(gt[:3], gt)
    with pytest.raises(DataError, match="no point is valid"):
        point_metrics(gt, gt * math.nan)
    with pytest.raises(DataError, match="predicted points are NaN"):
        point_metrics(gt * math.nan, gt)
    with pytest.raises(DataError, match="must be bool"):
        point_metrics(gt, gt, torch.ones(3))
    with pytest.raises(DataError, match="best scale"):
        point_metrics(-gt, gt, align="scale")
    with pytest.raises(PolicyError, match="is not one of sim3"):
        point_metrics(gt, gt, align="icp")
    with pytest.raises(PolicyError, match="max_points=0"):
        point_metrics(gt, gt, max_points=0)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_unprojected_pixels_project_back(offset):
    path = random_path(2, 3)
    camera = torch.tensor([[50.0, 0, 8], [0, 60, 6], [0, 0, 1]], dtype=torch.float64).repeat(2, 1, 1)
    depth = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    points = unproject(depth, path, camera, offset)
    assert points.shape == (2, 12, 16, 3)
    for frame in range(2):
        for row, column in ((0, 0), (11, 3), (5, 15)):
            seen = path[frame, :, :3] @ points[frame, row, column] + path[frame, :, 3]
            pixel = camera[frame] @ seen
            assert seen[2] == pytest.approx(float(depth[frame, row, column]))
            assert (pixel[:2] / pixel[2]).tolist() == pytest.approx([column + offset, row + offset])
    assert torch.equal(unproject(depth[0], path[0], camera[0], offset), points[0])
    assert unproject(depth.float(), path, camera).dtype == torch.float32


def test_rendered_depth_unprojects_to_rendered_points():
    scene = render_sequence(3, frames=2, size=(28, 42))
    points = unproject(scene.depth, scene.extrinsics, scene.intrinsics)
    assert torch.allclose(points, scene.points, atol=1e-4)
    got = point_metrics(points, scene.points, align="none", max_points=500)
    assert max(got["accuracy_mean"], got["completeness_mean"]) < 1e-4


def test_unproject_names_the_shapes_that_do_not_fit():
    with pytest.raises(DataError, match="do not fit"):
        unproject(torch.ones(2, 4, 4), torch.ones(1, 3, 4), torch.ones(2, 3, 3))
    with pytest.raises(DataError, match="do not fit"):
        unproject(torch.ones(2, 4, 4, 1), torch.ones(2, 3, 4), torch.ones(2, 3, 3))


# Two runs


def run(seed=0, frames=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "depth": torch.rand(frames, 4, 5, generator=generator) + 0.5,
        "extrinsics": random_path(frames, seed),
        "world_points": torch.randn(frames, 4, 5, 3, generator=generator),
        "pose_enc": torch.zeros(frames, 9),
    }


def test_a_run_is_at_no_distance_from_itself():
    got = distance_to(run(), run())
    scalars = {name: value for name, value in got.items() if isinstance(value, float)}
    assert scalars.pop("scene_size") > 0
    assert set(scalars) == {"depth_rel", "translation", "rotation_deg", "points_rmse"}
    assert max(scalars.values()) < 1e-6
    assert all(len(got[f"{name}_per_frame"]) == 3 for name in scalars)


def test_distances_by_hand():
    reference = run()
    pred = {name: value.clone() for name, value in reference.items()}
    pred["depth"][1] *= 1.5
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    pred["extrinsics"][2] = turn @ reference["extrinsics"][2]  # about its own axis: the centre stays
    pred["extrinsics"][0, :, 3] += torch.tensor([0.0, 3, 4], dtype=torch.float64)
    pred["world_points"][0] += torch.tensor([2.0, 0, 0])
    got = distance_to(pred, reference)
    assert got["depth_rel_per_frame"] == pytest.approx([0, 0.5, 0])
    assert got["depth_rel"] == pytest.approx(0.5 / 3)
    assert got["translation_per_frame"] == pytest.approx([5, 0, 0])
    assert got["rotation_deg_per_frame"] == pytest.approx([0, 0, 90], abs=1e-6)
    assert got["points_rmse"] == pytest.approx(math.sqrt(4 / 3) / got["scene_size"], rel=1e-6)
    assert got["points_rmse_per_frame"] == pytest.approx([2 / got["scene_size"], 0, 0], rel=1e-6)


def test_only_what_both_runs_have_is_compared():
    reference = {"depth": run()["depth"][..., None]}
    assert set(distance_to(run() | reference, reference)) == {"depth_rel", "depth_rel_per_frame"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": torch.ones(2, 4, 5)}, "depth has shapes"),
        ({"depth": torch.full((3, 4, 5), math.nan)}, "depth holds NaN"),
        ({"world_points": torch.ones(3, 4, 5)}, "world_points has shapes"),
    ],
)
def test_runs_that_do_not_compare_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        distance_to(run() | change, run())


def test_degenerate_references_are_refused():
    with pytest.raises(DataError, match="share none of depth"):
        distance_to({"pose_enc": torch.zeros(1)}, run())
    batch = {"world_points": torch.ones(1, 3, 4, 5, 3)}
    with pytest.raises(DataError, match="one sequence of a batch"):
        distance_to(batch, batch)
    zero = {"depth": torch.zeros(3, 4, 5)}
    with pytest.raises(DataError, match="is 0 somewhere"):
        distance_to(zero, zero)
    point = {"world_points": torch.ones(3, 4, 5, 3)}
    with pytest.raises(DataError, match="no size"):
        distance_to(point, point)
