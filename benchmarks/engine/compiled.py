"""`torch.compile` of generation with an evicting cache of fixed capacity: how many graphs it takes, whether the tokens
are those of the dynamic cache, and what a step costs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kvsieve import SieveCache, StaticSieveCache, get_policy

from .bench import Bench
from .lines import Line
from .models import Size, token_ids
from .timing import Clock, take_turns

FAMILIES = {"Llama": "Llama", "Qwen3": "Qwen3", "Phi-3": "Phi3"}
"""Family in words, and how `transformers` calls it."""

METHOD, BUDGET, NEW = "h2o", 1024, 32


class Steps(StoppingCriteria):
    """Takes the time between the first and the last token of a call of `generate`."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.times = clock, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(self.clock.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def build(family: str, size: Size) -> PreTrainedModel:
    """A model of the family with random weights, in evaluation mode."""
    torch.manual_seed(0)
    name = FAMILIES[family]
    own = {"head_dim": size.head_dim} if name == "Qwen3" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=131_072, initializer_range=0.2, sliding_window=None,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **own,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


def compiled(bench: Bench) -> None:
    """Every family; with `--quick` without the compiler behind the graphs, which takes half a minute for each."""
    for family in FAMILIES:
        measure(bench, family, "aot_eager" if bench.quick else "inductor")


def measure(bench: Bench, family: str, backend: str) -> None:
    """Two texts with one cache, of which the second must not need another graph; then bursts that take turns."""
    size, budget = bench.size("S"), bench.tokens(BUDGET)
    model = build(family, size)
    policy = get_policy(METHOD, budget=budget, window_size=min(32, budget // 2))
    ids = token_ids(size, 2 * budget)
    config = CompileConfig(backend=backend, mode="default")
    config._compile_all_devices = True
    dynamic, static = SieveCache(model, policy), StaticSieveCache(model, policy)

    def run(cache: SieveCache, length: int, **how: Any) -> tuple[Tensor, float]:
        cache.reset()
        steps = Steps(bench.clock)
        tokens = model.generate(
            ids[:, :length], attention_mask=torch.ones_like(ids[:, :length]), past_key_values=cache,
            max_new_tokens=NEW, do_sample=False, stopping_criteria=StoppingCriteriaList([steps]), **how,
        )  # fmt: skip
        return tokens[:, length:], steps.times[-1] - steps.times[0]

    def eager() -> float:
        return run(dynamic, budget + 1)[1]

    def graph() -> float:
        return run(static, budget + 1, compile_config=config)[1]

    torch._dynamo.reset()
    counters.clear()
    try:
        differing = 0
        for length in (budget + 1, budget // 2):
            want, got = run(dynamic, length)[0], run(static, length, compile_config=config)[0]
            differing += int((want != got).sum())
        found = take_turns({"eager": eager, "compiled": graph}, bench.repeats)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        what = f"generate with {METHOD}, {budget} tokens in fixed slots, {family}, {backend}"
        detail = f"{2 + bench.repeats} texts"
        bench.add(Line("compile", f"{what}: graphs", graphs, unit="", target=1.0, detail=detail))
        bench.add(Line("compile", f"{what}: graph breaks", breaks, unit="", target=0.0, detail=detail))
        words = f"of {2 * NEW}, against SieveCache of the same policy"
        bench.add(Line("compile", f"{what}: differing tokens", differing, unit="", target=0.0, detail=words))
        bench.ratio(
            "compile", f"{what}: decode step, against SieveCache without compiling", found, "compiled", "eager",
            steps=NEW - 1,
        )  # fmt: skip
    finally:
        torch._dynamo.reset()
