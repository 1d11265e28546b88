"""Rendered sequences with exact depth, points and poses: a textured room, objects in it, a moving camera.

Rays are cast analytically in torch, so a sequence needs neither files nor a graphics library, and the same seed gives
the same sequence. Seeds 0 to 9,999,999 are for training, seeds from 10,000,000 on (`HELD_OUT`) for measuring.

Lengths are in units of the mean distance of the first frame's points from the first camera. Objects of all sizes
stand or float and textures have random scales, so a later frame alone does not tell how large things are:
the scale has to be remembered from the first frame, or from frames in between that share something with both.
The room is long, so views along it and across it differ in depth. The camera keeps nearly level, at one height, and
travels between a few stations again and again, so places out of sight for a while are seen again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .textures import FACES, Textures

__all__ = ["HELD_OUT", "Sequence3D", "render_sequence"]

HELD_OUT = 10_000_000  # first seed that training must not use
_BOX, _ELLIPSOID, _CYLINDER = range(3)
_CHUNK = 4  # frames rendered at once, so that the buffers stay in the processor's cache
_MARGIN = 0.25  # between the camera and any object, before scaling


@dataclass
class Sequence3D:
    """A rendered sequence of ``S`` frames; world coordinates are those of the first camera.

    Attributes:
        images: [S, 3, H, W] float32 in [0, 1].
        depth: [S, H, W] distance along the optical axis.
        points: [S, H, W, 3] in the world.
        extrinsics: [S, 3, 4] world to camera (OpenCV axes); the first is the identity.
        intrinsics: [S, 3, 3] in pixels; pixel (row, column) is centred at (column + 0.5, row + 0.5).
    """

    images: Tensor
    depth: Tensor
    points: Tensor
    extrinsics: Tensor
    intrinsics: Tensor


@dataclass
class _Scene:
    """Shapes of unit size, stretched, turned and moved; the last one is the room, seen from inside."""

    kind: Tensor  # [N]
    centre: Tensor  # [N, 3]
    rotation: Tensor  # [N, 3, 3] from the shape's axes to the world's
    size: Tensor  # [N, 3] half extents
    textures: Textures
    light: Tensor  # [3]


def _random_rotation(draw: np.random.Generator) -> np.ndarray:
    """A uniformly random rotation matrix."""
    q, r = np.linalg.qr(draw.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)


def _yaw_rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]])


def _distance_to_paths(point: np.ndarray, stations: np.ndarray) -> float:
    """Distance of a point from the closest straight line between two stations."""
    first, second = np.triu_indices(len(stations), 1)
    start, way = stations[first], stations[second] - stations[first]
    along = ((point - start) * way).sum(1) / (way * way).sum(1)
    nearest = start + np.clip(along, 0, 1)[:, None] * way
    return float(np.linalg.norm(point - nearest, axis=1).min())


def _draw_stations(draw: np.random.Generator, room: np.ndarray) -> np.ndarray:
    """Three or four places between which the camera travels, [K, 3], not too close to each other."""
    count, apart = int(draw.integers(3, 5)), 0.5 * float(room[:2].min())
    stations: list[np.ndarray] = []
    height = draw.uniform(-0.35, 0.35) * room[2]
    while len(stations) < count:
        place = draw.uniform(-1, 1, 3) * room * (0.8, 0.85, 0.05) + (0, 0, height)
        if all(np.linalg.norm(place - other) > apart for other in stations):
            stations.append(place)
        apart *= 0.98  # so that there is always room for the last one
    return np.array(stations)


def _draw_scene(draw: np.random.Generator, room: np.ndarray, stations: np.ndarray) -> _Scene:
    """Three to seven objects that keep away from the camera's ways, and the room."""
    wanted = int(draw.integers(3, 8))
    kinds: list[int] = []
    centres, rotations, sizes = [], [], []
    for _ in range(wanted * 8):
        if len(kinds) == wanted:
            break
        kind = int(draw.choice(3, p=[0.5, 0.25, 0.25]))
        size = np.exp(draw.uniform(math.log(0.3), math.log(1.0), 3))
        if kind == _CYLINDER:
            size[1] = size[0]
        standing = draw.random() < 0.65
        rotation = _yaw_rotation(draw.uniform(0, 2 * math.pi)) if standing else _random_rotation(draw)
        centre = draw.uniform(-1, 1, 3) * room * 0.95
        if standing:
            centre[2] = size[2] - room[2]
        reach = {_BOX: np.linalg.norm(size), _ELLIPSOID: size.max(), _CYLINDER: np.hypot(size[0], size[2])}[kind]
        if _distance_to_paths(centre, stations) > float(reach) + _MARGIN + 0.12:  # 0.12: the camera's sway
            kinds.append(kind)
            centres.append(centre)
            rotations.append(rotation)
            sizes.append(size)
    light = np.array([0.45, 0.25, 0.85]) + draw.normal(0, 0.05, 3)  # from above: floors are bright, ceilings dark
    arrays = (
        np.array([*centres, np.zeros(3)]),
        np.array([*rotations, np.eye(3)]),
        np.array([*sizes, room]),
        light / np.linalg.norm(light),
    )
    centre_t, rotation_t, size_t, light_t = (torch.from_numpy(a.astype(np.float32)) for a in arrays)
    textures = Textures(draw, len(kinds) + 1)
    return _Scene(torch.tensor([*kinds, _BOX]), centre_t, rotation_t, size_t, textures, light_t)


def _camera_path(
    draw: np.random.Generator, room: np.ndarray, stations: np.ndarray, frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [S, 3] and camera-to-world rotations [S, 3, 3] (columns: right, down, forward).

    The camera rests at a station, goes straight to the next one while it turns, and so on. The first frames do not
    depend on how many follow.
    """
    step = math.exp(draw.uniform(math.log(0.06), math.log(0.3)))  # of the way between two stations, per frame
    start, sway = draw.uniform(0, 1), draw.uniform(0, 2 * math.pi, (2, 3))
    visits = math.ceil(start + step * frames) + 2
    current = int(draw.integers(len(stations)))
    places, angles = [], []
    yaw = math.atan2(*(-stations[current][1::-1] + draw.normal(0, 0.8, 2)))
    for _ in range(visits):
        target = draw.uniform(-0.9, 0.9, 2) * room[:2] - stations[current][:2]
        change = (math.atan2(target[1], target[0]) + draw.normal(0, 0.5) - yaw + math.pi) % (2 * math.pi) - math.pi
        yaw += min(max(change, -1.4), 1.4)
        places.append(stations[current])
        angles.append((yaw, draw.uniform(-0.06, 0.04), draw.uniform(-0.02, 0.02)))
        current = (current + int(draw.integers(1, len(stations)))) % len(stations)
    time = start + step * np.arange(frames)
    visit = time.astype(int)
    part = time - visit
    part = (part * part * (3 - 2 * part))[:, None]
    place_array, angle_array = np.array(places), np.array(angles)
    positions = place_array[visit] * (1 - part) + place_array[visit + 1] * part
    positions = positions + 0.06 * np.sin(2.3 * time[:, None] * (1, 1.4, 0.8) + sway[0])
    turned = angle_array[visit] * (1 - part) + angle_array[visit + 1] * part
    turned = turned + 0.02 * np.sin(1.9 * time[:, None] * (1, 1.3, 0.7) + sway[1])
    yaw_t, pitch, roll = turned.T
    forward = np.stack([np.cos(pitch) * np.cos(yaw_t), np.cos(pitch) * np.sin(yaw_t), np.sin(pitch)], -1)
    level = np.stack([np.sin(yaw_t), -np.cos(yaw_t), np.zeros_like(yaw_t)], -1)
    below = np.cross(forward, level)
    cosine, sine = np.cos(roll)[:, None], np.sin(roll)[:, None]
    right, down = cosine * level + sine * below, cosine * below - sine * level
    return positions, np.stack([right, down, forward], -1)


def _slabs(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the unit cube; origin [3, F, 1], direction [3, F, P] -> two [F, P]."""
    inverse = 1 / torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    first, second = (-1 - origin) * inverse, (1 - origin) * inverse
    return torch.minimum(first, second).amax(0), torch.maximum(first, second).amin(0)


def _quadric(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the unit ball (or disc, for two rows); infinite where they miss."""
    a = direction.square().sum(0).clamp(min=1e-12)
    b = (origin * direction).sum(0)
    c = origin.square().sum(0) - 1
    root = (b * b - a * c).sqrt()  # not a number where the ray misses
    near, far = (-b - root) / a, (-b + root) / a
    return near.nan_to_num(math.inf), far.nan_to_num(-math.inf)


def _cast(scene: _Scene, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest hits of rays: origin [3, F, 1], direction [3, F, P] -> ray parameter and object, both [F, P]."""
    room = len(scene.kind) - 1
    size = scene.size[room].view(3, 1, 1)
    nearest = _slabs(origin / size, direction / size)[1]
    index = torch.full(nearest.shape, room)
    flat_origin, flat_direction = origin.flatten(1), direction.flatten(1)
    for number in range(room):
        into = scene.rotation[number].T / scene.size[number][:, None]
        start = (into @ (flat_origin - scene.centre[number][:, None])).view_as(origin)
        way = (into @ flat_direction).view_as(direction)
        kind = int(scene.kind[number])
        if kind == _BOX:
            near, far = _slabs(start, way)
        elif kind == _ELLIPSOID:
            near, far = _quadric(start, way)
        else:
            near, far = _quadric(start[:2], way[:2])
            along = torch.where(way[2].abs() < 1e-9, torch.full_like(way[2], 1e-9), way[2])
            ends = ((-1 - start[2]) / along, (1 - start[2]) / along)
            near = torch.maximum(near, torch.minimum(*ends))
            far = torch.minimum(far, torch.maximum(*ends))
        closer = (near < far) & (near > 0) & (near < nearest)
        nearest = torch.where(closer, near, nearest)
        index.masked_fill_(closer, number)
    return nearest, index


def _shade(scene: _Scene, index: Tensor, points: Tensor, direction: Tensor, pixel: Tensor) -> Tensor:
    """Colours of the points that rays hit.

    Args:
        scene: what they hit.
        index: [R] object of each point.
        points: [R, 3].
        direction: [R, 3] of the rays.
        pixel: [R] width of a pixel at the distance of the point.

    Returns:
        [R, 3] in [0, 1].
    """
    room = len(scene.kind) - 1
    kind, size, rotation = scene.kind[index], scene.size[index], scene.rotation[index]
    local = torch.einsum("rij,ri->rj", rotation, points - scene.centre[index])
    unit = local / size
    axis = unit.abs().argmax(1, keepdim=True)
    flat = torch.zeros_like(unit).scatter(1, axis, unit.gather(1, axis).sign())
    cap = unit[:, 2].abs() > unit[:, :2].norm(dim=1)
    round_side = torch.cat([unit[:, :2], torch.zeros_like(unit[:, 2:])], 1)
    end = torch.cat([torch.zeros_like(unit[:, :2]), unit[:, 2:].sign()], 1)
    tube = torch.where(cap[:, None], end, round_side)
    normal = torch.where((kind == _BOX)[:, None], flat, torch.where((kind == _ELLIPSOID)[:, None], unit, tube))
    normal = normal / size
    normal = normal / normal.norm(dim=1, keepdim=True)
    axis = normal.abs().argmax(1)
    face = 2 * axis + (normal.gather(1, axis[:, None])[:, 0] > 0)
    u = torch.where(axis == 0, local[:, 1], local[:, 0])
    v = torch.where(axis == 2, local[:, 1], local[:, 2])
    world = torch.einsum("rij,rj->ri", rotation, normal) * torch.where(index == room, -1.0, 1.0)[:, None]
    facing = (world * direction).sum(1).abs() / direction.norm(dim=1)
    colour = scene.textures.colour(index * FACES + face, u, v, pixel / facing.clamp(min=0.2))
    return (colour * (0.64 + 0.36 * (world @ scene.light))[:, None]).clamp(0, 1)


@torch.no_grad()
def render_sequence(seed: int, frames: int, size: tuple[int, int] = (64, 64)) -> Sequence3D:
    """Render a random scene along a random path.

    Args:
        seed: fixes scene, path and field of view; from `HELD_OUT` on for measuring only.
        frames: S, at least 1. A longer sequence begins like a shorter one of the same seed.
        size: height and width in pixels.

    Raises:
        ValueError: there is no frame or no pixel to render.
    """
    height, width = size
    if frames < 1 or height < 1 or width < 1:
        raise ValueError(f"nothing to render: {frames} frames of {height}x{width} pixels")
    draw = np.random.default_rng(seed)
    room = np.array([draw.uniform(1.5, 3), draw.uniform(3, 6.5), draw.uniform(1.1, 1.9)])
    stations = _draw_stations(draw, room)
    scene = _draw_scene(draw, room, stations)
    focal = max(size) / 2 / math.tan(math.radians(draw.uniform(60, 80)) / 2)
    positions, rotations = _camera_path(draw, room, stations, frames)

    column = (torch.arange(width) + 0.5 - width / 2) / focal
    row = (torch.arange(height) + 0.5 - height / 2) / focal
    rays = torch.stack([column.expand(height, width), row[:, None].expand(height, width), torch.ones(height, width)])
    images, depths, points = [], [], []
    first = torch.from_numpy(rotations[0].astype(np.float32))
    for begin in range(0, frames, _CHUNK):
        turn = torch.from_numpy(rotations[begin : begin + _CHUNK].astype(np.float32))
        place = torch.from_numpy(positions[begin : begin + _CHUNK].astype(np.float32))
        direction = (turn @ rays.flatten(1)).transpose(0, 1).contiguous()  # [3, F, P]
        depth, index = _cast(scene, place.T[:, :, None], direction)
        hit = (place.T[:, :, None] + depth * direction).flatten(1).T  # [R, 3]
        pixel = depth.flatten() / focal
        colour = _shade(scene, index.flatten(), hit, direction.flatten(1).T, pixel)
        count = len(turn)
        images.append(colour.view(count, height, width, 3).permute(0, 3, 1, 2))
        depths.append(depth.view(count, height, width))
        relative = hit - torch.from_numpy(positions[0].astype(np.float32))
        points.append((relative @ first).view(count, height, width, 3))
    scale = points[0][0].norm(dim=-1).mean()
    extrinsics = np.zeros((frames, 3, 4))
    extrinsics[:, :, :3] = np.swapaxes(rotations, 1, 2) @ rotations[0]
    way = np.einsum("sji,sj->si", rotations, positions[0] - positions)
    extrinsics[:, :, 3] = way / float(scale)
    extrinsics[0] = np.eye(3, 4)
    matrix = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Sequence3D(
        images=torch.cat(images).contiguous(),
        depth=torch.cat(depths) / scale,
        points=torch.cat(points) / scale,
        extrinsics=torch.from_numpy(extrinsics.astype(np.float32)),
        intrinsics=matrix.expand(frames, 3, 3).clone(),
    )
