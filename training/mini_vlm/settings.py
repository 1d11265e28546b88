"""Sizes, clips and rates: every number of the recipe in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of the network."""

    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 512
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 192


@dataclass(frozen=True)
class Clip:
    """One kind of training clip: frames from step to step, frames of a clip, clips of a batch."""

    gap: tuple[int, int]
    frames: int
    batch: int


@dataclass(frozen=True)
class Recipe:
    """One training run."""

    steps: int = 2600  # with pictures, after those with text alone
    polish: int = 500  # further steps on tasks of any length, with clips cut at a random frame
    text_limit: int = 1500  # most steps with text alone
    text_batch: int = 20
    text_share: float = 0.12  # of later steps that are text alone
    clips: tuple[Clip, ...] = (Clip((1, 3), 20, 12), Clip((3, 9), 36, 8), Clip((8, 24), 60, 5))
    early: tuple[float, ...] = (0.5, 0.3, 0.2)  # how often each kind of clip, in the first half
    late: tuple[float, ...] = (0.25, 0.35, 0.4)
    mid_task: float = 0.75  # clips that start in the middle of a task
    resumed: float = 0.3  # clips whose context is a summary
    stale: float = 0.3  # of those, summaries older than the first frame
    unknown: float = 0.1  # clips without any instruction
    summary: float = 0.4  # clips that end in a summary
    late_summary: float = 0.6  # the same while polishing
    mistake: float = 0.2  # clips in which a line was said too early: what comes after it is to be right all the same
    rate: float = 2e-3  # AdamW, for embeddings, connector and vectors
    matrix_rate: float = 0.02  # Muon, for the matrices of the blocks
    warm_up: int = 60
    polish_rate: float = 0.25  # where the rate begins while polishing, to fall to zero once more
    constant: float = 0.35  # share of the steps with pictures before the rate falls
    silence_weight: float = 0.25
    counting: float = 0.3  # weight of an extra loss that teaches the picture's token how many parts are in place
    progress_weight: float = 3.0  # of the number of steps done in a summary

    def rate_at(self, step: int, video_step: int) -> float:
        """Factor on the learning rate: warm-up, constant, cosine to zero; then once more for polishing."""
        if video_step >= self.steps:
            return self.polish_rate * max(0.01, 1 - (video_step - self.steps) / self.polish)
        share = (video_step / self.steps - self.constant) / (1 - self.constant)
        falling = 1.0 if share <= 0 else 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return min(1.0, (step + 1) / self.warm_up) * max(0.01, falling)


TOY_SIZES = Sizes(width=48, layers=2, heads=2, kv_heads=1, mlp=64, vision_width=16, vision_layers=1, vision_heads=2,
                  vision_mlp=16)  # fmt: skip
TOY = replace(
    Recipe(), steps=6, polish=2, text_limit=3, text_batch=2, clips=(Clip((1, 3), 4, 2),), early=(1.0,), late=(1.0,)
)
