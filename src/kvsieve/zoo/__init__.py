"""The bundled small models, and how to load them without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ..errors import KvsieveError

if TYPE_CHECKING:
    import torch

    from ..dialogue.vlm import VisionLanguageModel
    from ..geometry import STream3R

__all__ = ["list_models", "load", "path"]

_FOLDERS = {"mini-lm": "mini_lm", "mini-stream3r": "mini_stream3r", "mini-vlm": "mini_vlm"}
_KINDS = {"mini-lm": "text", "mini-stream3r": "geometry", "mini-vlm": "vision"}


def list_models(kind: str | None = None) -> list[str]:
    """Names of the bundled models: of all, or of those of one kind.

    Args:
        kind: `"text"` for language models, `"geometry"` for reconstruction from images, `"vision"` for dialogue over
            video.
    """
    return sorted(name for name in _FOLDERS if kind in (None, _KINDS[name]))


def path(name: str) -> Path:
    """Folder of a bundled model.

    Raises:
        KvsieveError: there is no such model.
    """
    if name not in _FOLDERS:
        raise KvsieveError(f"no bundled model {name!r}; there are: {', '.join(list_models())}")
    return Path(__file__).parent / _FOLDERS[name]


@overload
def load(name: Literal["mini-lm"], dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]: ...


@overload
def load(name: Literal["mini-stream3r"], dtype: torch.dtype | None = None, device: str = "cpu") -> STream3R: ...


@overload
def load(name: Literal["mini-vlm"], dtype: torch.dtype | None = None, device: str = "cpu") -> VisionLanguageModel: ...


@overload
def load(name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Any: ...


def load(name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """Load a bundled model, offline.

    Args:
        name: see `list_models()`.
        dtype: float32 by default, whatever the weights are stored in.
        device: where to put it.

    Returns:
        The model in evaluation mode; of a language model `(model, tokenizer)`; of one that sees, a
        `VisionLanguageModel`, for the dialogue runner.

    Raises:
        KvsieveError: there is no such model, or its files are missing.
    """
    import torch

    folder = path(name)
    if not (folder / "model.safetensors").is_file():
        raise KvsieveError(f"the weights of {name} are missing: {folder} has no model.safetensors; reinstall kvsieve")
    dtype = dtype or torch.float32
    if _KINDS[name] == "vision":
        from ..dialogue.vlm import VisionLanguageModel

        return VisionLanguageModel.load(name, device, dtype)
    if _KINDS[name] == "geometry":
        from ..geometry import STream3R

        return STream3R.from_pretrained(folder, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
