"""Measures a model on held-out scenes: depth from the whole stream, from two frames and from one, and poses.

    python training/mini_stream3r/measure.py src/kvsieve/zoo/mini_stream3r --scenes 16 --frames 16 --out measured.json

AbsRel is the mean of |s p - g| / g over all pixels of a sequence, with one scale s per sequence that minimises the sum
of |s p - g|. Beside the whole stream stand, for the same frames: each frame run alone, each frame after the first one
only, and the best constant (one depth for all pixels of a sequence, the one with the least AbsRel).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from kvsieve.geometry.model import STream3R
from kvsieve.geometry.pose import quaternion_to_matrix
from kvsieve.geometry.scenes import HELD_OUT
from torch import Tensor

from data import rendered


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The x that minimises the sum of `weights * |values - x|`."""
    order = values.argsort()
    below = weights[order].double().cumsum(0)
    return values[order][torch.searchsorted(below, below[-1:] / 2)[0]]


def absrel(prediction: Tensor, truth: Tensor) -> float:
    """With the one scale that minimises the sum of absolute errors."""
    p, g = prediction.flatten(), truth.flatten()
    scale = weighted_median(g / p, p)
    return ((scale * p - g).abs() / g).mean().item()


def best_constant(truth: Tensor) -> float:
    """AbsRel of the best constant."""
    g = truth.flatten()
    constant = weighted_median(g, 1 / g)
    return ((constant - g).abs() / g).mean().item()


def pose_errors(pose: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean errors over the frames after the first: rotation and field of view in degrees, translation."""
    turn = quaternion_to_matrix(pose[1:, 3:7]).mT @ quaternion_to_matrix(truth[1:, 3:7])
    cosine = (turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    angle = cosine.clamp(-1, 1).acos() * (180 / math.pi)
    still = torch.tensor([0.0, 0, 0, 1]).expand(len(truth) - 1, 4)
    moved = 2 * (truth[1:, 3:7] * still).sum(-1).abs().clamp(max=1).acos() * (180 / math.pi)
    return {
        "rotation_degrees": angle.mean().item(),
        "rotation_degrees_if_still": moved.mean().item(),
        "translation": (pose[1:, :3] - truth[1:, :3]).norm(dim=-1).mean().item(),
        "translation_if_still": truth[1:, :3].norm(dim=-1).mean().item(),
        "fov_degrees": (pose[:, 7:] - truth[:, 7:]).abs().mean().item() * (180 / math.pi),
    }


@torch.no_grad()
def scene(model: STream3R, seed: int, frames: int) -> dict[str, float]:
    """All figures of one held-out sequence."""
    batch = rendered([seed], frames, model.config["img_size"])
    images, truth = batch["images"], batch["depth"][0]
    stream = model(images)
    alone = model(images.transpose(0, 1))["depth"][:, 0, ..., 0]
    pairs = torch.stack([images[0, :1].expand(frames - 1, -1, -1, -1), images[0, 1:]], 1)
    paired = model(pairs)
    paired_depth = torch.cat([alone[:1], paired["depth"][:, 1, ..., 0]])
    paired_pose = torch.cat([stream["pose_enc"][0, :1], paired["pose_enc"][:, 1]])
    of_pair = pose_errors(paired_pose, batch["pose"][0])
    point_error = (stream["world_points"][0] - batch["points"][0]).norm(dim=-1)
    return {
        "stream": absrel(stream["depth"][0, ..., 0], truth),
        "first_and_self": absrel(paired_depth, truth),
        "alone": absrel(alone, truth),
        "constant": best_constant(truth),
        "point_error": point_error.mean().item(),
        "point_error_late": point_error[frames // 2 :].mean().item(),
        "log_depth_late": (stream["depth"][0, ..., 0].log() - truth.log())[frames // 2 :].abs().mean().item(),
        "rotation_degrees_first_and_self": of_pair["rotation_degrees"],
        "translation_first_and_self": of_pair["translation"],
    } | pose_errors(stream["pose_enc"][0], batch["pose"][0])


def held_out(model: STream3R, scenes: int, frames: int) -> dict[str, Any]:
    """Means over the first held-out scenes, and how many of them the stream wins against the frame alone."""
    training = model.training
    model.eval()
    rows = [scene(model, HELD_OUT + i, frames) for i in range(scenes)]
    model.train(training)
    means = {name: round(sum(row[name] for row in rows) / scenes, 4) for name in rows[0]}
    wins = sum(row["stream"] < row["alone"] for row in rows)
    return {"scenes": scenes, "frames": frames, **means, "scenes_where_the_stream_beats_alone": wins}


def load(path: Path) -> STream3R:
    """From an exported folder or a checkpoint of the trainer."""
    if path.is_dir():
        return STream3R.from_pretrained(path)
    saved = torch.load(path, weights_only=True)
    model = STream3R(**saved["config"])
    model.load_state_dict(saved["model"])
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported folder, or checkpoint (.pt)")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--frames", type=int, nargs="+", default=[16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = [held_out(load(options.model), options.scenes, frames) for frames in options.frames]
    for name in results[0]:
        print(f"{name:38}" + "".join(f"{result[name]:>10}" for result in results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
