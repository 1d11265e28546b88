"""The peer's side: runs kvpress in its own environment and answers questions from `peer`, a line of JSON each.

Started as `python -m engine.peer_worker` with `benchmarks/` on the path. Every request has `do`, the name of a method
of `Worker` below, and gets one reply: an object, or `{"error": ...}`. Model weights and layer inputs come in
safetensors files, random keys and values from the seeds both sides share. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import kvpress
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from . import models, resident
from .timing import Clock

Request = dict[str, Any]


class Surrogate(kvpress.KVzapPress):
    """KVzap with the weights that kvsieve is measured with, in the place of published ones."""

    def post_init_from_model(self, model: Any) -> None:
        """Nothing to fetch."""


def press_of(request: Request) -> Any:
    """The press behind one of kvsieve's method names."""
    name, ratio = request["press"], request.get("removed", 0.5)
    if name == "kvzap":
        press = Surrogate(model_type="linear")
        shape = request["surrogate"]
        press.kvzap_model = kvpress.presses.kvzap_press.KVzapModel(
            kvpress.presses.kvzap_press.KVzapConfig(
                input_dim=shape["input_dim"], output_dim=shape["output_dim"], n_modules=shape["n_modules"],
                hidden_dim=shape["hidden_dim"],
            )
        )  # fmt: skip
        press.kvzap_model.load_state_dict(load_file(shape["weights"]))
        press.kvzap_model.requires_grad_(False)
        return kvpress.DMSPress(press, threshold=request["threshold"], decoding=request.get("decoding", False))
    if name == "adakv_snapkv":
        return kvpress.AdaKVPress(kvpress.SnapKVPress(ratio))
    presses = {
        "random": kvpress.RandomPress, "streaming_llm": kvpress.StreamingLLMPress, "knorm": kvpress.KnormPress,
        "keydiff": kvpress.KeyDiffPress, "lagkv": kvpress.LagKVPress, "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress, "pyramidkv": kvpress.PyramidKVPress,
        "expected_attention": kvpress.ExpectedAttentionPress, "observed_attention": kvpress.ObservedAttentionPress,
    }  # fmt: skip
    return presses[name](compression_ratio=ratio)


class Worker:
    """Answers one request after another, keeping models and prepared cases."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._models: dict[str, Any] = {}
        self._cases: dict[str, Any] = {}

    def hello(self, request: Request) -> Request:
        """Settings for all that follows; tells the versions."""
        torch.set_num_threads(request["threads"])
        self.clock = Clock(request["clock"])
        from importlib.metadata import version

        return {
            "kvpress": version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__,
        }  # fmt: skip

    def threads(self, request: Request) -> Request:
        """Change the number of threads and the clock."""
        torch.set_num_threads(request["threads"])
        self.clock = Clock(request["clock"])
        return {}

    def forget(self, request: Request) -> Request:
        """Free models and cases."""
        self._models.clear()
        self._cases.clear()
        return {}

    def compress(self, request: Request) -> Request:
        """Seconds of selecting (and gathering, where the press does that) in the first layer."""
        return {"seconds": self.clock.seconds(self._case(request, self._compress))}

    def prefill(self, request: Request) -> Request:
        """Seconds of a prompt with the press and without."""
        pressed, plain = self._case(request, self._prefill)
        return {"press": self.clock.seconds(pressed), "plain": self.clock.seconds(plain)}

    def decode(self, request: Request) -> Request:
        """Seconds per step over a compressed cache, and over the full one."""
        pressed, plain = self._case(request, self._decode)
        return {"press": self.clock.seconds(pressed), "plain": self.clock.seconds(plain)}

    def rise(self, request: Request) -> Request:
        """Rise of memory in one of the cases above (`case`); for a worker that does nothing else."""
        case = request["case"]
        if case["do"] == "compress":
            self._compress(case["warm_up"])()
            work = self._compress(case)
        else:
            which = 0 if request["which"] == "press" else 1
            self._prefill(case["warm_up"])[which]()
            work = self._prefill(case)[which]
        return resident.rise(work)

    def leak(self, request: Request) -> Request:
        """Largest attention that a query pays to evicted tokens, for `tokens` queries at once after a prompt.

        The values of evicted tokens are set to one and all others to zero, those of the new tokens too: what comes out
        of the attention is then exactly the weight on evicted tokens.
        """
        model, press = self._model(request), press_of(request)
        layers, cache = model.model.layers, DynamicCache(config=model.config)
        stored: Any
        ids = torch.tensor([request["ids"]])
        length = ids.shape[1] - request["tokens"]
        with torch.no_grad(), press(model):
            model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
        found: list[float] = []
        with torch.no_grad(), values_off(layers), weights_seen(layers, found):
            for layer, stored in zip(layers, cache.layers, strict=True):
                stored.values = torch.zeros_like(stored.values)
                evicted = getattr(layer.self_attn, "masked_key_indices", None)
                if evicted is not None:
                    stored.values[tuple(evicted)] = 1.0
            model(ids[:, length:], past_key_values=cache, logits_to_keep=1)
        return {"mass": max(found)}

    # ---- cases, prepared once and run again and again

    def _case(self, request: Request, prepare: Callable[[Request], Any]) -> Any:
        key = json.dumps(request, sort_keys=True)
        if key not in self._cases:
            self._cases.clear()
            self._cases[key] = prepare(request)
        return self._cases[key]

    def _model(self, request: Request) -> Any:
        path = request["weights"]
        if path not in self._models:
            self._models.clear()
            model = models.build(models.Size(**request["size"]), models.DTYPES[request["dtype"]])
            model.load_state_dict(load_file(path), strict=False)
            for layer in model.model.layers:
                layer.self_attn.rotary_emb = model.model.rotary_emb
            self._models[path] = model
        return self._models[path]

    def _compress(self, request: Request) -> Callable[[], object]:
        model, press, inputs = self._model(request), press_of(request), load_file(request["inputs"])
        hidden, keys, values = (inputs[name] for name in ("hidden", "keys", "values"))
        module = model.model.layers[0].self_attn
        places = torch.arange(hidden.shape[1])
        rotation = model.model.rotary_emb(hidden, places[None])
        if request["press"] == "kvzap":
            cache = DynamicCache(config=model.config)
            cache.update(keys, values, 0)
            given = {"hidden_states": hidden, "past_key_values": cache, "cache_position": places}

            def masked() -> object:
                module.masked_key_indices = None
                return press.forward_hook(module, [], given, [None, None])

            return _without_gradients(masked)
        queries = inputs["queries"] if request["press"] == "observed_attention" else None

        def gathered() -> object:
            attention = None if queries is None else matrix(queries, keys)
            return press.compress(module, hidden, keys, values, attention, {"position_embeddings": rotation})

        return _without_gradients(gathered)

    def _prefill(self, request: Request) -> tuple[Callable[[], object], Callable[[], object]]:
        model, press, ids = self._model(request), press_of(request), torch.tensor([request["ids"]])
        eager = request["press"] == "observed_attention"

        def run() -> object:
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache, logits_to_keep=1)
            return cache

        def pressed() -> object:
            model.set_attn_implementation("eager" if eager else "sdpa")
            with press(model):
                return run()

        def plain() -> object:
            model.set_attn_implementation("sdpa")
            return run()

        return _without_gradients(pressed), _without_gradients(plain)

    def _decode(self, request: Request) -> tuple[Callable[[], object], Callable[[], object]]:
        model, press, dtype = self._model(request), press_of(request), models.DTYPES[request["dtype"]]
        size, length, steps = models.Size(**request["size"]), request["length"], request["steps"]
        full, small = DynamicCache(config=model.config), DynamicCache(config=model.config)
        attentions = [layer.self_attn for layer in model.model.layers]
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(1, length, size.hidden, generator=generator, dtype=dtype)
        places = torch.arange(length)
        rotation = model.model.rotary_emb(hidden, places[None])
        masks: list[Any] = []
        with torch.no_grad():
            for index, (keys, values) in enumerate(models.keys_and_values(size, length, dtype)):
                module = attentions[index]
                module.masked_key_indices = None
                full.update(keys, values, index)
                if request["press"] == "kvzap":
                    small.update(keys, values, index)
                    given = {"hidden_states": hidden, "past_key_values": small, "cache_position": places}
                    press.forward_hook(module, [], given, [None, None])
                else:
                    kept = press.compress(module, hidden, keys, values, None, {"position_embeddings": rotation})
                    small.update(*kept, index)
                masks.append(module.masked_key_indices)
                module.masked_key_indices = None
        token = torch.zeros(1, 1, dtype=torch.long)

        def run(cache: DynamicCache) -> None:
            for _ in range(steps):
                model(token, past_key_values=cache, logits_to_keep=1)

        def pressed() -> None:
            for module, mask in zip(attentions, masks, strict=True):
                module.masked_key_indices = mask
            with press(model) if request.get("decoding") else nullcontext():
                run(small)
            for index, module in enumerate(attentions):
                masks[index], module.masked_key_indices = module.masked_key_indices, None

        return _without_gradients(pressed), _without_gradients(lambda: run(full))


def matrix(queries: Tensor, keys: Tensor) -> Tensor:
    """The attention matrix `[B, H, N, N]` that eager attention would hand over."""
    repeated = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    logits = queries @ repeated.transpose(2, 3) * queries.shape[-1] ** -0.5
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill_(ahead, -torch.inf).softmax(-1)


@contextmanager
def values_off(layers: Any) -> Iterator[None]:
    """New tokens have the value zero."""
    before = [layer.self_attn.v_proj.weight.data for layer in layers]
    for layer in layers:
        layer.self_attn.v_proj.weight.data = torch.zeros_like(layer.self_attn.v_proj.weight)
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.self_attn.v_proj.weight.data = weight


@contextmanager
def weights_seen(layers: Any, found: list[float]) -> Iterator[None]:
    """Note the largest number that leaves the attention of every layer."""

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(float(args[0].abs().max()))

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_gradients(work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def main() -> None:
    """Serve until the other side closes. What libraries print goes to stderr, so that replies stay readable."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request["do"])(request)
        except Exception as error:  # the other side decides what an error means for the table
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
