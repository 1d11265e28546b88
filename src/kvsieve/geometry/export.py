"""Depth pictures and coloured point clouds in files that common viewers open."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError, PolicyError
from .images import pillow

__all__ = [
    "SCALE_KEY",
    "colourise",
    "depth_limits",
    "point_cloud",
    "write_depth_png",
    "write_glb",
    "write_ply",
    "write_raw_depth_png",
]

SCALE_KEY = "depth_scale"
"""Text field of a raw depth PNG: integer value = depth * scale."""
_MILLIMETRES, _LARGEST = 1000.0, 65535
_ANCHORS = (
    (34, 22, 92),
    (30, 62, 130),
    (20, 104, 142),
    (42, 145, 133),
    (104, 183, 104),
    (189, 211, 87),
    (252, 238, 160),
)
"""Near to far: dark blue to pale yellow, lightness rising evenly, told apart without red and green."""
_INVALID = (128, 128, 128)


def write_depth_png(
    path: str | os.PathLike[str], depth: Tensor, limits: tuple[float, float] | None = None
) -> tuple[float, float]:
    """A coloured picture of a depth map: near is dark blue, far is pale yellow, invalid is grey.

    Args:
        path: file to write; missing folders are made.
        depth: `[H, W]`; values that are not finite or not above 0 are invalid.
        limits: depth of the first and of the last colour; values beyond take the end colours. None takes the 2nd and
            98th percentile of the valid pixels. Give the frames of a video one pair, or their colours do not compare.

    Returns:
        The limits used.

    Raises:
        DataError: another rank, or no limits were given and no pixel is valid.
        PolicyError: limits that are not finite or not in order.
    """
    values = _map(depth)
    if limits is None:
        limits = depth_limits(depth)
    pillow().fromarray(colourise(values, limits)).save(_ready(path), format="PNG")
    return limits


def write_raw_depth_png(path: str | os.PathLike[str], depth: Tensor, scale: float | None = None) -> float:
    """A 16-bit grey PNG of integers `round(depth * scale)`; 0 marks invalid pixels.

    Args:
        path: file to write; missing folders are made.
        depth: `[H, W]`; values that are not finite or not above 0 become 0.
        scale: integers per unit of depth. None takes 1000 (millimetres if depth is in metres), or 65535 over the
            largest depth where that would not fit. Give the frames of a video one scale.

    Returns:
        The scale used, which the file also holds as the text field `SCALE_KEY`: depth = value / scale.

    Raises:
        DataError: another rank, or depth that does not fit 16 bits at the scale given.
        PolicyError: a scale that is not finite or not above 0.
    """
    values = _map(depth).astype(np.float64)
    valid = np.isfinite(values) & (values > 0)
    largest = float(values[valid].max()) if valid.any() else 0.0
    if scale is None:
        scale = _MILLIMETRES if largest * _MILLIMETRES <= _LARGEST else _LARGEST / largest
    if not (np.isfinite(scale) and scale > 0):
        raise PolicyError(f"scale={scale} must be a finite number above 0: integers per unit of depth")
    if round(largest * scale) > _LARGEST:
        raise DataError(
            f"depth up to {largest:.4g} at scale {scale:.4g} exceeds the {_LARGEST} of 16 bits; use a scale of at most "
            f"{_LARGEST / largest}"
        )
    pixels = np.zeros(values.shape, dtype=np.uint16)
    pixels[valid] = np.rint(values[valid] * scale).astype(np.uint16)
    text = pillow("PngImagePlugin").PngInfo()
    text.add_text(SCALE_KEY, repr(float(scale)))
    pillow().fromarray(pixels).save(_ready(path), format="PNG", pnginfo=text)
    return float(scale)


def depth_limits(depth: Tensor) -> tuple[float, float]:
    """2nd and 98th percentile of the valid values, of any shape; the second is always the larger one.

    Raises:
        DataError: no value is finite and above 0.
    """
    values = depth.detach().double().cpu().numpy()
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        raise DataError("no depth is valid: it must be finite and above 0 somewhere")
    low, high = (float(limit) for limit in np.percentile(values, (2, 98)))
    return (low, high) if high > low else (low, low * 1.001 + 1e-9)


def colourise(depth: Tensor | NDArray[np.floating], limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Colours `[..., 3]` of depth `[...]`, as in `write_depth_png`.

    Raises:
        PolicyError: limits that are not finite or not in order.
    """
    low, high = limits
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise PolicyError(f"limits={limits} must be two finite depths, the first below the second")
    values = np.asarray(depth.detach().cpu() if isinstance(depth, Tensor) else depth, dtype=np.float64)
    valid = np.isfinite(values) & (values > 0)
    places = np.clip((np.where(valid, values, low) - low) / (high - low), 0, 1) * (len(_ANCHORS) - 1)
    anchors = np.array(_ANCHORS, dtype=np.float64)
    channels = [np.interp(places, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    colours = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    colours[~valid] = _INVALID
    return colours


def point_cloud(
    predictions: Mapping[str, Tensor], conf_percentile: float = 30, max_points: int = 500_000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The confident points of all frames with the colours of their pixels.

    Args:
        predictions: `world_points` `[S, H, W, 3]`, `world_points_conf` `[S, H, W]` and `images` `[S, 3, H, W]` in
            [0, 1]; other keys are left alone.
        conf_percentile: share in percent, 0 to below 100, of least confident points over all frames that are left
            out; points that are not finite are left out first.
        max_points: a larger cloud is thinned to so many at random.
        seed: of the thinning.

    Returns:
        Points float32 `[N, 3]` and colours uint8 `[N, 3]`, on the CPU, in the order of the frames.

    Raises:
        DataError: a key is missing, shapes do not fit, or no point is finite.
        PolicyError: a percentile or a number of points outside its range.
    """
    if not 0 <= conf_percentile < 100:
        raise PolicyError(f"conf_percentile={conf_percentile} must be at least 0 and below 100 (percent left out)")
    if max_points < 1:
        raise PolicyError(f"max_points={max_points} must be 1 or more")
    missing = [name for name in ("world_points", "world_points_conf", "images") if name not in predictions]
    if missing:
        raise DataError(
            f"predictions lack {', '.join(missing)}; they have {', '.join(sorted(predictions)) or 'nothing'}"
        )
    points, confidence, images = (
        predictions[name].detach().float().cpu() for name in ("world_points", "world_points_conf", "images")
    )
    if points.ndim != 4 or points.shape[-1] != 3 or confidence.shape != points.shape[:3]:
        raise DataError(
            f"world_points {list(points.shape)} and world_points_conf {list(confidence.shape)} must be [S, H, W, 3] "
            "and [S, H, W]: take one sequence of a batch"
        )
    frames, height, width = confidence.shape
    if images.shape != (frames, 3, height, width):
        raise DataError(f"images {list(images.shape)} must be {[frames, 3, height, width]}, as the points")
    points, confidence = points.reshape(-1, 3), confidence.reshape(-1)
    kept = (points.isfinite().all(dim=1) & confidence.isfinite()).nonzero().squeeze(1)
    if not len(kept):
        raise DataError(f"none of {len(points)} points is finite, so there is nothing to show")
    bound = float(np.percentile(confidence[kept].numpy(), conf_percentile))
    kept = kept[confidence[kept] >= bound]
    if len(kept) > max_points:
        thinned = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:max_points]
        kept = kept[thinned.sort().values]
    colours = images.permute(0, 2, 3, 1).reshape(-1, 3)[kept]
    return points[kept], (colours.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def write_ply(path: str | os.PathLike[str], points: Tensor, colors: Tensor) -> None:
    """A binary little-endian PLY: vertices with float x, y, z and uchar red, green, blue.

    Args:
        path: file to write; missing folders are made.
        points: `[N, 3]`, finite, written as float32 without a change of axes.
        colors: uint8 `[N, 3]`.

    Raises:
        DataError: other shapes or types, or points that are not finite.

    Source: the Stanford polygon file format 1.0.
    """
    places, colours = _cloud(points, colors)
    record = np.dtype([("place", "<f4", 3), ("colour", "u1", 3)])
    vertices = np.empty(len(places), dtype=record)
    vertices["place"], vertices["colour"] = places, colours
    fields = [f"property float {axis}" for axis in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(places)}", *fields, "end_header", ""]
    _ready(path).write_bytes("\n".join(header).encode("ascii") + vertices.tobytes())


def write_glb(path: str | os.PathLike[str], points: Tensor, colors: Tensor) -> None:
    """A binary glTF 2.0 file with one cloud of coloured points, for viewers and web pages.

    glTF's y points up and its viewers look along -z, so y and z change their sign.

    Args:
        path: file to write; missing folders are made.
        points: `[N, 3]`, N at least 1, finite, with axes right, down, forward (OpenCV).
        colors: uint8 `[N, 3]`, sRGB.

    Raises:
        DataError: no point, other shapes or types, or points that are not finite.

    Source: Khronos glTF 2.0, sections 3.6 (accessors), 3.7 (meshes) and 4.4 (the binary container).
    """
    places, colours = _cloud(points, colors)
    if not len(places):
        raise DataError("a GLB file needs at least one point; lower conf_percentile, or write a PLY")
    places = places * np.array([1, -1, -1], dtype="<f4")
    # glTF's vertex colours are linear light; 16 bits keep the dark ones apart, the fourth channel keeps 4-byte steps.
    light = np.full((len(colours), 4), _LARGEST, dtype="<u2")
    light[:, :3] = np.rint(_linear(colours) * _LARGEST)
    blobs = (places.tobytes(), light.tobytes())
    ends = np.cumsum([len(blob) for blob in blobs]).tolist()
    document = {
        "asset": {"version": "2.0", "generator": "kvsieve"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1}, "mode": 0}]}],
        "buffers": [{"byteLength": ends[-1]}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": end - len(blob), "byteLength": len(blob), "target": 34962}
            for blob, end in zip(blobs, ends, strict=True)
        ],
        "accessors": [
            {
                "bufferView": 0, "componentType": 5126, "count": len(places), "type": "VEC3",
                "min": places.min(axis=0).tolist(), "max": places.max(axis=0).tolist(),
            },
            {"bufferView": 1, "componentType": 5123, "normalized": True, "count": len(places), "type": "VEC4"},
        ],
    }  # fmt: skip
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    data = b"".join(blobs)
    data += b"\0" * (-len(data) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
    _ready(path).write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def _linear(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """sRGB bytes as linear light in [0, 1] (IEC 61966-2-1)."""
    values = colours / 255.0
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _map(depth: Tensor) -> NDArray[np.float32]:
    if depth.ndim != 2 or not depth.numel():
        raise DataError(f"depth has shape {list(depth.shape)}; one map [H, W] is needed, such as depth[frame]")
    return np.asarray(depth.detach().float().cpu())


def _cloud(points: Tensor, colors: Tensor) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    if points.ndim != 2 or points.shape[1] != 3 or colors.shape != points.shape or colors.dtype != torch.uint8:
        raise DataError(
            f"points {list(points.shape)} and colors {colors.dtype} {list(colors.shape)} do not fit: [N, 3] and uint8 "
            "[N, 3] are needed"
        )
    places = points.detach().cpu().float().numpy().astype("<f4")
    bad = int((~np.isfinite(places)).any(axis=1).sum())
    if bad:
        raise DataError(f"{bad} of {len(places)} points are NaN, infinite or too large for float32; drop them first")
    return places, colors.detach().cpu().numpy()


def _ready(path: str | os.PathLike[str]) -> Path:
    """The path, with its folder made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
