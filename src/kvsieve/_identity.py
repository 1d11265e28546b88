"""Where numbers come from: the model, the device and the code, and hashes that tell one from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from . import zoo
from ._compare.settings import DTYPES
from .errors import KvsieveError, PolicyError

__all__ = ["check_name", "digest", "find_device", "identity_of", "load_model", "surrogate_fingerprint"]


def digest(value: Any) -> str:
    """24 hexadecimal digits of a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def find_device(name: str | None) -> str:
    """A usable device, the first GPU if there is one by default.

    Raises:
        PolicyError: no such device on this machine.
    """
    if name is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PolicyError(f'device must be such as "cpu", "cuda" or "cuda:1", not {name!r}') from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise PolicyError(f"device {name!r} is not there: this machine has {count} usable GPUs")
        return f"cuda:{device.index or 0}"
    return str(device)


def check_name(name: str) -> None:
    """Raise if this is a bundled model that has nothing to do with text.

    Raises:
        KvsieveError: it is.
    """
    if name in zoo.list_models("geometry"):
        raise KvsieveError(
            f"{name} is not a language model; use it with `kvsieve geometry`. Bundled language models: "
            f"{', '.join(zoo.list_models('text'))}"
        )


def load_model(name: str, device: str, dtype: str | None) -> tuple[Any, Any]:
    """A bundled model, a folder or a Hub id as (model in evaluation mode, tokenizer).

    Raises:
        KvsieveError: it cannot be loaded.
    """
    check_name(name)
    if dtype is not None and dtype not in DTYPES:
        raise PolicyError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    wanted = None if dtype is None else getattr(torch, dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if name in zoo.list_models("text"):
            loaded: tuple[Any, Any] = zoo.load(name, dtype=wanted, device=device)
            return loaded
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted or "auto")
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise KvsieveError(
            f"cannot load the model {name!r}: {first[0]} Give a folder, a Hub id of a causal language model, or a "
            f"bundled model ({', '.join(zoo.list_models('text'))})"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer


def identity_of(model: Any, device: str, parts: tuple[str, ...] = ()) -> dict[str, str]:
    """Weights, precision, device, code and library versions: numbers are the same while these are. `parts`: folders of
    kvsieve whose code counts beside the core's."""
    import transformers

    from . import __version__

    name = f"{device.split(':')[0]} {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device
    return {
        "weights": _model_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": name,
        "kvsieve": __version__,
        "code": _code_fingerprint(parts),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _model_fingerprint(model: Any) -> str:
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return digest([json.dumps(config, sort_keys=True, default=str), _weights(model)])


def _weights(module: torch.nn.Module) -> list[Any]:
    """Of each tensor the sum of its bit patterns (exact in integers, so the same on every device) and some elements:
    fast for large models, and no single change goes unseen."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts: list[Any] = []
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().contiguous().flatten()
        bits = flat.view(ints[flat.element_size()])
        some = bits[:: max(1, bits.numel() // 64)][:64].tolist()
        parts.append([name, list(tensor.shape), str(tensor.dtype), int(bits.sum(dtype=torch.int64)), some])
    return parts


_NO_NUMBERS = (
    "_compare/", "_rowlog", "cli", "compare.py", "dialogue/", "geometry/", "kernels/", "report/", "tasks/",
    "text/train", "trace",
)  # fmt: skip


def _code_fingerprint(parts: tuple[str, ...]) -> str:
    """A hash of kvsieve's source: results are not carried over from other code."""
    root = Path(__file__).resolve().parent
    content = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if name.startswith(parts) or not name.startswith(_NO_NUMBERS):
            content.update(name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


def surrogate_fingerprint(source: str) -> str:
    """A hash of the surrogate in a folder or on the Hub.

    Raises:
        DataError: there is none.
    """
    from .surrogates import KVzapSurrogate

    return digest(_weights(KVzapSurrogate.load(source)))
