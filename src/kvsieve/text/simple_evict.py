"""Sinks, recent tokens and blocks between them by slot, under the names of an earlier system.

For code written against that system. The same choice as a policy, which follows original positions and so does not
forget the middle of a text that comes in chunks, is the method `sink_recent_uniform`.

Three things differ on purpose: evenly spaced blocks are reckoned in whole numbers (float32 was off by one block here
and there), a strategy that is not known raises instead of keeping everything, and eviction happens or raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PolicyError, UnsupportedOperationError
from ..methods.sink_recent_uniform import sampled

__all__ = ["SimpleEvictConfig", "build_simple_keep_token_idx", "evict_dynamic_cache_inplace"]


@dataclass
class SimpleEvictConfig:
    """What to keep.

    Attributes:
        sink_tokens: first slots that stay; negative counts as zero.
        recent_tokens: last slots that stay; negative counts as zero.
        middle_strategy: `"none"`, or `"uniform"`: whole blocks of what lies between; upper and lower case are equal.
        middle_budget_tokens: tokens for these blocks; only whole blocks are kept, but one at least.
        uniform_stride: instead of a budget: every so many blocks.
    """

    sink_tokens: int = 256
    recent_tokens: int = 512
    middle_strategy: str = "none"
    middle_budget_tokens: int = 0
    uniform_stride: int = 0

    @property
    def cache_target(self) -> int:
        """Tokens above which the earlier system evicts; not a bound: a budget below one block keeps one block, and a
        stride keeps as much as there is."""
        budgeted = _strategy(self) == "uniform" and self.uniform_stride == 0
        return self.sink_tokens + self.recent_tokens + (self.middle_budget_tokens if budgeted else 0)


def build_simple_keep_token_idx(
    *,
    total_len: int,
    block_n: int = 128,
    cfg: SimpleEvictConfig,
    abs_pos: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Slots that stay, `[kept]` int64, ascending.

    Sinks, recent slots, and blocks of slots (`block * block_n` and on) that lie wholly between them. Up to
    `sink_tokens + recent_tokens` slots all stay; above, slots leave even if there are fewer than `cfg.cache_target`.

    Args:
        total_len: slots held.
        block_n: slots per block.
        cfg: what to keep.
        abs_pos: accepted and not used, as before: slots are chosen, not positions.
        device: where the result lies; the CPU by default.

    Raises:
        PolicyError: an unknown strategy, or a block of less than one slot.
    """
    strategy = _strategy(cfg)
    if block_n < 1:
        raise PolicyError(f"block_n must be 1 or more, not {block_n}")
    sink, recent = max(cfg.sink_tokens, 0), max(cfg.recent_tokens, 0)
    slot = torch.arange(total_len, device=device)
    if total_len <= sink + recent:
        return slot
    stays = (slot < sink) | (slot >= total_len - recent)
    stride, budget = max(cfg.uniform_stride, 0), cfg.middle_budget_tokens
    if strategy == "uniform" and (stride or budget > 0):
        start = -(-sink // block_n)
        count = torch.tensor((total_len - recent) // block_n - start, device=device)
        keep = torch.tensor(max(1, budget // block_n), device=device)
        stays |= sampled(slot // block_n - start, count, keep, stride)
    return slot[stays]


def evict_dynamic_cache_inplace(pkv: Any, keep_idx: Tensor) -> None:
    """Keep the slots `keep_idx` of every layer of a `transformers.DynamicCache` and free the others.

    Keys keep the rotation they came with, and positions go on: afterwards `pkv.get_seq_length()` still counts the
    tokens fed, so that the model and `generate` give the next token the position, and the mask, that it has without
    eviction. A caller who passes `position_ids` counts from there too: tokens fed, not slots held. The next tokens see
    what is held, as in a full forward pass where the evicted keys are masked. For batches without padding.

    Args:
        pkv: the cache; its layers are replaced in place.
        keep_idx: `[kept]` distinct slots, for all rows, heads and layers alike.

    Raises:
        UnsupportedOperationError: another kind of cache, a layer that is not a plain growing one (sliding windows,
            static or quantized storage), or layers that hold different numbers of tokens. Nothing is evicted then.
        PolicyError: slots that are not there, or twice.
    """
    from ._evicted import EvictedLayer, plain_layers

    layers = plain_layers(pkv)
    held = layers[0].keys.shape[-2]
    if any(layer.keys.shape[-2] != held for layer in layers):
        raise UnsupportedOperationError(
            f"the layers of this cache hold {sorted({layer.keys.shape[-2] for layer in layers})} tokens; one set of "
            "slots fits layers of one length only"
        )
    index = torch.as_tensor(keep_idx)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise PolicyError(f"keep_idx must be a list of slots, [kept] integers, not {list(index.shape)} {index.dtype}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < held:
        raise PolicyError(
            f"keep_idx names slots {int(index.min())} to {int(index.max())}; this cache holds slots 0 to {held - 1}"
        )
    if index.unique().numel() < index.numel():
        raise PolicyError("keep_idx names a slot twice; its key would count twice in attention")
    for i, layer in enumerate(layers):
        pkv.layers[i] = EvictedLayer.of(layer, index.sort().values.to(layer.keys.device))


def _strategy(cfg: SimpleEvictConfig) -> str:
    name = str(cfg.middle_strategy).lower()
    if name not in ("none", "uniform"):
        raise PolicyError(f'middle_strategy={cfg.middle_strategy!r} is not "none" or "uniform"')
    return name
