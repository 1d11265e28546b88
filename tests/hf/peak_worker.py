"""How far a long input raises the memory of a process: `python peak_worker.py '{"budget": "64MiB", ...}'`.

Prints one JSON line per case. The model has large keys and values and little else, so that what is measured is the
cache. Started by `test_hf_peak.py` with an allocator that gives freed blocks back (`engine.resident.ENVIRONMENT`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import resident
from kvsieve import SieveCache, get_policy
from kvsieve.budgets import parse_bytes


def build(layers: int, heads: int, head_dim: int) -> LlamaForCausalLM:
    """A Llama of width 64 whose heads are far wider."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=head_dim, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def case(model: LlamaForCausalLM, method: str, positions: str, budget: str, chunk: int, chunks: int) -> dict[str, Any]:
    """Feed `chunks` pieces of `chunk` tokens; the rise of the peak and the most that was held between them."""
    policy = get_policy("full") if method == "full" else get_policy(method, budget=budget)
    ids = torch.randint(64, (chunks, chunk), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}

    def feed(pieces: int) -> SieveCache:
        cache, most = SieveCache(model, policy, positions=positions), 0
        with torch.no_grad():
            for piece in ids[:pieces]:
                model(input_ids=piece[None], past_key_values=cache, logits_to_keep=1)
                most = max(most, cache.report()["bytes_held"])
        found.update(most_held=most, report=cache.report())
        return cache

    feed(2)  # what libraries set up once does not count
    rise = resident.rise(lambda: feed(chunks))
    report = found.pop("report")
    kept = {name: report[name] for name in ("bytes_held", "bytes_full", "bytes_ledger", "evictions")}
    return {"method": method, "positions": positions, "budget": parse_bytes(budget), **rise, **found, **kept}


def main() -> None:
    """Run the cases one after the other."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    model = build(*asked["shape"])
    for method, positions in asked["cases"]:
        print(json.dumps(case(model, method, positions, asked["budget"], asked["chunk"], asked["chunks"])), flush=True)


if __name__ == "__main__":
    main()
