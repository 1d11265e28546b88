"""A running stream on disk: caches, records and kept predictions in one safetensors file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import DataError
from ..policy import Policy
from ..storage import pack_layer, read_file, unpack_layer, write_file
from .plan import StreamPlan

if TYPE_CHECKING:
    from .session import StreamSession

__all__ = ["load_plan", "restore", "save_session"]

_FORMAT = "kvsieve-stream-2"
_POLICIES = ("policy", "camera_policy")


def save_session(session: StreamSession, path: str | Path) -> None:
    """Write the stream to `path`; see `StreamSession.save`."""
    memory = session.memory
    tensors: dict[str, Tensor] = {}
    layers: dict[str, list[dict[str, Any]]] = {}
    for part, cores in (("trunk", memory.trunk), ("camera", memory.camera)):
        layers[part] = [pack_layer(core, tensors, f"{part}.{core.layer_idx}.") for core in cores]
    for name, value in session.predictions.items():
        tensors[f"predictions.{name}"] = value.contiguous().cpu()
    plan = {f.name: getattr(session.plan, f.name) for f in fields(StreamPlan)}
    plan |= {name: plan[name].to_dict() for name in _POLICIES if plan[name] is not None}
    header = {
        "plan": plan,
        "sizes": session.model.config,
        "layers": layers,
        "frames": memory.frames,
        "batch": memory.batch,
        "tokens_per_frame": memory.tokens_per_frame,
        "size": memory.size,
    }
    write_file(path, _FORMAT, header, tensors)


def load_plan(path: str | Path, sizes: dict[str, Any]) -> tuple[StreamPlan, dict[str, Any], dict[str, Tensor]]:
    """The settings of a stored stream, with header and tensors for `restore`.

    Raises:
        DataError: the file is missing, is no stored stream, or belongs to a model of other sizes.
    """
    header, tensors = read_file(path, _FORMAT)
    if header["sizes"] != sizes:
        other = sorted(key for key in sizes if header["sizes"].get(key) != sizes[key])
        raise DataError(f"{path} was written for a model of other sizes ({', '.join(other)})")
    plan = dict(header["plan"])
    plan |= {name: Policy.from_dict(plan[name]) for name in _POLICIES if plan[name] is not None}
    return StreamPlan(**plan), header, tensors


def restore(session: StreamSession, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put a stored stream into a new session with the same settings."""
    if not header["frames"]:
        return
    memory, device = session.memory, next(session.model.parameters()).device
    memory.prepare(header["batch"], (header["size"][0], header["size"][1]), header["tokens_per_frame"])
    memory.frames = header["frames"]
    for part, cores in (("trunk", memory.trunk), ("camera", memory.camera)):
        for core, entry in zip(cores, header["layers"][part], strict=True):
            unpack_layer(core, entry, tensors, f"{part}.{core.layer_idx}.", device)
    prefix = "predictions."
    session.kept.restore({k[len(prefix) :]: v.to(device) for k, v in tensors.items() if k.startswith(prefix)})
