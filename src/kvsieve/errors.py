"""One small exception tree. Every message says what was given, what is allowed and what to do."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "DataError",
    "KvsieveError",
    "PolicyError",
    "ScoreError",
    "UnsupportedModelError",
    "UnsupportedOperationError",
]


class KvsieveError(Exception):
    """Base of everything that kvsieve raises on purpose."""


class PolicyError(KvsieveError, ValueError):
    """An unknown method, an unknown hyper-parameter, or a value outside its range."""


class BudgetError(PolicyError):
    """A budget that cannot be met, such as one below what is protected."""


class ScoreError(KvsieveError, ArithmeticError):
    """A scorer returned something that cannot be ranked (NaN, wrong shape)."""


class DataError(KvsieveError, ValueError):
    """Input data that cannot be used: missing, empty, malformed or too short."""


class UnsupportedModelError(KvsieveError, NotImplementedError):
    """A model, or a part of one, that kvsieve cannot manage."""


class UnsupportedOperationError(KvsieveError, NotImplementedError):
    """An operation that cannot be exact on a cache that has evicted tokens."""
