"""Long caches without a long prefill: random keys and values go straight into the layers, the same into every cache.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `T` tokens, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaForCausalLM

from kvsieve import Policy, SieveCache, get_policy
from kvsieve.surrogates import KVzapSurrogate, SurrogateShape
from kvsieve.view import Visibility

from .models import Size, keys_and_values

CHUNK = 512
"""Tokens at a time where a policy is to evict on the way."""


def fill_stock(
    cache: Cache, size: Size, tokens: int, dtype: torch.dtype, *, batch: int = 1, device: str = "cpu"
) -> None:
    """Fill a cache of `transformers`, static or dynamic."""
    for index, (keys, values) in enumerate(keys_and_values(size, tokens, dtype, batch=batch, device=device)):
        cache.update(keys, values, index)


def fill_sieve(
    cache: SieveCache, size: Size, tokens: int, dtype: torch.dtype, *, chunk: int | None = None, batch: int = 1,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Feed the layers of a `SieveCache` the same keys and values, with random queries and hidden states, as if they
    came from a prompt: the policy scores and evicts.

    Args:
        chunk: tokens per pass; all at once by default. Under a budget that always holds, the work of a pass is then
            bounded by chunk and budget, whatever the length.
    """
    stored = keys_and_values(size, tokens, dtype, batch=batch, device=device)
    for layer, (keys, values) in zip(cache.managed, stored, strict=True):
        layer.lazy_initialization(keys, values)
        generator = torch.Generator(device).manual_seed(4)
        for start in range(0, tokens, chunk or tokens):
            end = min(start + (chunk or tokens), tokens)
            queries = random_queries(size, end - start, dtype, generator, batch, device)
            hidden = random_hidden(size, end - start, dtype, generator, batch, device) if layer.wants_hidden else None
            layer.core.append(keys[:, :, start:end], values[:, :, start:end])
            layer.core.observe(queries, Visibility(start, end - start), hidden)
    for layer in cache.managed:
        layer.core.settle()


def random_queries(
    size: Size, tokens: int, dtype: torch.dtype, generator: torch.Generator, batch: int = 1, device: str = "cpu"
) -> Tensor:
    """`[B, H, T, D]`."""
    return torch.randn(batch, size.heads, tokens, size.head_dim, generator=generator, dtype=dtype, device=device)


def random_hidden(
    size: Size, tokens: int, dtype: torch.dtype, generator: torch.Generator, batch: int = 1, device: str = "cpu"
) -> Tensor:
    """`[B, T, hidden]`."""
    return torch.randn(batch, tokens, size.hidden, generator=generator, dtype=dtype, device=device)


def surrogate(size: Size, device: str = "cpu") -> KVzapSurrogate:
    """A random linear KVzap surrogate of the model's shape."""
    torch.manual_seed(5)
    return KVzapSurrogate(SurrogateShape(size.hidden, size.kv_heads, None, size.layers)).to(device)


def threshold_of(scorer: KVzapSurrogate, size: Size, removed: float) -> float:
    """The threshold that removes about this share of random tokens, over all layers and heads."""
    generator = torch.Generator().manual_seed(6)
    hidden = random_hidden(size, 2048, torch.float32, generator).to(next(iter(scorer.parameters())).device)
    scores = torch.cat([scorer.score(layer, hidden).flatten() for layer in range(size.layers)])
    return float(scores.quantile(removed))


def removing(name: str, size: Size, removed: float, scorer: KVzapSurrogate | None = None) -> Policy:
    """A method that takes this share away after the prompt; KVzap by a threshold that does about that."""
    if name == "kvzap":
        scorer = scorer or surrogate(size)
        return get_policy("kvzap", scorer=scorer, threshold=threshold_of(scorer, size, removed))
    return get_policy(name, compression_ratio=removed)


def steps(model: LlamaForCausalLM, cache: Cache, count: int) -> None:
    """Decode `count` tokens, one at a time."""
    token = torch.zeros(_rows(cache), 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        for _ in range(count):
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _rows(cache: Cache) -> int:
    if isinstance(cache, SieveCache):
        return cache.managed[0].core.store.batch
    first: Any = cache.layers[0]
    return int(first.keys.shape[0])


def held(cache: SieveCache) -> Iterator[float]:
    """Tokens per head of every layer, on average."""
    for counts in cache.report()["tokens_held"].values():
        yield torch.tensor(counts).float().mean().item()
