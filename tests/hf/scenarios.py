"""Ways of calling `generate`, and policies to call it with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import models
from kvsieve import Policy, SieveCache, get_policy, list_methods
from kvsieve.surrogates import KVzapSurrogate, SurrogateShape

NEW_TOKENS = 8
SMALL: dict[str, dict[str, Any]] = {
    "adakv_snapkv": {"window_size": 4, "kernel_size": 3},
    "expected_attention": {"n_sink": 2, "n_future_positions": 16},
    "h2o": {"window_size": 4},
    "kvzap": {"window": 4},
    "ladder": {"n_sink": 2},
    "lagkv": {"n_sink": 2, "lag_size": 3},
    "pyramidkv": {"window_size": 4, "kernel_size": 3, "beta": 4},
    "sink_recent": {"sink_tokens": 2, "recent_tokens": 4},
    "sink_recent_uniform": {"sink_tokens": 2, "recent_tokens": 4, "block_size": 2},
    "snapkv": {"window_size": 4, "kernel_size": 3},
    "streaming_llm": {"n_sink": 2},
}
"""Hyper-parameters that make sense for texts of a few dozen tokens."""
METHODS = list_methods()
REPRESENTATIVE = ["streaming_llm", "h2o", "adakv_snapkv"]

GREEDY: dict[str, Any] = {"do_sample": False}
HOW: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "chunked": {**GREEDY, "prefill_chunk_size": 7},
    "padded": GREEDY,
    "beam": {**GREEDY, "num_beams": 3},
    "beam_padded": {**GREEDY, "num_beams": 2},
    "sample": {"do_sample": True},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "lookup": {**GREEDY, "prompt_lookup_num_tokens": 3},
    "assisted": GREEDY,
    "assisted_badly": GREEDY,
}


def policy(name: str, budget: Any = 10_000, family: str = "llama", **settings: Any) -> Policy:
    """A method with small hyper-parameters and, by default, a budget that nothing here reaches. `family` matters to
    learned methods only."""
    if name == "full":
        return get_policy(name)
    if name == "kvzap":
        settings.setdefault("scorer", surrogate(family))
    return get_policy(name, budget=budget, **{**SMALL.get(name, {}), **settings})


@cache
def surrogate(family: str) -> KVzapSurrogate:
    """A random surrogate of the right shape."""
    config = models.stock(family).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    torch.manual_seed(3)
    return KVzapSurrogate(SurrogateShape(config.hidden_size, heads, None, config.num_hidden_layers))


def inputs_for(family: str, how: str, length: int = 22) -> dict[str, Any]:
    """Model inputs for a scenario; repeated text for those that guess ahead."""
    inputs = models.prompt(family, 3 if "padded" in how else 1, length, padded="padded" in how)
    if how == "lookup" and family not in models.VISION:
        inputs["input_ids"] = inputs["input_ids"][:, : length // 2].repeat(1, 2)
    return inputs


def generate(model: PreTrainedModel, family: str, how: str, cache: Any, length: int = 22, **changes: Any) -> Any:
    """Run one scenario; returns the output of `generate` with logits."""
    settings = {**HOW[how], "max_new_tokens": NEW_TOKENS, **changes}
    if how == "assisted":  # a draft that is mostly right
        settings["assistant_model"] = models.stock(family)
    if how == "assisted_badly":
        settings["assistant_model"] = _other(family)
    torch.manual_seed(7)
    return model.generate(
        **inputs_for(family, how, length), **settings, past_key_values=cache, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip


_others: dict[str, PreTrainedModel] = {}


def _other(family: str) -> PreTrainedModel:
    if family not in _others:
        _others[family] = models.build(family, seed=5)
    return _others[family]


_stock_outputs: dict[tuple[str, str], Any] = {}


def stock_output(family: str, how: str) -> Any:
    """What the stock model gives with a stock cache; the error, if it cannot do that at all."""
    if (family, how) not in _stock_outputs:
        model = models.stock(family)
        cache = DynamicCache(config=model.config)
        try:
            _stock_outputs[family, how] = generate(model, family, how, cache)
        except Exception as error:  # a combination that this version of transformers cannot do
            _stock_outputs[family, how] = error
    return _stock_outputs[family, how]


def sieve(family: str, chosen: Policy, **settings: Any) -> SieveCache:
    """A cache on the shared managed model of a family."""
    return SieveCache(models.managed(family), chosen, **settings)


def same(got: torch.Tensor, want: torch.Tensor, exact: bool) -> bool:
    """Equal to the bit, or within 1e-5 of the scale of the numbers."""
    if exact:
        return torch.equal(got, want)
    return float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))
