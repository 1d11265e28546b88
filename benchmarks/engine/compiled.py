"""`torch.compile` of generation with an evicting layer of fixed capacity."""

from __future__ import annotations

from kvsieve.cache_layer import SieveLayer

from .bench import Bench
from .lines import Line


def compiled(bench: Bench) -> None:
    """Says so as long as there is nothing to compile."""
    families = "Llama, Qwen3, Phi-3"
    what = f"torch.compile of generate with a fixed-capacity evicting layer ({families}): graph breaks"
    reason = "kvsieve has no layer of fixed capacity"
    if SieveLayer.is_compileable:
        reason = "layers can be compiled now, but this benchmark does not know how yet"
    bench.add(Line("compile", what, unit="", target=0.0, reason=reason))
