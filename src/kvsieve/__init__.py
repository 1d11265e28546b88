"""kvsieve keeps a transformer's key-value cache inside a memory budget, and measures exactly what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    BudgetError,
    DataError,
    KvsieveError,
    PolicyError,
    ScoreError,
    UnsupportedModelError,
    UnsupportedOperationError,
)

if TYPE_CHECKING:
    from . import zoo
    from .cache import SieveCache
    from .compare import compare_compression_methods
    from .policy import Policy, get_policy, list_methods
    from .static import StaticSieveCache

__all__ = [
    "BudgetError",
    "DataError",
    "KvsieveError",
    "Policy",
    "PolicyError",
    "ScoreError",
    "SieveCache",
    "StaticSieveCache",
    "UnsupportedModelError",
    "UnsupportedOperationError",
    "__version__",
    "compare_compression_methods",
    "get_policy",
    "list_methods",
    "zoo",
]

__version__ = "0.1.0"

_LAZY = {
    "Policy": "policy",
    "get_policy": "policy",
    "list_methods": "policy",
    "SieveCache": "cache",
    "StaticSieveCache": "static",
    "compare_compression_methods": "compare",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import kvsieve` stays cheap."""
    from importlib import import_module

    if name == "zoo":
        return import_module(".zoo", __name__)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
