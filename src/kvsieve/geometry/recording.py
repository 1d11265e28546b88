"""One run over one sequence: what it predicted, what it held and how long it took, in memory that stays bounded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .model import STream3R
from .pose import decode_pose
from .runs import Run

__all__ = ["Frames", "Recording", "look_alone", "record"]

POINTS = 1_000_000
"""Points of a recording at most; pixels are left out evenly where there are more."""


class Frames(Protocol):
    """A sequence of images, such as a tensor `[S, 3, H, W]`, or one that reads files as they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """`[3, H, W]` in [0, 1]."""
        ...


@dataclass
class Recording:
    """`S` frames of one run.

    Attributes:
        depth: float32 `[S, H, W]`; a file if a folder was given.
        pose: `[S, 9]`, see `pose.py`.
        points, confidence, colours: `[S, h, w, 3]`, `[S, h, w]` and `[S, 3, h, w]` of every `stride`-th pixel.
        tokens: per frame, the tokens that each layer of the trunk held after it.
        held: per frame, bytes of keys and values held after it, trunk and camera head together.
        seconds: per frame.
        report: `StreamSession.report()` after the last frame.
        policy: what the trunk's layers followed.
        peak: largest memory of the GPU during the run, model included, where there is one.
    """

    depth: NDArray[np.float32]
    pose: Tensor
    points: Tensor
    confidence: Tensor
    colours: Tensor
    stride: int
    tokens: list[list[int]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    peak: int | None = None

    @property
    def extrinsics(self) -> Tensor:
        """World to camera `[S, 3, 4]`."""
        return decode_pose(self.pose, (self.depth.shape[1], self.depth.shape[2]))[0]

    def depth_of(self, frames: int | slice) -> Tensor:
        """Depth of one frame `[H, W]` or of some `[s, H, W]`, in memory."""
        return torch.from_numpy(np.array(self.depth[frames]))


def record(
    model: STream3R,
    run: Run,
    frames: Frames,
    folder: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Recording:
    """Stream `frames` one by one.

    Args:
        model: on any device.
        run: what to keep.
        frames: the images.
        folder: where depth is kept, as `depth.npy`; in memory by default.
        tick: called after every frame.
    """
    session = run.session(model, predictions="last")
    device = next(model.parameters()).device
    out: Recording | None = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for index in range(len(frames)):
        image = frames[index][None].to(device)
        _wait(device)
        begun = time.perf_counter()
        predicted = session.forward_stream(image)
        _wait(device)
        seconds = time.perf_counter() - begun
        if out is None:
            out = _empty(len(frames), (image.shape[-2], image.shape[-1]), folder)
        _take(out, index, {name: value[0, 0].float().cpu() for name, value in predicted.items()})
        report = session.report()
        out.seconds.append(seconds)
        out.tokens.append(report["tokens_per_layer"])
        out.held.append(report["bytes_held"] + report["camera"]["bytes_held"])
        tick()
    assert out is not None
    out.report = session.report()
    assert session.memory.policy is not None
    out.policy = session.memory.policy.to_dict()
    if device.type == "cuda":
        out.peak = torch.cuda.max_memory_allocated(device)
    return out


@torch.no_grad()
def look_alone(model: STream3R, frames: Frames) -> Tensor:
    """Depth `[S, H, W]` of frames that see nothing but themselves."""
    device = next(model.parameters()).device
    depth = [model(frames[index][None].to(device))["depth"][0, 0, ..., 0] for index in range(len(frames))]
    return torch.stack(depth).float().cpu()


def _empty(count: int, size: tuple[int, int], folder: Path | None) -> Recording:
    height, width = size
    stride = max(1, math.ceil(math.sqrt(count * height * width / POINTS)))
    h, w = -(-height // stride), -(-width // stride)
    shape = (count, height, width)
    if folder is None:
        depth: NDArray[np.float32] = np.empty(shape, dtype=np.float32)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        depth = np.lib.format.open_memmap(folder / "depth.npy", mode="w+", dtype=np.float32, shape=shape)
    return Recording(
        depth,
        torch.empty(count, 9),
        torch.empty(count, h, w, 3),
        torch.empty(count, h, w),
        torch.empty(count, 3, h, w),
        stride,
    )


def _take(out: Recording, index: int, frame: dict[str, Tensor]) -> None:
    step = slice(None, None, out.stride)
    out.depth[index] = frame["depth"][..., 0].numpy()
    out.pose[index] = frame["pose_enc"]
    out.points[index] = frame["world_points"][step, step]
    out.confidence[index] = frame["world_points_conf"][step, step]
    out.colours[index] = frame["images"][:, step, step]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
