"""Independent references: the stock model over the whole text with an explicit mask, and a Llama written by hand.

Neither uses any code of kvsieve; what a `SieveCache` reports to hold is all that they take from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Notes:
    """Which keys each query could see in every managed layer, from what the cache reports after every forward pass.

    Attributes:
        visible: per layer `[B, Hkv, N, N]` bool.
    """

    def __init__(self, cache: Any, mask: Tensor) -> None:
        """`mask`: `[B, N]`, the padding mask of everything that is going to be fed."""
        self.cache, self.pads = cache, mask.bool()[:, None, None, :]
        self.length = mask.shape[1]
        self.causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        self.start = 0
        self.held: dict[int, Tensor] = {}
        self.visible: dict[int, Tensor] = {}

    def take(self) -> None:
        """Call after a forward pass."""
        start, end = self.start, self.cache.get_seq_length()
        if start == end:
            return
        for layer in self.cache.report()["managed_layers"]:
            kept = as_mask(self.cache.kept_positions(layer), self.length)
            before = self.held.get(layer, torch.zeros_like(kept))
            rows = before[:, :, None] | self.causal[start:end] & (torch.arange(self.length) >= start)
            table = self.visible.get(layer, rows[:, :, :0])
            self.visible[layer] = torch.cat([table, rows & self.pads], 2)
            self.held[layer] = kept
        self.start = end


class NoteTaker(StoppingCriteria):
    """Takes notes while `generate` runs; never stops it. With `settle`, what the cache holds back until it knows which
    tokens are rejected is carried out first, on a copy."""

    def __init__(self, notes: Notes, settle: bool = False) -> None:
        self.notes, self.settle = notes, settle

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        cache = self.notes.cache
        if self.settle:
            self.notes.cache = copy.deepcopy(cache)
            self.notes.cache.crop(0)
        self.notes.take()
        self.notes.cache = cache
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def places(mask: Tensor) -> Tensor:
    """Position ids of a padded batch."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def feed(
    model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, sizes: Iterable[int], notes: Notes | None = None
) -> Tensor:
    """Feed `ids` `[B, N]` in pieces; logits `[B, N, V]`. `mask` covers what the cache has seen before, too."""
    seen, start, logits = cache.get_seq_length(), 0, []
    for size in sizes:
        end = start + size
        out = model(
            input_ids=ids[:, start:end], attention_mask=mask[:, : seen + end], past_key_values=cache, use_cache=True,
            position_ids=places(mask)[:, seen + start : seen + end],
        )  # fmt: skip
        logits.append(out.logits)
        if notes is not None:
            notes.take()
        start = end
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


def as_mask(kept: Tensor, length: int) -> Tensor:
    """`[B, Hkv, n]` positions (-1 is nothing) -> `[B, Hkv, length]` bool."""
    table = torch.zeros(*kept.shape[:2], length + 1, dtype=torch.bool)
    return table.scatter_(-1, kept.where(kept >= 0, length), True)[..., :length]


@contextmanager
def masked(model: PreTrainedModel, visible: dict[int, Tensor]):
    """Within, the attention of these layers sees exactly what `visible` says, `[B, Hkv, N, N]` bool."""
    text = model.config.get_text_config(decoder=True)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            layer = getattr(module, "layer_idx", None)
            if layer in visible and "Attention" in type(module).__name__ and "vision" not in name:
                table = visible[layer].repeat_interleave(text.num_attention_heads // visible[layer].shape[1], 1)
                if text._attn_implementation == "eager":
                    lowest = torch.finfo(model.dtype).min
                    table = torch.zeros(table.shape, dtype=model.dtype).masked_fill(~table, lowest)
                handle = module.register_forward_pre_hook(_replace(table), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _replace(mask: Tensor) -> Callable[..., tuple[Any, Any]]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        assert "attention_mask" in kwargs
        return args, {**kwargs, "attention_mask": mask}

    return hook


@torch.no_grad()
def reference(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, visible: Any, **extra: Any) -> Tensor:
    """Logits `[B, N, V]` of the stock model in one forward pass, where evicted keys are masked (see `masked`)."""
    with masked(model, visible):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra).logits


# ---- positions inside the cache


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the first channels of `x` `[..., D]` by `angles` `[..., r / 2]`, in halves as Llama does."""
    half = angles.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class HandLlama:
    """A Llama written by hand that caches keys before rotation, and rotates what is held to places 0..n-1 afresh in
    every step, with the newest query at n-1. What each head holds is given from outside, before every step."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            head_dim = config.hidden_size // config.num_attention_heads
            self.frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
            self.scaling = 1.0
        else:
            self.frequencies, self.scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        self.model, self.frequencies = model.model, self.frequencies.to(model.dtype)
        self.head = model.lm_head
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @torch.no_grad()
    def step(self, ids: Tensor, held: dict[int, Tensor]) -> Tensor:
        """Logits `[B, T, V]` of new tokens; `held`: per layer `[B, Hkv, seen]` bool."""
        batch, count = ids.shape
        x = self.model.embed_tokens(ids)
        for index, layer in enumerate(self.model.layers):
            attention, inner = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (part(inner).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                       for part in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
            if index == len(self.keys):
                self.keys.append(k[:, :, :0])
                self.values.append(v[:, :, :0])
            self.keys[index] = torch.cat([self.keys[index], k], 2)
            self.values[index] = torch.cat([self.values[index], v], 2)
            out = torch.empty_like(q)
            for b in range(batch):
                for h in range(k.shape[1]):
                    seen = self.keys[index].shape[2] - count
                    mine = held.get(index, torch.zeros(batch, k.shape[1], seen, dtype=torch.bool))[b, h]
                    where = torch.cat([mine.nonzero()[:, 0], torch.arange(seen, seen + count)])
                    group = slice(h * q.shape[1] // k.shape[1], (h + 1) * q.shape[1] // k.shape[1])
                    out[b, group] = self._attend(q[b, group], self.keys[index][b, h, where],
                                                 self.values[index][b, h, where], attention.scaling)  # fmt: skip
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.model.norm(x))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        count, n = q.shape[1], k.shape[0]
        angles = torch.arange(n, dtype=k.dtype)[:, None] * self.frequencies
        keys, queries = rotate(k, angles) * self.scaling, rotate(q, angles[n - count :]) * self.scaling
        logits = queries @ keys.T * scaling
        logits = logits.masked_fill(~torch.ones(count, n, dtype=torch.bool).tril(n - count), -torch.inf)
        return logits.softmax(-1) @ v


class UnrotatedLayer(DynamicLayer):
    """A stock layer for a model that is told that every token is at place 0, so that its keys come unrotated. They are
    handed to attention at places ..., -2, -1, 0 among the tokens of their head that are visible."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.visible = torch.empty(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        newer = self.visible.flip(-1).cumsum(-1).flip(-1) - self.visible.long()
        return rotate(keys, -newer[..., None] * self.frequencies), values
