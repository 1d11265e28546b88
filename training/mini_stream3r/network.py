"""The starting weights of the small model, and a training forward that skips work on the way."""

from __future__ import annotations

import math
from typing import Any

import torch
from kvsieve.geometry.aggregator import SPECIALS
from kvsieve.geometry.blocks import Attend, batch_attention
from kvsieve.geometry.model import STream3R
from torch import Tensor, nn

from matching import LAYERS, SHIFT_LAYER

LAYER_SCALE = 0.3  # the published 0.01 is for networks five times as deep, and for many more steps
START_POSE = (0, 0, 0, 0, 0, 0, 1, 1.1, 1.1)  # no motion, 63 degrees


def build(sizes: dict[str, Any], seed: int) -> STream3R:
    """A model that is ready to learn within a few thousand steps."""
    torch.manual_seed(seed)
    model = STream3R(**sizes)
    trunk = model.aggregator
    with torch.no_grad():
        for block in [*trunk.frame_blocks, *trunk.global_blocks, *model.camera_head.trunk]:
            block.ls1.gamma.fill_(LAYER_SCALE)
            block.ls2.gamma.fill_(LAYER_SCALE)
        for block in trunk.global_blocks:  # queries and keys start alike: what looks the same attends to each other
            query, key, _ = block.attn.qkv.weight.chunk(3)
            key.copy_(query)
        encoder = trunk.patch_embed
        encoder.pos_embed[:, 1:] = 0.5 * _grid_embedding(encoder.grid, sizes["embed_dim"])
        for tokens in (trunk.camera_token, trunk.register_token, encoder.cls_token, encoder.register_tokens):
            nn.init.normal_(tokens, std=0.5)
        last = model.camera_head.pose_branch.fc2
        last.weight.mul_(0.1)
        last.bias.copy_(torch.tensor(START_POSE) / 4)  # the four rounds add up
        for head in (model.depth_head, model.point_head):
            for part in head.modules():
                if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                    _keep_size(part)
            last = head.scratch.output_conv2[2]
            last.weight.mul_(0.3)
            last.bias.zero_()
    return model


def _keep_size(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Start with weights that keep the size of what passes. With torch's defaults the image would fade on its way
    through the head, next to the place embedding, which is added late."""
    inputs = layer.in_channels if isinstance(layer, nn.ConvTranspose2d) else layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _grid_embedding(grid: int, dim: int) -> Tensor:
    """Sines and cosines of row and column, [grid * grid, dim]."""
    places = (torch.arange(grid) + 0.5) * (math.pi / grid)
    waves = torch.outer(places, torch.arange(1, dim // 4 + 1) * (grid / (dim // 4)))
    line = torch.cat([waves.sin(), waves.cos()], 1)
    both = torch.cat([line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)], -1)
    return both.flatten(0, 1)


def predict(model: STream3R, images: Tensor, point_frames: Tensor) -> dict[str, Any]:
    """What the loss needs of the causal forward pass over [B, S, 3, H, W].

    The points, which cost as much as the depth, are computed for the frames `point_frames` only.
    Queries and keys of the blocks that learn to match are returned as `looked`.
    """
    frames, (height, width) = images.shape[1], images.shape[-2:]
    trunk = batch_attention("causal", frames, model.tokens_per_frame(height, width))
    looked: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int) -> Attend:
        def recorded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            looked[layer] = query, key
            return trunk(query, key, value)

        return recorded if layer in LAYERS else trunk

    layers = model.aggregator(images, attend, {*model.dpt_layers, model.aggregator.depth - 1})
    camera = batch_attention("causal", frames, 1)
    trunk_width = model.config["embed_dim"]
    poses = model.camera_head(layers[model.aggregator.depth - 1][:, :, 0], lambda *_: camera)
    read = [layers[i] for i in model.dpt_layers]
    depth, depth_conf = model.depth_head(read, height, width, SPECIALS)
    some = [layer[:, point_frames] for layer in read]
    points, points_conf = model.point_head(some, height, width, SPECIALS)
    return {
        "poses": poses,
        "depth": depth[..., 0],
        "depth_conf": depth_conf,
        "points": points,
        "points_conf": points_conf,
        "looked": looked,
        "tokens": layers[SHIFT_LAYER][:, :, SPECIALS:, trunk_width:],
    }
