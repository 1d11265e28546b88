"""A tiny model with weights that make every part matter, and frames to show it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvsieve.geometry import STream3R

SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "num_heads": 2,
    "depth": 3,
    "encoder_depth": 1,
    "camera_depth": 1,
    "camera_num_heads": 2,
    "dpt_features": 8,
    "dpt_out_channels": [8, 8, 8, 8],
    "dpt_layers": [0, 1, 2, 2],
}
TOKENS = 5 + 16
"""Tokens of a 32 x 32 frame."""
DEPTH = SIZES["depth"]


@cache
def tiny() -> STream3R:
    """Random weights, scaled up where the usual start would hide a mistake."""
    torch.manual_seed(0)
    model = STream3R(**SIZES).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("gamma"):
                value.fill_(0.5)
            elif "token" in name:
                value.normal_(std=0.5)
            elif "qkv.weight" in name:
                value.mul_(3)
    return model


def frames(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    """`[count, 3, H, W]`: images that change slowly, with new detail in every one."""
    g = torch.Generator().manual_seed(seed)
    base, step = torch.rand(3, *size, generator=g), torch.rand(count, 3, *size, generator=g)
    mix = torch.linspace(0, 0.5, count)[:, None, None, None]
    return ((1 - mix) * base + mix * step).clamp(0, 1)


def stream(session: Any, images: Tensor) -> list[list[int]]:
    """Feed frame by frame; tokens per layer after each."""
    sizes = []
    for image in images:
        session.forward_stream(image[None])
        sizes.append(session.tokens_per_layer())
    return sizes
