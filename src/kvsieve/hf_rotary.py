"""The rotary embedding of a model, found in its own modules and checked against its own keys."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .errors import UnsupportedModelError
from .hf import attention_modules, text_config
from .rope import Rotary

__all__ = ["rotary_of"]


def rotary_of(model: PreTrainedModel, layers: Sequence[int] | None = None, any_length: bool = False) -> Rotary:
    """The decoder's rotary embedding, checked by its self-test and against the layers themselves.

    Args:
        layers: decoder layers whose keys it has to rotate; all by default.
        any_length: refuse frequencies that change with the length of the sequence.

    Raises:
        UnsupportedModelError: there is none, or its rotations cannot be shifted exactly.
    """
    modules, config = attention_modules(model), text_config(model)
    if "mrope" in str(getattr(config, "rope_parameters", "")):
        raise UnsupportedModelError(
            f"{type(model).__name__} rotates by several axes (text, rows and columns of pictures), and a number of "
            'tokens is no distance on them; use positions="original" and a method that does not need rotary positions'
        )
    module = _rotary_module(model, config)
    if module is None or not modules:
        raise UnsupportedModelError(f"{type(model).__name__} has no rotary embedding that kvsieve can find")
    source = sys.modules[type(next(iter(modules.values()))).__module__]
    rotate = getattr(source, "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedModelError(f"{source.__name__} has no apply_rotary_pos_emb")
    forward = inspect.unwrap(type(module).forward)
    per_type = "layer_type" in inspect.signature(forward).parameters
    layer_type = ("full_attention",) if per_type else ()
    kind = getattr(module, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get("full_attention")
    if kind is None:
        raise UnsupportedModelError(f"{type(model).__name__} does not rotate the keys of its full-attention layers")
    if any_length and ("dynamic" in kind or kind == "longrope"):
        raise UnsupportedModelError(
            f"this model's rotary embedding ({kind}) changes its frequencies with the length of the sequence, so its "
            'keys cannot be shifted past that; use positions="original"'
        )
    scaling = getattr(module, "full_attention_attention_scaling", None) if per_type else None
    scaling = float(getattr(module, "attention_scaling", 1.0) if scaling is None else scaling)

    def cos_sin(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = forward(module, torch.zeros(1, device=positions.device), positions, *layer_type)
        return cos / scaling, sin / scaling

    device = next(module.buffers()).device
    if device.type == "meta":
        return Rotary(cos_sin, lambda x, cos, sin: rotate(x, x, cos, sin)[1])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = torch.zeros(1, device=device)
    part = _part(rotate, head_dim, *cos_sin(torch.zeros(1, 1, device=device)))

    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rotate(x[..., :part], x[..., :part], cos, sin)[1]
        return torch.cat([turned, x[..., part:]], -1) if part < x.shape[-1] else turned

    made = Rotary(cos_sin, apply)
    # on a copy, because dynamic embeddings remember the longest sequence they have seen
    twin = copy.deepcopy(module)
    made.self_test(head_dim, lambda x, p: apply(x.to(device), *twin(like, p.to(device), *layer_type)).cpu())
    for index in modules if layers is None else layers:
        _check_layer(modules[index], index, made, lambda x, p: twin(x, p, *layer_type), config.hidden_size)
    return made


def _part(rotate: Callable[..., Any], head_dim: int, cos: Tensor, sin: Tensor) -> int:
    """How many channels the model hands to its function: all of them, or those that are rotated."""
    try:
        x = torch.zeros(1, 1, 1, head_dim, device=cos.device)
        return int(rotate(x, x, cos, sin)[1].shape[-1])
    except RuntimeError:
        return cos.shape[-1]


class _Keys(Exception):  # noqa: N818 (not an error)
    """Carries the keys that an attention module hands to its cache, and ends the call."""


class _Catch:
    """Stands in for a cache."""

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Keys(key_states)


@torch.no_grad()
def _check_layer(
    module: nn.Module, index: int, rotary: Rotary, cos_sin: Callable[..., tuple[Tensor, Tensor]], width: int
) -> None:
    """Compare shifted keys with those that the layer itself makes at another place. Layers without rotation, or that
    change their keys after it, do not pass."""
    weight = next(p for p in module.parameters() if p.is_floating_point())
    hidden = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)

    def keys(place: int) -> Tensor:
        embeddings = cos_sin(hidden, torch.tensor([[place]], device=weight.device))
        parameters = inspect.signature(module.forward).parameters
        cache = "layer_past" if "layer_past" in parameters else "past_key_values"
        try:
            module(hidden_states=hidden, position_embeddings=embeddings, attention_mask=None, **{cache: _Catch()})
        except _Keys as caught:
            return caught.args[0]
        except Exception as error:
            raise UnsupportedModelError(f"{type(module).__name__} cannot be asked for its keys ({error})") from error
        raise UnsupportedModelError(f"{type(module).__name__} does not hand its keys to the cache")

    first, want = keys(3), keys(40)
    got = rotary.shift(first, torch.full(first.shape[:3], 37, device=first.device))
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < (1e-3 if weight.dtype.itemsize > 2 else 5e-2):
        raise UnsupportedModelError(
            f"layer {index} does not rotate its keys, or changes them after it (relative error {error:.1e}), so they "
            'cannot be shifted; use positions="original" and a method that does not need rotary positions'
        )


def _rotary_module(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module | None:
    """The module that holds the decoder's inverse frequencies."""
    found = [
        module
        for name, module in model.named_modules()
        if "vision" not in name
        and "visual" not in name
        and any(b.endswith("inv_freq") for b, _ in module.named_buffers(recurse=False))
    ]
    own = [module for module in found if getattr(module, "config", None) is config]
    return next(iter(own or found), None)
