"""The image encoder: a vision transformer with register tokens (DINOv2, arXiv 2304.07193 and 2309.16588)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from .blocks import Block

__all__ = ["Encoder"]

REGISTERS = 4


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Images `[n, 3, H, W]`, normalised, to patch tokens `[n, (H / patch) * (W / patch), C]`.

    Args:
        img_size: side of the square images that the position embedding was made for, in pixels.
        patch_size: side of a patch, in pixels.
        dim, depth, num_heads: sizes of the transformer.
    """

    def __init__(self, img_size: int, patch_size: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, img_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, REGISTERS, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused here; published checkpoints carry it
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, False, 1.0, 1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        height, width = (side // self.patch_size for side in images.shape[-2:])
        x = self.patch_embed(images)
        n = x.shape[0]
        x = torch.cat([self.cls_token.expand(n, -1, -1), x], 1) + self._positions(height, width)
        x = torch.cat([x[:, :1], self.register_tokens.expand(n, -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x, scaled_dot_product_attention)
        return self.norm(x)[:, 1 + REGISTERS :]

    def _positions(self, height: int, width: int) -> Tensor:
        """The position embedding, resized to the grid of the images at hand."""
        if height == width == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        grid = interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        grid = grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], grid], 1)
