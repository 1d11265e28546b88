"""The dense head: tokens of four layers to one value per pixel, coarse to fine (DPT, arXiv 2103.13413)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

__all__ = ["DenseHead"]

FRAMES = 8
"""Frames that go through the convolutions at once; bounds memory."""


class DenseHead(nn.Module):
    """Tokens to `[B, S, H, W, channels - 1]` values and `[B, S, H, W]` confidences.

    Args:
        dim: channels of the incoming tokens.
        patch_size: pixels per patch.
        channels: values per pixel, confidence included.
        features: channels of the fusion stages.
        out_channels: channels of the four incoming maps after projection.
        activation: `"exp"` or `"inv_log"` (`sign(v) * expm1(|v|)`); confidences are `1 + exp(c)`.
    """

    def __init__(
        self, dim: int, patch_size: int, channels: int, features: int, out_channels: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        self.patch_size, self.activation = patch_size, activation
        c = list(out_channels)
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, n, 1) for n in c)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c[0], c[0], 4, 4),
                nn.ConvTranspose2d(c[1], c[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(c[3], c[3], 3, 2, 1),
            ]
        )
        self.scratch = _Scratch(features, c, channels)

    def forward(self, layers: Sequence[Tensor], height: int, width: int, specials: int) -> tuple[Tensor, Tensor]:
        """Run the head.

        Args:
            layers: four of `[B, S, P, C]`, early to late.
            height, width: of the images, in pixels.
            specials: tokens ahead of the patches.
        """
        b, s = layers[0].shape[:2]
        rows = [layer.flatten(0, 1)[:, specials:] for layer in layers]
        parts = [self._frames([row[i : i + FRAMES] for row in rows], height, width) for i in range(0, b * s, FRAMES)]
        raw = (torch.cat(parts) if len(parts) > 1 else parts[0]).permute(0, 2, 3, 1).unflatten(0, (b, s))
        value, confidence = raw[..., :-1], raw[..., -1]
        value = value.exp() if self.activation == "exp" else value.sign() * value.abs().expm1()
        return value, 1 + confidence.exp()

    def _frames(self, rows: list[Tensor], height: int, width: int) -> Tensor:
        grid = (height // self.patch_size, width // self.patch_size)
        maps = []
        for row, project, resize in zip(rows, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(row).transpose(1, 2).unflatten(2, grid))
            maps.append(resize(_with_place(x, width / height)))
        scratch = self.scratch
        x = scratch.output_conv1(scratch.fuse(maps))
        x = interpolate(x, size=(height, width), mode="bilinear", align_corners=True)
        return scratch.output_conv2(_with_place(x, width / height))


class _Scratch(nn.Module):
    """Everything behind the four maps; the name is that of published checkpoints."""

    def __init__(self, features: int, c: list[int], channels: int) -> None:
        super().__init__()
        for i, n in enumerate(c, 1):
            setattr(self, f"layer{i}_rn", nn.Conv2d(n, features, 3, padding=1, bias=False))
            setattr(self, f"refinenet{i}", _Fusion(features, with_skip=i < 4))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 1)
        )

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Four maps, fine to coarse, to one at twice the size of the finest."""
        maps = [getattr(self, f"layer{i}_rn")(x) for i, x in enumerate(maps, 1)]
        out = None
        for i in (4, 3, 2, 1):
            finest = maps[0].shape[-2:]
            size = maps[i - 2].shape[-2:] if i > 1 else (2 * finest[0], 2 * finest[1])
            out = getattr(self, f"refinenet{i}")(maps[i - 1], out, size)
        assert out is not None
        return out


class _Fusion(nn.Module):
    """Adds a finer map to what came from below, and resizes."""

    def __init__(self, features: int, with_skip: bool) -> None:
        super().__init__()
        if with_skip:
            self.resConfUnit1 = _Residual(features)
        self.resConfUnit2 = _Residual(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, below: Tensor | None, size: tuple[int, int]) -> Tensor:
        if below is not None:
            x = below + self.resConfUnit1(x)
        x = interpolate(self.resConfUnit2(x), size=size, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class _Residual(nn.Module):
    """Two convolutions around a shortcut. The shortcut carries the rectified input: published weights were trained
    with an in-place ReLU."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(x)
        return x + self.conv2(relu(self.conv1(x)))


def _with_place(x: Tensor, aspect: float) -> Tensor:
    """Add a tenth of the sine-cosine embedding of every cell's place in the image to `[n, C, h, w]`."""
    return x + _place(x.shape[1], x.shape[2], x.shape[3], aspect, x.device).to(x.dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _place(channels: int, height: int, width: int, aspect: float, device: torch.device) -> Tensor:
    """`[C, h, w]` float32, on a plane whose diagonal is that of a unit circle, base 100."""
    diagonal = (aspect**2 + 1) ** 0.5
    across = aspect / diagonal * (width - 1) / width
    down = 1 / diagonal * (height - 1) / height
    x = torch.linspace(-across, across, width, dtype=torch.float64)
    y = torch.linspace(-down, down, height, dtype=torch.float64)
    quarter = channels // 4
    omega = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    ax, ay = omega[:, None, None] * x[None, None, :], omega[:, None, None] * y[None, :, None]
    ax, ay = ax.expand(-1, height, -1), ay.expand(-1, -1, width)
    place = torch.cat([ax.sin(), ax.cos(), ay.sin(), ay.cos()])
    return (0.1 * place.float()).to(device)
