"""Exact likelihood under eviction after every token, against one plain forward pass of the same text with its loss."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from kvsieve import Policy, get_policy
from kvsieve.text.likelihood import perplexity

from .bench import Bench
from .fill import surrogate, threshold_of
from .models import Size, short, token_ids
from .timing import take_turns


def policies(size: Size, length: int) -> dict[str, tuple[Policy, float | None]]:
    """What is measured, and its target: windows and thresholds, then budgets of a quarter of the text."""
    window, quarter = length // 16, length // 4
    scorer = surrogate(size)
    kvzap = get_policy("kvzap", scorer=scorer, threshold=threshold_of(scorer, size, 0.5), window=window)
    return {
        f"streaming_llm, {window + 4} tokens": (get_policy("streaming_llm", budget=window + 4), 1.5),
        f"sink_recent, 4 + {window}": (get_policy("sink_recent", recent_tokens=window), 1.5),
        "knorm, threshold": (get_policy("knorm", threshold=-1.28, window=window), 1.5),
        "kvzap, threshold": (kvzap, 1.5),
        f"tova, {quarter} tokens": (get_policy("tova", budget=quarter), 2.0),
        f"h2o, {quarter} tokens": (get_policy("h2o", budget=quarter, window_size=min(32, quarter // 2)), 2.0),
        f"knorm, {quarter} tokens": (get_policy("knorm", budget=quarter), None),
        f"observed_attention, {quarter} tokens": (get_policy("observed_attention", budget=quarter), None),
    }


def likelihood(bench: Bench) -> None:
    """One line per policy."""
    size, stock, managed = bench.pair("S")
    length = bench.tokens(2048)
    ids = token_ids(size, length + 1)

    def plain() -> None:
        with torch.no_grad():
            logits = stock(input_ids=ids[:, :-1], past_key_values=DynamicCache(config=stock.config)).logits
            cross_entropy(logits[0], ids[0, 1:], reduction="none")

    for name, (policy, target) in policies(size, length).items():
        mode = perplexity(managed, ids, policy).mode
        found = take_turns(
            {
                "plain": partial(bench.clock.seconds, plain),
                "kvsieve": partial(bench.clock.seconds, partial(perplexity, managed, ids, policy)),
            },
            bench.repeats,
        )
        what = f"exact perplexity, {name}, {short(length)}, model S, against one plain forward pass"
        bench.ratio("perplexity", what, found, "kvsieve", "plain", target=target, detail=f'mode "{mode}"')
