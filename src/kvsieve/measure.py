"""What layers hold, measured from their storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layer import KVLayer
from .ledger import KEY, KIND, POSITION, VALUE, Kind

__all__ = ["kept_positions", "measure", "real_tokens"]


def measure(layers: Sequence[KVLayer]) -> dict[str, Any]:
    """Tokens and bytes of some layers of one cache. Padding counts as neither seen nor held.

    Returns:
        `tokens_seen`: real tokens fed, per batch row. `tokens_held`: per layer, `[B][Hkv]` counts. `bytes_held`:
        bytes of the storages behind keys and values. `bytes_spare`: the part of them that holds no real token: free
        room for the next ones, and padding where the policy has not looked yet. `bytes_ledger`: records beside them.
        `bytes_full`: keys and values if nothing had been evicted. `compression_ratio`: share of keys and values
        removed, in tokens. `evictions`: how often a layer has let tokens go.
    """
    used = [layer for layer in layers if layer.seen]
    held = {layer.layer_idx: real_tokens(layer).sum(-1) for layer in used}
    tokens = {layer.layer_idx: int(held[layer.layer_idx].sum()) for layer in used}
    full = {layer.layer_idx: sum(layer.real_seen) * layer.store.heads for layer in used}
    bytes_held = sum(layer.store.bytes_of((KEY, VALUE)) for layer in used)
    return {
        "tokens_seen": used[0].real_seen if used else [],
        "tokens_held": {index: counts.tolist() for index, counts in held.items()},
        "bytes_held": bytes_held,
        "bytes_spare": bytes_held - sum(tokens[layer.layer_idx] * layer.store.bytes_per_token for layer in used),
        "bytes_ledger": sum(layer.store.bytes_of(set(layer.store.columns) - {KEY, VALUE}) for layer in used),
        "bytes_full": sum(full[layer.layer_idx] * layer.store.bytes_per_token for layer in used),
        "compression_ratio": 1 - sum(tokens.values()) / sum(full.values()) if sum(full.values()) else 0.0,
        "evictions": sum(layer.evictions for layer in used),
    }


def kept_positions(layer: KVLayer) -> Tensor:
    """`[B, Hkv, N]` int64 original positions of the real tokens that a layer holds, ascending; -1 behind the last token
    of heads that hold fewer. Empty before the first token."""
    if not layer.seen:
        return torch.empty(0, 0, 0, dtype=torch.long)
    real = real_tokens(layer)
    behind = torch.iinfo(torch.long).max
    table = torch.where(real, layer.store.read(POSITION).long(), behind).sort(-1).values
    return table.masked_fill(table == behind, -1)[..., : int(real.sum(-1).max())]


def real_tokens(layer: KVLayer) -> Tensor:
    """`[B, Hkv, N]` bool: slots that hold a real token."""
    live = layer.store.live
    return live & (layer.store.read(KIND) != Kind.PAD) if layer.has_pads else live
