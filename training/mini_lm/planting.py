"""Initial weights that can already look things up."""

from __future__ import annotations

import torch

from network import MiniLM

CONSTANT, LOOK_BACK, MATCH, WRITE = 4.0, 2.0, 1.6, 3.0
"""Sizes of: the constant dimension, what a positional head reads of it, what a matching head compares and writes."""
SLOW = 12
"""First rotary frequency that turns little enough over a context to compare tokens far apart."""


@torch.no_grad()
def plant_lookup(model: MiniLM) -> None:
    """Plant the two circuits that look things up, so that training has to tune them and not to find them.

    A model of this size finds induction only after millions of tokens, and then all at once. Here the first layer
    starts with a head that looks one token back and one that looks two back, and each writes the token it finds to a
    place of its own in the residual stream. In the second layer, heads start by attending to what followed the present
    token earlier, and copy it; in the third, to what came two after the previous token. Everything else is random, and
    everything is trained.
    """
    config = model.config
    size, group = config.head_dim, config.heads // config.kv_heads
    half = size // 2
    width = (config.hidden - 2 * size) // 2 * 2 - 1
    token = slice(1, 1 + width)  # dimensions of the token itself; dimension 0 is the constant
    one_back = slice(config.hidden - 2 * size, config.hidden - size)
    two_back = slice(config.hidden - size, config.hidden)
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    reads, halves = basis[:size], (basis[:size], basis[width - size :])
    slow = torch.cat([torch.arange(SLOW, half), half + torch.arange(SLOW, half)])
    frequency = config.rope_base ** -(torch.arange(half).float() / half)
    model.embed.weight[:, 1 + width :] = 0.0
    model.embed.weight[:, 0] = CONSTANT

    def cleared(layer: int, kv_head: int) -> tuple[torch.Tensor, ...]:
        """Zeroed views of a head's four matrices: queries, keys, values, output."""
        block = model.layers[layer]
        kv = slice(kv_head * size, (kv_head + 1) * size)
        query = slice(kv_head * group * size, kv_head * group * size + size)
        parts = (
            block.q_proj.weight[query],
            block.k_proj.weight[kv],
            block.v_proj.weight[kv],
            block.o_proj.weight[:, query],
        )
        for part in parts:
            part.zero_()
        return parts

    for kv_head, (back, place) in enumerate(((1, one_back), (2, two_back))):
        q, k, v, out = cleared(0, kv_head)
        q[:half, 0] = LOOK_BACK
        k[:half, 0] = LOOK_BACK * torch.cos(back * frequency)
        k[half:, 0] = LOOK_BACK * torch.sin(back * frequency)
        v[:, token] = reads
        out[place] = torch.eye(size)

    directly = MATCH * torch.eye(size)[: len(slow)]
    for kv_head in range(2):
        q, k, v, out = cleared(1, kv_head)
        q[slow, token], k[slow, one_back] = MATCH * reads[: len(slow)], directly
        v[:, token], out[token] = halves[kv_head], WRITE * halves[kv_head].T
        q, k, v, out = cleared(2, kv_head)
        q[slow, one_back], k[slow, two_back] = directly, directly
        v[:, token], out[token] = halves[kv_head], WRITE * halves[kv_head].T
