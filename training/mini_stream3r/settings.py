"""What is trained, on which sequence lengths and at which rates: every number of the recipe in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SIZES: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 128,
    "num_heads": 4,
    "depth": 5,
    "encoder_depth": 2,
    "camera_depth": 1,
    "camera_num_heads": 4,
    "dpt_features": 24,
    "dpt_out_channels": [24, 32, 48, 48],
    "dpt_layers": [1, 2, 3, 4],
}
"""Arguments of `STream3R`."""

TOY_SIZES: dict[str, Any] = SIZES | {
    "img_size": 32,
    "embed_dim": 32,
    "depth": 4,
    "encoder_depth": 1,
    "dpt_features": 8,
    "dpt_out_channels": [8, 8, 8, 8],
    "dpt_layers": [0, 1, 2, 3],
}


@dataclass(frozen=True)
class Recipe:
    """One training run. Shares are of all steps."""

    steps: int
    frames: int = 16  # per step, spread over as many sequences as fit, two at least
    lengths: tuple[tuple[float, tuple[int, ...]], ...] = (  # until this share of the run: lengths to draw from
        (0.15, (1, 2, 2, 3)),
        (0.30, (2, 3, 4)),
        (0.55, (3, 4, 6, 8)),
        (0.87, (4, 6, 8, 12)),
        (1.00, (8, 12, 16)),
    )
    warm_up: int = 40  # steps
    decay: float = 0.8  # share of the run, at its end, over which the rates fall to zero
    matrix_rate: float = 0.02  # Muon, for the matrices of encoder and trunk
    vector_rate: float = 2e-3  # AdamW, for what is no matrix in the trunk: gains, biases, tokens, positions
    head_rate: float = 1e-3  # AdamW, for the heads
    confidence: float = 0.2  # what a small confidence costs; see losses.py
    points: float = 0.3  # weights of the losses beside the one on depth
    pose: float = 0.5
    edges: float = 1.5
    matching: float = 0.1
    shift: float = 0.1

    def lengths_at(self, step: int) -> tuple[int, ...]:
        """Sequence lengths that a step may have."""
        return next(lengths for share, lengths in self.lengths if step < share * self.steps or share == 1)

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates: warm-up, constant, linear decay to zero."""
        rising = (step + 1) / min(self.warm_up, 1 + self.steps // 10)
        falling = (self.steps - step) / max(1, self.decay * self.steps)
        return min(1.0, rising, falling)


TOY = replace(Recipe(steps=12), frames=4, lengths=((1.0, (2,)),))
