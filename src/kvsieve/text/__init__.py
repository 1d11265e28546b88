"""Text: likelihood under a policy, data, surrogates, and the names of an earlier system."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .likelihood import TextScore, encode, one_pass_reason, perplexity
    from .simple_evict import SimpleEvictConfig, build_simple_keep_token_idx, evict_dynamic_cache_inplace
    from .streaming import Stretch, TokenStream

__all__ = [
    "SimpleEvictConfig",
    "Stretch",
    "TextScore",
    "TokenStream",
    "build_simple_keep_token_idx",
    "encode",
    "evict_dynamic_cache_inplace",
    "one_pass_reason",
    "perplexity",
]

_LAZY = {
    "SimpleEvictConfig": "simple_evict",
    "TextScore": "likelihood",
    "encode": "likelihood",
    "one_pass_reason": "likelihood",
    "perplexity": "likelihood",
    "build_simple_keep_token_idx": "simple_evict",
    "evict_dynamic_cache_inplace": "simple_evict",
    "Stretch": "streaming",
    "TokenStream": "streaming",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
