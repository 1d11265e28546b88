"""Long streams through one layer, without a model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch

from kvsieve.layer import KVLayer
from kvsieve.measure import kept_positions
from kvsieve.policy import Policy
from kvsieve.view import Visibility


def feed(layer: KVLayer, count: int, padding: torch.Tensor | None = None) -> None:
    """`count` more tokens, as a host feeds them; nobody asks for the attention. `padding`: `[B, columns]`."""
    rows = 1 if padding is None else padding.shape[0]
    start = layer.seen
    layer.append(torch.zeros(rows, 1, count, 1), torch.zeros(rows, 1, count, 1))
    visibility = Visibility(start, count, None if padding is None else padding[:, : layer.seen])
    layer.mark_padding(visibility)
    layer.observe(None, visibility)


def chunks_of(length: int, size: int) -> list[int]:
    """Whole chunks, and what is left."""
    return [min(size, length - start) for start in range(0, length, size)]


def stream(policy: Policy, chunks: Iterable[int], most: int | None = None) -> list[int]:
    """Positions kept of a stream that comes in these chunks; after each, no more than `most` tokens are held."""
    layer = KVLayer(policy)
    for count in chunks:
        feed(layer, count)
        assert most is None or layer.store.tokens <= most
    return kept(layer)


def kept(layer: KVLayer, row: int = 0) -> list[int]:
    """Positions that a row of a layer holds, ascending."""
    return [position for position in kept_positions(layer)[row, 0].tolist() if position >= 0]


def largest_gap(positions: list[int]) -> int:
    """Largest distance between neighbours."""
    return max(b - a for a, b in pairwise(positions))
