"""Batches of rendered sequences, a function of seed and step alone; one process may render ahead of the training."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from kvsieve.geometry.pose import pose_encoding
from kvsieve.geometry.scenes import HELD_OUT, render_sequence
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from settings import Recipe

Batch = dict[str, Tensor]
"""`images` [B, S, 3, H, W], `depth` [B, S, H, W], `points` [B, S, H, W, 3], `pose` [B, S, 9]."""


def rendered(seeds: list[int], frames: int, side: int) -> Batch:
    """The sequences of these seeds, square images of this side."""
    sequences = [render_sequence(seed, frames, (side, side)) for seed in seeds]
    batch = {name: torch.stack([getattr(s, name) for s in sequences]) for name in ("images", "depth", "points")}
    poses = [pose_encoding(s.extrinsics, s.intrinsics, (side, side)) for s in sequences]
    return batch | {"pose": torch.stack(poses)}


class Sequences(Dataset[Batch]):
    """Item `step` is the batch of that step; every step has scenes of its own."""

    def __init__(self, recipe: Recipe, seed: int, side: int) -> None:
        self.recipe, self.seed, self.side = recipe, seed, side

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Batch:
        draw = np.random.default_rng((self.seed, step))
        length = int(draw.choice(self.recipe.lengths_at(step)))
        count = max(2, self.recipe.frames // length)
        return rendered(draw.integers(0, HELD_OUT, count).tolist(), length, self.side)


def batches(recipe: Recipe, seed: int, side: int, start: int, workers: int) -> Iterator[Batch]:
    """Batches from step `start` to the end."""
    loader: DataLoader[Batch] = DataLoader(
        Sequences(recipe, seed, side),
        batch_size=None,
        sampler=range(start, recipe.steps),
        num_workers=workers,
        prefetch_factor=6 if workers else None,
        worker_init_fn=_background,
    )
    yield from loader


def _background(_: int) -> None:
    """A rendering process takes any core, but only time that nobody else wants."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    os.nice(5)
