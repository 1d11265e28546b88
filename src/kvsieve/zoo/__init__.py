"""The bundled small models, and how to load them without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KvsieveError

if TYPE_CHECKING:
    import torch

__all__ = ["list_models", "load", "path"]

_FOLDERS = {"mini-lm": "mini_lm"}


def list_models() -> list[str]:
    """Names of the bundled models."""
    return sorted(_FOLDERS)


def path(name: str) -> Path:
    """Folder of a bundled model.

    Raises:
        KvsieveError: there is no such model.
    """
    if name not in _FOLDERS:
        raise KvsieveError(f"no bundled model {name!r}; there are: {', '.join(list_models())}")
    return Path(__file__).parent / _FOLDERS[name]


def load(name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """Load a bundled model and its tokenizer, offline.

    Args:
        name: see `list_models()`.
        dtype: float32 by default, whatever the weights are stored in.
        device: where to put it.

    Returns:
        The model in evaluation mode, and its tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(path(name))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
