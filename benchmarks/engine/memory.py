"""One case in a process of its own: `python -m engine.memory '{"do": ...}'` prints how far its memory rose.

Cases: `{"do": "prefill", "method", "length"}` with method `"plain"` for the stock model and its dynamic cache, and
`{"do": "evict", "method", "length"}` for scoring and evicting in one layer. A small case of the same kind runs first,
so that what libraries set up once does not count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from kvsieve import SieveCache

from . import resident
from .evict import layer_case
from .fill import removing
from .models import Size, build, token_ids

SMALL = 256


def prefill(size: Size, method: str, length: int) -> Callable[[], Any]:
    """A prompt into a fresh cache, which is handed back so that it counts."""
    model = build(size)
    policy = None if method == "plain" else removing(method, size, 0.5)
    warm = token_ids(size, SMALL)
    ids = token_ids(size, length)

    def run(ids: torch.Tensor = ids) -> Any:
        cache = DynamicCache(config=model.config) if policy is None else SieveCache(model, policy)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    run(warm)
    return run


def evict(size: Size, method: str, length: int) -> Callable[[], Any]:
    """Scoring and evicting in the first layer, once its keys and values are stored."""
    small = layer_case(size, method, SMALL)
    small.store()
    small.evict()
    case = layer_case(size, method, length)
    case.store()
    return case.evict


def main() -> None:
    """Run the case and print its rise as JSON."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case.get("threads", 1))
    prepare = {"prefill": prefill, "evict": evict}[case["do"]]
    print(json.dumps(resident.rise(prepare(Size(**case["size"]), case["method"], case["length"]))))


if __name__ == "__main__":
    main()
