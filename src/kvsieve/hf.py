"""The seams of `transformers`, and everything that differs between its versions. Nothing is patched.

Two public registries carry it: an attention function and a mask function, both under the name `kvsieve`, switched
on for one model only. The mask function returns a description (`MaskSpec`) that every cache layer evaluates on its
own table of original positions; the attention function finds the layer through a tag on the key tensor.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attention import attend
from .errors import UnsupportedModelError
from .rope import Rotary
from .view import Visibility

if TYPE_CHECKING:
    from .cache import SieveLayer

__all__ = ["MaskSpec", "attention_modules", "enable", "hook_hidden_states", "rotary_of", "text_config"]

NAME = "kvsieve"
TAG = "_kvsieve_layer"
"""Attribute of a key tensor that names the cache layer it came from."""

_fallback: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""What each attention module used before kvsieve, for calls that do not come from one of its caches."""
_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class MaskSpec:
    """A mask that is not yet evaluated. Travels through the model in the place of the mask tensor."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self._visibility: Visibility | None = None
        self._tensors: dict[str, Tensor | None] = {}

    @property
    def visibility(self) -> Visibility:
        """The same in kvsieve's words."""
        if self._visibility is None:
            padding = self.arguments.get("attention_mask")
            if padding is not None:
                padding = padding.bool()
                padding = None if bool(padding.all()) else padding
            function = self.arguments.get("mask_function", causal_mask_function)
            self._visibility = Visibility(
                start=int(self.arguments.get("q_offset", 0)),
                count=int(self.arguments["q_length"]),
                padding=padding,
                function=None if function is causal_mask_function else function,
            )
        return self._visibility

    def tensor(self, implementation: str) -> Tensor | None:
        """The ordinary mask, for layers that kvsieve does not manage."""
        if implementation not in self._tensors:
            self._tensors[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
        return self._tensors[implementation]

    def to(self, *args: Any, **kwargs: Any) -> MaskSpec:
        """Nothing to move: masks are made where the keys are."""
        return self

    def contiguous(self) -> MaskSpec:
        """Nothing to lay out."""
        return self


def _mask_function(*args: Any, **kwargs: Any) -> MaskSpec:
    if args:
        raise UnsupportedModelError("this version of transformers passes masks in a way kvsieve does not know")
    return MaskSpec(**kwargs)


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    layer: SieveLayer | None = getattr(key, TAG, None)
    if layer is not None:
        return layer.attention(module, query, key, value, attention_mask, **kwargs), None
    implementation = _fallback.get(module, "sdpa")
    mask = attention_mask.tensor(implementation) if isinstance(attention_mask, MaskSpec) else attention_mask
    if implementation == "eager":
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward")
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, query, key, value, mask, **kwargs)


def stock_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """What the stock model computes, `[B, T, H, Dv]`."""
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Configuration of the decoder whose cache is managed."""
    return model.config.get_text_config(decoder=True)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The decoder's self-attention modules by layer index."""
    config = text_config(model)
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if index is None or "vision" in name or "visual" in name or getattr(module, "is_cross_attention", False):
            continue
        owner = getattr(module, "config", None)
        if owner is None or getattr(owner, "model_type", None) != config.model_type:
            continue
        if "Attention" in type(module).__name__:
            found.setdefault(index, module)
    return found


def enable(model: PreTrainedModel) -> None:
    """Route this model's decoder attention through kvsieve. Other caches of the model go on as before."""
    AttentionInterface.register(NAME, _attention_function)
    AttentionMaskInterface.register(NAME, _mask_function)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError("encoder-decoder models are not supported; kvsieve manages decoder-only caches")
    config = text_config(model)
    previous = config._attn_implementation
    if previous == NAME:
        return
    modules = attention_modules(model)
    if config is model.config:
        model.set_attn_implementation(NAME)
    else:
        key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is config), None)
        model.set_attn_implementation({key: NAME} if key else NAME)
    if text_config(model)._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from the registry of transformers, so its cache "
            "cannot be managed"
        )
    for module in modules.values():
        _fallback[module] = previous or "sdpa"


def hook_hidden_states(modules: dict[int, nn.Module]) -> None:
    """Let the cache layers of kvsieve see the input of these attention modules. Changes nothing in the model's
    computation; layers that do not ask, and other caches, are left alone."""
    for module in modules.values():
        if module not in _hooked:
            module.register_forward_pre_hook(_take_hidden_states, with_kwargs=True)
            _hooked.add(module)


def _take_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    layers = getattr(cache, "layers", None)
    if layers is None:
        return
    layer = layers[module.layer_idx]
    if getattr(layer, "wants_hidden", False):
        layer.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The decoder's rotary embedding, checked by its self-test.

    Raises:
        UnsupportedModelError: there is none, or its rotations cannot be shifted exactly.
    """
    modules = attention_modules(model)
    rotary = next(
        (
            m
            for name, m in model.named_modules()
            if "vision" not in name
            and "visual" not in name
            and any(b.endswith("inv_freq") for b, _ in m.named_buffers(recurse=False))
        ),
        None,
    )
    if rotary is None or not modules:
        raise UnsupportedModelError(f"{type(model).__name__} has no rotary embedding that kvsieve can find")
    source = sys.modules[type(next(iter(modules.values()))).__module__]
    rotate = getattr(source, "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedModelError(f"{source.__name__} has no apply_rotary_pos_emb")
    forward = inspect.unwrap(type(rotary).forward)
    per_type = "layer_type" in inspect.signature(forward).parameters
    layer_type = ("full_attention",) if per_type else ()
    scaling = getattr(rotary, "full_attention_attention_scaling", None) if per_type else None
    scaling = float(getattr(rotary, "attention_scaling", 1.0) if scaling is None else scaling)
    axes = 3 if "mrope" in str(getattr(text_config(model), "rope_parameters", "")) else 0

    def raw(run: Callable[..., Any], positions: Tensor) -> tuple[Tensor, Tensor]:
        shaped = positions[None].expand(axes, -1, -1) if axes else positions
        cos, sin = run(torch.zeros(1, device=positions.device), shaped, *layer_type)
        return cos, sin

    def cos_sin(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = raw(lambda *a: forward(rotary, *a), positions)
        return cos / scaling, sin / scaling

    def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, x, cos, sin)[1]

    made = Rotary(cos_sin, apply, text_only=not axes)
    device = next(rotary.buffers()).device
    config = text_config(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device.type != "meta":
        made.self_test(head_dim, lambda x, p: apply(x.to(device), *raw(rotary, p.to(device))).cpu())
    return made


def core_attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """kvsieve's own attention in the layout of transformers, `[B, T, H, Dv]`."""
    return attend(query, key, value, **kwargs).transpose(1, 2).contiguous()
