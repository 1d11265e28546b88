"""How much faster the exact parallel modes of `kvsieve.text.perplexity` are than feeding one token at a time.

A random Llama (4 layers, hidden 256, 4 heads, 2 key-value heads, vocabulary 4096), float32, one thread, CPU seconds.
Each line is one method at one length, everything in one run; times are medians and are given as ratios:

    token       seconds of the token-by-token run (the reference, timed `--token-repeats` times)
    one pass    token / one_pass, the speed-up; "-" where one pass is not exact for the method
    layerwise   token / layerwise
    / plain     one_pass / one plain forward pass of the same text with a stock cache (loss included)
    dNLL        largest difference of any token's loss to the reference, for one_pass and for layerwise

Token ids are distinct, because equal tokens have equal key norms in the first layer, and ties are a matter of rounding.

    python benchmarks/onepass.py --lengths 512 1024 2048
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve.text.likelihood import TextScore, one_pass_reason, perplexity


def policies(n: int) -> dict[str, kvsieve.Policy]:
    """What is measured at `n` tokens: windows and thresholds of 128, budgets of a quarter of the text."""
    quarter = n // 4
    every = {"when": "every_forward"}
    return {
        "full": kvsieve.get_policy("full"),
        "streaming_llm, 132 tokens": kvsieve.get_policy("streaming_llm", budget=132),
        "sink_recent 4 + 128": kvsieve.get_policy("sink_recent", recent_tokens=128),
        "knorm, threshold": kvsieve.get_policy("knorm", threshold=-1.28, window=128),
        "random, threshold": kvsieve.get_policy("random", threshold=0.5, window=128),
        "random, n/4": kvsieve.get_policy("random", budget=quarter),
        "knorm, n/4": kvsieve.get_policy("knorm", budget=quarter),
        "knorm, ratio 1/4": kvsieve.get_policy("knorm", budget=0.25, **every),
        "tova, n/4": kvsieve.get_policy("tova", budget=quarter),
        "tova, ratio 1/4": kvsieve.get_policy("tova", budget=0.25, **every),
        "h2o, n/4": kvsieve.get_policy("h2o", budget=quarter),
        "observed_attention, n/4": kvsieve.get_policy("observed_attention", budget=quarter),
        "snapkv, n/4": kvsieve.get_policy("snapkv", budget=quarter),
        "adakv_snapkv, n/4": kvsieve.get_policy("adakv_snapkv", budget=quarter),
        "keydiff, n/4": kvsieve.get_policy("keydiff", budget=quarter),
        "expected_attention, n/4": kvsieve.get_policy("expected_attention", budget=quarter),
    }


def measure(run: Callable[[], TextScore | None], repeats: int) -> tuple[float, TextScore | None]:
    """Median CPU seconds of `run`, and what it returned last."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        result = run()
        times.append(time.process_time() - began)
    return statistics.median(times), result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens fed")
    parser.add_argument("--methods", nargs="+", help="only lines that begin with one of these words")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--token-repeats", type=int, default=1)
    parser.add_argument("--no-token", action="store_true", help="leave out the token-by-token run and layerwise")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one thread, CPU seconds, medians")
    print(f"{'n':>5} {'method':<26}{'token':>8}{'one pass':>10}{'layerwise':>11}{'/ plain':>9}{'dNLL':>20}")
    for n in args.lengths:
        ids = torch.randperm(config.vocab_size)[: n + 1]

        def plain(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                logits = model(input_ids=ids[None, :-1], past_key_values=DynamicCache(), use_cache=True).logits
                cross_entropy(logits[0], ids[1:], reduction="none")

        for name, policy in policies(n).items():
            if args.methods and not any(name.startswith(word) for word in args.methods):
                continue
            line(model, ids, name, policy, plain, args)


def line(
    model: LlamaForCausalLM, ids: torch.Tensor, name: str, policy: kvsieve.Policy, plain: Callable[[], None],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Measure and print one method."""

    def run(mode: str, repeats: int) -> tuple[float, TextScore | None]:
        return measure(lambda: perplexity(model, ids, policy, mode=mode), repeats)

    token = stepped = quick = None
    speed = {"token": "", "one_pass": "-", "layerwise": "", "plain": "-"}
    errors = []
    if not args.no_token:
        seconds, token = run("token", args.token_repeats)
        speed["token"] = f"{seconds:.2f}"
        took, stepped = run("layerwise", args.token_repeats)
        speed["layerwise"] = f"{seconds / took:.1f}x"
    if one_pass_reason(policy) is None:
        run("one_pass", 1)
        base = measure(plain, args.repeats)[0]
        took, quick = run("one_pass", args.repeats)
        speed["plain"] = f"{took / base:.2f}"
        speed["one_pass"] = f"{seconds / took:.1f}x" if token else f"{took:.3f} s"
    for score in (quick, stepped):
        errors.append(f"{float((score.nll - token.nll).abs().max()):.1e}" if score and token else "-")
    print(
        f"{len(ids) - 1:>5} {name:<26}{speed['token']:>8}{speed['one_pass']:>10}{speed['layerwise']:>11}"
        f"{speed['plain']:>9}{'  '.join(errors):>20}",
        flush=True,
    )


if __name__ == "__main__":
    main()
