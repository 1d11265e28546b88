"""Tiny random models of every family that kvsieve is tested with.

Weights are drawn wide (`initializer_range=0.4`), so that logits are of order ten and a single wrong key is visible.
Nothing is downloaded. `build` makes a new model each time; `stock` caches one that tests must leave as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCAB = 211
IMAGE = 5
FIRST_WORD, LAST_WORD = 10, 209
WINDOW = 24
"""Sliding window of the layers that have one."""

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.4,
}
HYBRID = {"num_hidden_layers": 4, "sliding_window": WINDOW}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _text(name: str, **defaults: Any) -> Callable[..., PreTrainedModel]:
    """A builder for `<name>ForCausalLM`; a default of `None` under a key of `BASE` removes that key."""
    return lambda **changes: _causal(name, {**BASE, **defaults, **changes})


def _causal(name: str, values: dict[str, Any]) -> PreTrainedModel:
    config = name.removesuffix("Text")
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{config}ForCausalLM")
    return model_class(config_class(**values))


def causal(name: str, **changes: Any) -> PreTrainedModel:
    """Any other `<name>ForCausalLM`, small and in evaluation mode."""
    torch.manual_seed(0)
    return _causal(name, {**BASE, **changes}).eval()


def _neox(**changes: Any) -> PreTrainedModel:
    values = {**BASE, "rotary_pct": 0.25, **changes}
    values.pop("num_key_value_heads")
    return _causal("GPTNeoX", values)


def _gpt_oss(**changes: Any) -> PreTrainedModel:
    values = {**BASE, **HYBRID, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}
    values.setdefault("layer_types", MIXED)
    values.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    model = _causal("GptOss", values)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    return model


def _qwen25_vl(**changes: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        "in_channels": 3, "initializer_range": 0.4,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**BASE, "rope_parameters": rope, **changes}, vision_config=vision, **_QWEN_TOKENS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(**changes: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1], "initializer_range": 0.4,
    }  # fmt: skip
    text = {**BASE, "head_dim": 16, "rope_parameters": rope, **changes}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def _smolvlm(**changes: Any) -> PreTrainedModel:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "initializer_range": 0.4,
    }  # fmt: skip
    config = transformers.SmolVLMConfig(
        text_config={**BASE, "model_type": "llama", **changes}, vision_config=vision, image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config)


TEXT: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _text("Llama"),
    "qwen2": _text("Qwen2"),
    "qwen3": _text("Qwen3", head_dim=16),
    "mistral": _text("Mistral", sliding_window=None),
    "ministral": _text("Ministral", **HYBRID, head_dim=16, layer_types=MIXED),
    "gemma2": _text("Gemma2", **HYBRID, head_dim=16, query_pre_attn_scalar=16, layer_types=MIXED),
    "gemma3": _text("Gemma3Text", **HYBRID, head_dim=16, query_pre_attn_scalar=16, layer_types=MIXED),
    "phi3": _text("Phi3", partial_rotary_factor=0.5, sliding_window=None),
    "gpt_oss": _gpt_oss,
    "gpt_neox": _neox,
}
VISION: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2_5_vl": _qwen25_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}
FAMILIES = {**TEXT, **VISION}
EAGER = {"gemma2", "gpt_oss"}
"""Families with softcap or sinks, which only eager attention computes: equal within 1e-5, not to the bit."""


def build(
    name: str, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A new model of the family, in evaluation mode. In float64 its norms really compute in float64."""
    torch.manual_seed(seed)
    model = FAMILIES[name](**changes).eval().to(dtype)
    attention = attention or ("eager" if name in EAGER else None)
    if attention is not None:
        model.set_attn_implementation(attention)
    if dtype == torch.float64:
        if name == "gpt_oss":
            model.set_experts_implementation("eager")  # the default has no float64
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(_wide_norm, module)  # type: ignore[method-assign]
    return model


def _wide_norm(module: Any, x: Tensor) -> Tensor:
    """RMS norm without the detour through float32 that the models make."""
    eps = getattr(module, "eps", None) or module.variance_epsilon
    weight = 1 + module.weight if type(module).__name__.startswith("Gemma") else module.weight
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@cache
def stock(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The family's model, untouched by kvsieve; shared between tests."""
    return build(name, dtype)


@cache
def managed(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights as `stock`, for tests that put a `SieveCache` on it; shared between tests."""
    return build(name, dtype)


def words(batch: int, length: int, seed: int = 1) -> Tensor:
    """`[batch, length]` random token ids that mean nothing special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, LAST_WORD, (batch, length), generator=generator)


def prompt(name: str, batch: int = 1, length: int = 20, padded: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Model inputs: `input_ids` and `attention_mask`, and an image per row for a vision-language family. With
    `padded`, row `i` has `3 * (batch - 1 - i)` pad tokens on the left."""
    ids = words(batch, length, seed)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            pads = 3 * (batch - 1 - row)
            ids[row, :pads], mask[row, :pads] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in VISION:
        inputs |= _images(name, ids, seed)
    return inputs


def _images(name: str, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """Put four image tokens into every row of `ids` (in place) and return the pictures behind them."""
    generator = torch.Generator().manual_seed(seed + 100)
    batch, start = ids.shape[0], ids.shape[1] - 9
    ids[:, start : start + 4] = IMAGE
    if name == "smolvlm":
        return {"pixel_values": torch.randn(batch, 1, 3, 16, 16, generator=generator)}
    ids[:, start - 1], ids[:, start + 4] = 7, 8
    patches = 16
    return {
        "pixel_values": torch.randn(batch * patches, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
