"""Streaming 3D reconstruction under a memory budget: the STream3R model, its session, metrics and export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .images import load_and_preprocess_images
    from .model import STream3R
    from .pose import decode_pose
    from .scenes import render_sequence
    from .session import StreamSession

__all__ = ["STream3R", "StreamSession", "decode_pose", "load_and_preprocess_images", "render_sequence"]

_LAZY = {
    "STream3R": "model",
    "StreamSession": "session",
    "decode_pose": "pose",
    "load_and_preprocess_images": "images",
    "render_sequence": "scenes",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
