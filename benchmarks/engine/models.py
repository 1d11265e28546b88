"""Random-weight Llamas and the random keys and values that fill their caches, the same in every environment.

Shapes: `B` batch, `H` query heads, `Hkv` key-value heads, `T` tokens, `D` head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Shape of a model. `vocabulary` is small on purpose: the cache is what is measured, not the output layer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int = 2
    intermediate: int = 704
    vocabulary: int = 4096
    theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in one layer, all heads."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize


SIZES = {
    "S": Size(4, 256, 4),
    "M": Size(8, 512, 8, intermediate=1408),
    "llama3-8b": Size(32, 4096, 32, 8, 14336, 128_256, 500_000.0),
}
QUICK = {"S": Size(4, 256, 4), "M": Size(2, 512, 8, intermediate=1408)}
"""What `--quick` puts in the place of S and M."""


def config(size: Size) -> LlamaConfig:
    """The configuration of such a model."""
    return LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=131_072, rope_parameters={"rope_type": "default", "rope_theta": size.theta},
        initializer_range=0.05, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def build(size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> LlamaForCausalLM:
    """A model with random weights, in evaluation mode. Nothing is downloaded."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlamaForCausalLM(config(size))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A second model over the same weights, so that switching one model's attention leaves the other as it is."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


def keys_and_values(
    size: Size, tokens: int, dtype: torch.dtype, *, batch: int = 1, device: str = "cpu", seed: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Layer by layer, random keys and values `[B, Hkv, T, D]`; equal arguments give equal tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, size.kv_heads, tokens, size.head_dim)
    for _ in range(size.layers):
        keys, values = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for _ in range(2))
        yield keys, values


def token_ids(size: Size, count: int, seed: int = 2) -> Tensor:
    """`[1, count]` random ids; distinct as long as the vocabulary lasts, since equal tokens have equal keys in the
    first layer."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // size.vocabulary)
    parts = [torch.randperm(size.vocabulary, generator=generator) for _ in range(rounds)]
    return torch.cat(parts)[None, :count]


def short(tokens: int) -> str:
    """`8192` as `8k`."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
