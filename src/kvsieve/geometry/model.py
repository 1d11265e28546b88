"""STream3R: images of a scene, one after the other, to depth, points and cameras (arXiv 2508.10893).

One class serves VGGT (`mode="full"`), StreamVGGT (`"causal"`) and STream3R checkpoints: they share modules and names.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import DataError, PolicyError, UnsupportedModelError
from .aggregator import SPECIALS, Aggregator
from .blocks import MODES, batch_attention
from .camera import CameraHead
from .dense import DenseHead
from .images import check_images

if TYPE_CHECKING:
    from .memory import Memory

__all__ = ["STream3R"]

_WEIGHTS, _CONFIG, _TRACK = "model.safetensors", "config.json", "track_head."
_NOT_SIZES = ("freeze", "enable_camera", "enable_point", "enable_depth", "enable_track", "model_type", "architectures")
"""Entries of published configurations that say nothing about the sizes of what is built here."""


class STream3R(nn.Module):
    """A visual-geometry transformer over the frames of a scene. The defaults are the published sizes (1.19 B).

    Args:
        img_size: side of the square images that positions were learned for, in pixels.
        patch_size: side of a patch, in pixels; image sides must be multiples of it.
        embed_dim: channels `C`.
        num_heads: heads of the trunk and of the encoder; `C / num_heads` must be a multiple of 4.
        depth: pairs of frame and global attention.
        encoder_depth: blocks of the image encoder.
        camera_depth, camera_num_heads: blocks and heads of the camera head, which is `2 C` wide.
        dpt_features, dpt_out_channels: channels of the depth and point heads.
        dpt_layers: the four trunk layers that those heads read.

    Raises:
        UnsupportedModelError: sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        num_heads: int = 16,
        depth: int = 24,
        encoder_depth: int = 24,
        camera_depth: int = 4,
        camera_num_heads: int = 16,
        dpt_features: int = 256,
        dpt_out_channels: Sequence[int] = (256, 512, 1024, 1024),
        dpt_layers: Sequence[int] = (4, 11, 17, 23),
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "depth": depth,
            "encoder_depth": encoder_depth,
            "camera_depth": camera_depth,
            "camera_num_heads": camera_num_heads,
            "dpt_features": dpt_features,
            "dpt_out_channels": list(dpt_out_channels),
            "dpt_layers": list(dpt_layers),
        }
        _check_sizes(self.config)
        self.patch_size, self.dpt_layers = patch_size, tuple(dpt_layers)
        self.aggregator = Aggregator(img_size, patch_size, embed_dim, num_heads, depth, encoder_depth)
        self.camera_head = CameraHead(2 * embed_dim, camera_depth, camera_num_heads)
        heads = (2 * embed_dim, patch_size), (dpt_features, dpt_out_channels)
        self.point_head = DenseHead(*heads[0], 4, *heads[1], "inv_log")
        self.depth_head = DenseHead(*heads[0], 2, *heads[1], "exp")

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens `P` of one frame: the special ones and one per patch."""
        return SPECIALS + (height // self.patch_size) * (width // self.patch_size)

    def forward(self, images: Tensor, mode: str = "causal", memory: Memory | None = None) -> dict[str, Tensor]:
        """Look at frames.

        Args:
            images: `[B, S, 3, H, W]` or `[S, 3, H, W]` (one sequence), in [0, 1].
            mode: which frames a frame attends to, `"full"`, `"causal"` or `"window"`. Not used with `memory`.
            memory: caches of a running stream. Every new frame then attends to all that is held and to all frames
                of this call.

        Returns:
            `pose_enc` `[B, S, 9]` (translation world to camera, quaternion x y z w, vertical and horizontal field of
            view in radians), `depth` `[B, S, H, W, 1]`, `depth_conf` `[B, S, H, W]`, `world_points` `[B, S, H, W, 3]`
            in the frame of the first camera, `world_points_conf` `[B, S, H, W]` and `images`. In training also
            `pose_enc_list`, one entry for every round of the camera head.

        Raises:
            DataError: images that the model cannot look at.
            PolicyError: unknown mode.
        """
        if mode not in MODES:
            raise PolicyError(f"unknown mode {mode!r}; it must be one of {', '.join(MODES)}")
        check_images(images, self.patch_size)
        if images.dim() == 4:
            images = images[None]
        frames, (height, width) = images.shape[1], images.shape[-2:]
        last = self.aggregator.depth - 1
        wanted = {*self.dpt_layers, last}
        if memory is None:
            trunk = batch_attention(mode, frames, self.tokens_per_frame(height, width))
            head = batch_attention(mode, frames, 1)
            layers = self.aggregator(images, lambda _: trunk, wanted)
            poses = self.camera_head(layers[last][:, :, 0], lambda *_: head)
        else:
            memory.begin(images.shape[0], frames, (height, width), self.tokens_per_frame(height, width))
            layers = self.aggregator(images, memory.trunk_attention, wanted, first=memory.empty)
            poses = self.camera_head(layers[last][:, :, 0], memory.camera_attention)
            memory.finish()
        read = [layers[i] for i in self.dpt_layers]
        points, points_conf = self.point_head(read, height, width, SPECIALS)
        depth, depth_conf = self.depth_head(read, height, width, SPECIALS)
        out: dict[str, Any] = {
            "pose_enc": poses[-1],
            "depth": depth,
            "depth_conf": depth_conf,
            "world_points": points,
            "world_points_conf": points_conf,
            "images": images,
        }
        return out | {"pose_enc_list": poses} if self.training else out

    # ---- to and from files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        skip_track_head: bool = False,
        **hub: Any,
    ) -> STream3R:
        """Load a folder, or a repository of the Hugging Face Hub, with `model.safetensors` and `config.json`.

        Args:
            name_or_path: folder, or Hub id such as `"yslan/STream3R"`.
            dtype: of the weights in memory, whatever they are stored in.
            device: where to put them.
            skip_track_head: VGGT and StreamVGGT checkpoints also carry a point tracker, which is not part of this
                model; leave it out instead of raising.
            **hub: passed on to `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...).

        Returns:
            The model in evaluation mode.

        Raises:
            DataError: a file is missing or cannot be read.
            UnsupportedModelError: the weights do not fit the configuration, or the tracker is there unasked.
        """
        weights = _find(name_or_path, _WEIGHTS, hub)
        config = _read_config(_find(name_or_path, _CONFIG, hub))
        with torch.device("meta"):
            model = cls(**config)
        state = _read_weights(weights, skip_track_head)
        _check_state(model, state, name_or_path)
        state = {key: value.to(device, dtype) for key, value in state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` (as `dtype`, or as they are) and `config.json`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in self.state_dict().items()}
        save_file(state, path / _WEIGHTS, {"format": "pt"})
        (path / _CONFIG).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


def _check_sizes(config: dict[str, Any]) -> None:
    problems = []
    for key, value in config.items():
        if any(n < (0 if key == "dpt_layers" else 1) for n in (value if isinstance(value, list) else [value])):
            problems.append(f"{key}={value} must be positive")
    if not problems:
        if config["img_size"] % config["patch_size"]:
            problems.append("img_size must be a multiple of patch_size")
        if config["embed_dim"] % (4 * config["num_heads"]):
            problems.append("embed_dim must be a multiple of 4 * num_heads, for rotation in two dimensions")
        if 2 * config["embed_dim"] % config["camera_num_heads"]:
            problems.append("2 * embed_dim must be a multiple of camera_num_heads")
        if len(config["dpt_out_channels"]) != 4 or len(config["dpt_layers"]) != 4:
            problems.append("dpt_out_channels and dpt_layers need four entries each")
        if max(config["dpt_layers"]) >= config["depth"]:
            problems.append(f"dpt_layers {config['dpt_layers']} must lie below depth={config['depth']}")
        if any(n % 4 for n in config["dpt_out_channels"]) or config["dpt_features"] % 8:
            problems.append("dpt_out_channels must be multiples of 4 and dpt_features of 8")
    if problems:
        raise UnsupportedModelError("STream3R: " + "; ".join(problems))


def _find(name_or_path: str | Path, file: str, hub: dict[str, Any]) -> Path:
    """A file of a local folder or of a Hub repository."""
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise DataError(f"{folder} has no {file}; a model folder holds {_WEIGHTS} and {_CONFIG}")
        return folder / file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(name_or_path), file, **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise DataError(
            f"{name_or_path} is not a folder, and {file} could not be fetched from the Hub: {error}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    sizes = {key: value for key, value in config.items() if key not in _NOT_SIZES}
    known = set(inspect.signature(STream3R).parameters)
    unknown = sorted(set(sizes) - known)
    if unknown:
        raise UnsupportedModelError(
            f"{path}: unknown entries {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return sizes


def _read_weights(path: Path, skip_track_head: bool) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            track = [key for key in keys if key.startswith(_TRACK)]
            if track and not skip_track_head:
                raise UnsupportedModelError(
                    f"{path} also carries a point tracker ({len(track)} tensors, {track[0]} ...), which this model "
                    "does not have; load it with skip_track_head=True to leave the tracker out"
                )
            return {key: file.get_tensor(key) for key in keys if not key.startswith(_TRACK)}
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _check_state(model: nn.Module, state: dict[str, Tensor], name: str | Path) -> None:
    """Name what does not fit, instead of a page of keys."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    have = {key: tuple(value.shape) for key, value in state.items()}
    other = [f"{key} {have[key]}, expected {wanted[key]}" for key in wanted if key in have and have[key] != wanted[key]]
    parts = []
    for label, names in (("missing", wanted.keys() - have), ("not part of the model", have.keys() - wanted)):
        if names:
            parts.append(f"{len(names)} {label} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})")
    if other:
        parts.append(f"{len(other)} of another shape ({'; '.join(other[:3])})")
    if parts:
        raise UnsupportedModelError(f"the weights of {name} do not fit its configuration: {'; '.join(parts)}")
