"""The trunk: attention within frames and attention over all frames, in turn (VGGT, arXiv 2503.11651)."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .blocks import Attend, Block, rotary_table
from .encoder import Encoder

__all__ = ["SPECIALS", "Aggregator"]

SPECIALS = 5
"""Special tokens ahead of every frame's patches: one camera token and four registers."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Frames to tokens that know of each other."""

    def __init__(
        self, img_size: int, patch_size: int, embed_dim: int, num_heads: int, depth: int, encoder_depth: int
    ) -> None:
        super().__init__()
        self.head_dim, self.depth = embed_dim // num_heads, depth
        self.patch_embed = Encoder(img_size, patch_size, embed_dim, encoder_depth, num_heads)
        self.frame_blocks = nn.ModuleList(Block(embed_dim, num_heads, True, 0.01, 1e-5) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(embed_dim, num_heads, True, 0.01, 1e-5) for _ in range(depth))
        # index 0 of the second axis is the first frame of a sequence, index 1 every other frame
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, embed_dim) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(1, 2, SPECIALS - 1, embed_dim) * 1e-6)

    def forward(
        self, images: Tensor, attend: Callable[[int], Attend], wanted: Collection[int], first: bool = True
    ) -> dict[int, Tensor]:
        """Run the trunk.

        Args:
            images: `[B, S, 3, H, W]` in [0, 1].
            attend: attention over frames, for every layer.
            wanted: layers whose outputs are returned; no other is held.
            first: whether the first of these frames is the first of its sequence.

        Returns:
            Layer to `[B, S, P, 2C]`: the outputs of its frame block and of its global block side by side.
        """
        b, s, _, height, width = images.shape
        patch = self.patch_embed.patch_size
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        pixels = (images.flatten(0, 1) - mean) / std
        patches = self.patch_embed(pixels)
        x = torch.cat([self._specials(b, s, first), patches], 1)
        p = x.shape[1]
        rope = rotary_table(height // patch, width // patch, SPECIALS, self.head_dim, x.device, x.dtype)
        out: dict[int, Tensor] = {}
        for i, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            within = frame_block(x, scaled_dot_product_attention, rope)
            x = global_block(within.view(b, s * p, -1), attend(i), rope).view(b * s, p, -1)
            if i in wanted:
                out[i] = torch.cat([within, x], -1).view(b, s, p, -1)
        return out

    def _specials(self, b: int, s: int, first: bool) -> Tensor:
        """`[B * S, 5, C]`."""
        tokens = torch.cat([self.camera_token, self.register_token], 2)[0]
        slot = torch.ones(s, dtype=torch.long, device=tokens.device)
        if first:
            slot[0] = 0
        return tokens[slot].expand(b, -1, -1, -1).flatten(0, 1)
