"""The record that every cached token carries.

A layer's `Store` moves named columns together. Two of them are the keys and the values; the others are the
ledger: where a token came from, what kind it is, and what its scorer has learned about it. Because one store
moves them all, a record can never drift away from its key.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

__all__ = ["KEY", "KIND", "PLACE", "POSITION", "SEGMENT", "VALUE", "ColumnSpec", "Kind"]

KEY, VALUE = "key", "value"
POSITION = "position"
"""Column index of the token in what was fed to the model (padding counted), int32."""
PLACE = "place"
"""Position that the key is rotated to, int32; present where that is not the position it came with."""
KIND = "kind"
"""What the token is (`Kind`), uint8; present once a host has said so."""
SEGMENT = "segment"
"""Frame, turn or chunk the token came in, int32; present once a host has said so."""


class Kind(IntEnum):
    """What a cached token is."""

    TEXT = 0
    PATCH = 1
    SPECIAL = 2
    PAD = 3


class ColumnSpec(NamedTuple):
    """Type of a ledger column and the value of a token that nothing was written for."""

    dtype: torch.dtype
    fill: float


SPECS = {
    POSITION: ColumnSpec(torch.int32, -1),
    PLACE: ColumnSpec(torch.int32, -1),
    KIND: ColumnSpec(torch.uint8, int(Kind.TEXT)),
    SEGMENT: ColumnSpec(torch.int32, 0),
}


def spec_of(name: str) -> ColumnSpec:
    """The column's type; a column that is not listed is a scorer's statistic: float32, zero."""
    return SPECS.get(name, ColumnSpec(torch.float32, 0.0))
