"""A cache on disk: one safetensors file, every tensor as it is, every number in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import DataError, UnsupportedOperationError
from .policy import Policy
from .ragged import RaggedStore
from .store import DenseStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache import SieveCache
    from .layer import KVLayer

__all__ = ["load_cache", "pack_layer", "read_file", "save_cache", "unpack_layer", "write_file"]

_FORMAT = "kvsieve-cache-3"
_PLAIN = ("seen", "segment", "evictions", "evicted_at", "next_place", "has_pads", "padded")


def save_cache(cache: SieveCache, path: str) -> None:
    """Write `cache` to `path`. Spare room is given up, not stored.

    Raises:
        UnsupportedOperationError: the model has layers that kvsieve does not manage and that hold tokens.
    """
    managed = {layer.core.layer_idx for layer in cache.managed}
    foreign = [i for i, layer in enumerate(cache.layers) if i not in managed and getattr(layer, "is_initialized", True)]
    if foreign:
        raise UnsupportedOperationError(
            f"layers {foreign} are not managed by kvsieve, and their state cannot be stored with the cache"
        )
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for layer in cache.managed:
        layer.core.settle()
        layers.append(pack_layer(layer.core, tensors, f"{layer.core.layer_idx}."))
    policy = cache.policy
    header = {
        "positions": cache.positions,
        "method": policy.name,
        "policy": policy.to_dict() if policy.scorer.serializable else None,
        "layers": layers,
    }
    write_file(path, _FORMAT, header, tensors)


def load_cache(cls: type[SieveCache], path: str, model: PreTrainedModel, policy: Policy | None) -> SieveCache:
    """Read a cache for `model`; see `SieveCache.load`.

    Raises:
        DataError: the file is missing, is not a kvsieve cache, or belongs to a model of another shape.
    """
    header, tensors = read_file(path, _FORMAT)
    if policy is None:
        if header["policy"] is None:
            raise DataError(f"the policy of {path} ({header['method']}) held live objects; pass policy= to load it")
        policy = Policy.from_dict(header["policy"])
    cache = cls(model, policy, positions=header["positions"])
    layers = cache.managed
    if [layer.core.layer_idx for layer in layers] != [entry["layer_idx"] for entry in header["layers"]]:
        raise DataError(f"{path} was written for a model with other layers")
    for layer, entry in zip(layers, header["layers"], strict=True):
        unpack_layer(layer.core, entry, tensors, f"{layer.core.layer_idx}.", model.device)
        if layer.core.seen:
            keys = layer.core.store.columns["key"]
            layer.lazy_initialization(keys)
    return cache


def write_file(path: str | Path, format_: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write tensors, with everything else as JSON in the file's header."""
    save_file(tensors, path, {"kvsieve": json.dumps({"format": format_, **header})})


def read_file(path: str | Path, format_: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file written by `write_file`.

    Raises:
        DataError: the file is missing, cannot be read, or has another format.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("kvsieve", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not header or header.get("format") != format_:
        raise DataError(f"{path} is not a file of this version of kvsieve ({format_})")
    return header, tensors


def pack_layer(core: KVLayer, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Add the layer's tensors under names that begin with `prefix`; return its header entry. Spare room is given up."""
    entry: dict[str, Any] = {name: getattr(core, name) for name in _PLAIN}
    entry |= {"layer_idx": core.layer_idx, "dense": isinstance(core.store, DenseStore)}
    entry |= {"batch": core.store.batch, "heads": core.store.heads}
    if not core.seen:
        return entry
    core.store.pack()
    tensors[prefix + "lengths"] = core.store.lengths.contiguous()
    for name, buffer in core.store.columns.items():
        tensors[f"{prefix}column.{name}"] = buffer.contiguous().cpu()
    for name, value in core.state.items():
        tensors[f"{prefix}state.{name}"] = value.contiguous().cpu()
    tensors[prefix + "real_seen"] = torch.tensor(core.real_seen, dtype=torch.long)
    tensors[prefix + "first"] = core.first.cpu().clone()
    entry["ordered"] = core.store.ordered
    return entry


def unpack_layer(
    core: KVLayer, entry: dict[str, Any], tensors: dict[str, Tensor], prefix: str, device: torch.device
) -> None:
    """Put back what `pack_layer` has stored."""
    for name in _PLAIN:
        setattr(core, name, entry[name])
    if not core.seen:
        return

    def part(kind: str) -> dict[str, Tensor]:
        head = f"{prefix}{kind}."
        return {k[len(head) :]: v.to(device) for k, v in tensors.items() if k.startswith(head)}

    columns = part("column")
    if entry["dense"]:
        store = core.new_store(entry["batch"], entry["heads"])
        store.columns, store.n, store.ordered = columns, columns["key"].shape[2], entry["ordered"]
        core.store = store
    else:
        core.store = RaggedStore(entry["batch"], entry["heads"], columns, tensors[prefix + "lengths"])
    core.state = part("state")
    core.pads, core.first = core.seen - tensors[prefix + "real_seen"], tensors[prefix + "first"].to(device)
