"""The seams of `transformers`, and everything that differs between its versions. Nothing is patched.

Two public registries carry it: an attention function and a mask function, both under the name `kvsieve`, switched
on for one model only. The mask function returns a description (`MaskSpec`) that every cache layer evaluates on its
own table of original positions; the attention function finds the layer through a tag on the key tensor.
"""

from __future__ import annotations

import sys
import threading
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

from .errors import UnsupportedModelError, UnsupportedOperationError
from .view import Visibility

if TYPE_CHECKING:
    from .cache_layer import SieveLayer

__all__ = [
    "MaskSpec",
    "attention_modules",
    "check_model",
    "enable",
    "enabled",
    "hook_hidden_states",
    "reset_stock_layer",
    "text_config",
]

NAME = "kvsieve"
TAG = "_kvsieve_layer"
"""Attribute of a key tensor, and of its value tensor, that names the cache layer they came from."""
BEFORE = "_kvsieve_before"
"""Attribute of an attention module: what it used before kvsieve, for calls that do not come from one of its caches."""


class _Expected(threading.local):
    """The layer that has handed out keys and waits for their attention."""

    layer: weakref.ref[SieveLayer] | None = None


_expected = _Expected()


class _Traced:
    """The same while a graph is traced, where neither a tag on a tensor nor a thread of its own can be seen. Outside of
    tracing it is empty; tracing goes one at a time."""

    layer: SieveLayer | None = None


_traced = _Traced()


class MaskSpec:
    """A mask that is not yet evaluated. Travels through the model in the place of the mask tensor."""

    ndim = 4
    """What models ask of a mask that is ready made, as `generate` makes it for static caches."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self._visibility: Visibility | None = None
        self._tensors: dict[str, Tensor | None] = {}

    @property
    def visibility(self) -> Visibility:
        """The same in kvsieve's words."""
        if self._visibility is None:
            start, count = int(self.arguments.get("q_offset", 0)), int(self.arguments["q_length"])
            padding = self.arguments.get("attention_mask")
            if padding is not None:
                if padding.shape[-1] < start + count:
                    raise UnsupportedOperationError(
                        f"the attention mask has {padding.shape[-1]} columns, but the cache has seen {start} tokens "
                        f"and {count} are new; it must cover all {start + count}"
                    )
                padding = padding[:, : start + count].bool()
                padding = None if bool(padding.all()) else padding
            function = self.arguments.get("mask_function", causal_mask_function)
            function = None if function is causal_mask_function else function
            self._visibility = Visibility(start, count, padding, function)
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


def _mask_function(*args: Any, **kwargs: Any) -> MaskSpec | None:
    if args:
        raise UnsupportedModelError("this version of transformers passes masks in a way kvsieve does not know")
    _traced.layer = None  # tracing may have ended in an error
    if isinstance(kwargs.get("kv_offset"), Tensor) and kwargs["mask_function"] is causal_mask_function:
        _check_real(kwargs.get("attention_mask"))
        return None
    _expected.layer = None  # a new forward pass: an older one that was interrupted expects nothing any more
    made = kwargs.get("attention_mask")
    return made if isinstance(made, MaskSpec) else MaskSpec(**kwargs)


def _check_real(mask: Any) -> None:
    """Raise if the one new token is padding. Slots of fixed capacity know themselves what they hold, so nothing else in
    a 2-D mask counts; in a graph the token is taken to be real."""
    if isinstance(mask, Tensor) and not torch.compiler.is_compiling() and not bool(mask[:, -1].all()):
        raise UnsupportedOperationError(
            "a cache of fixed capacity takes padding in prompts only, not for a single token; use SieveCache"
        )


def tag(keys: Tensor, values: Tensor, layer: SieveLayer) -> None:
    """Mark what `layer` hands to the model, and expect its attention next."""
    if torch.compiler.is_compiling():
        _traced.layer = layer
        return
    setattr(keys, TAG, layer)
    setattr(values, TAG, layer)
    _expected.layer = weakref.ref(layer)


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    layer: SieveLayer | None = _traced.layer if torch.compiler.is_compiling() else None
    if layer is None:
        layer = getattr(key, TAG, None)
        expected = None if _expected.layer is None else _expected.layer()
        _expected.layer = None
    else:
        expected = _traced.layer = None
    index = getattr(module, "layer_idx", None)
    if layer is not None:
        if index is not None and index != layer.layer_idx:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends to the keys of another layer of the cache, which is not supported"
            )
        return layer.attention(module, query, key, value, attention_mask, **kwargs), None
    if expected is not None and expected.layer_idx == index and isinstance(attention_mask, MaskSpec | None):
        raise UnsupportedModelError(
            f"{type(module).__name__} changes its keys after the cache has stored them, so what attention sees cannot "
            "be evicted"
        )
    implementation = implementation_before(module)
    mask = attention_mask.tensor(implementation) if isinstance(attention_mask, MaskSpec) else attention_mask
    return _function(implementation, module)(module, query, key, value, mask, **kwargs)


def implementation_before(module: nn.Module) -> str:
    """The attention implementation that this module used before kvsieve."""
    return getattr(module, BEFORE, "sdpa")


def _function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for owner in type(module).__mro__:
        function = getattr(sys.modules[owner.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(f"{type(module).__name__} has no eager attention that kvsieve can find")


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


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose cache is not one list of keys and values per decoder layer.

    Raises:
        UnsupportedModelError: encoder-decoder models, cross-attention, keys shared between layers, latent attention.
    """
    name, config = type(model).__name__, text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; kvsieve manages decoder-only caches")
    if getattr(config, "cross_attention_layers", None) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has cross-attention layers, which are not supported")
    if not getattr(config, "is_causal", True):
        raise UnsupportedModelError(f"{name} is not causal: its keys depend on tokens to come")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise UnsupportedModelError(f"{name} shares keys between layers, which is not supported")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} caches one compressed latent for all heads (multi-head latent attention), which is not supported"
        )


def enabled(config: PretrainedConfig) -> bool:
    """Whether the decoder with this configuration attends through kvsieve."""
    return config._attn_implementation == NAME


def enable(model: PreTrainedModel) -> None:
    """Route this model's decoder attention through kvsieve. Other caches of the model go on as before.

    Raises:
        UnsupportedModelError: the model does not take its attention function from the registry.
    """
    AttentionInterface.register(NAME, _attention_function)
    AttentionMaskInterface.register(NAME, _mask_function)
    _remember(model)
    config = text_config(model)
    if enabled(config):
        return
    if _takes_attention_from_registry(model, config):
        key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is config), None)
        model.set_attn_implementation({key: NAME} if key and config is not model.config else NAME)
    if not enabled(config):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take its attention from the registry of transformers, so its cache "
            "cannot be managed"
        )


def _remember(model: PreTrainedModel) -> None:
    """Note in every attention module what it uses now, unless that is kvsieve already."""
    default = "sdpa" if model._supports_sdpa else "eager"
    for module in model.modules():
        used = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if used is None or isinstance(module, PreTrainedModel):
            continue
        if used != NAME:
            setattr(module, BEFORE, used)
        elif not hasattr(module, BEFORE):
            setattr(module, BEFORE, default)


def _takes_attention_from_registry(model: PreTrainedModel, config: PretrainedConfig) -> bool:
    """Asked beforehand, because setting the implementation of such a model does nothing but log a warning."""
    decoders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config]
    return all(getattr(decoder, "_can_set_attn_implementation", lambda: True)() for decoder in decoders)


def hook_hidden_states(modules: dict[int, nn.Module]) -> None:
    """Let the cache layers of kvsieve see the input of these attention modules. Changes nothing in the model's
    computation; layers that do not ask, and other caches, are left alone."""
    for module in modules.values():
        if _take_hidden_states not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_take_hidden_states, with_kwargs=True)


def _take_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    layers: Any = getattr(cache, "layers", ())
    index: Any = module.layer_idx
    layer = layers[index] if index < len(layers) else None
    if getattr(layer, "wants_hidden", False):
        setattr(layer, "hidden", kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def reset_stock_layer(layer: Any) -> None:
    """Empty a layer that kvsieve does not manage. Before transformers 5.16 the dynamic ones kept their (zeroed)
    tokens and went on behind them."""
    layer.reset()
    if getattr(layer, "keys", None) is not None and not hasattr(layer, "max_cache_len"):
        layer.keys = layer.values = None
        layer.is_initialized = False
