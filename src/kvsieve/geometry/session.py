"""A running stream: frames in, predictions out, caches within their budget."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PolicyError, UnsupportedOperationError
from ..layer import KVLayer
from ..ledger import KEY, POSITION, VALUE
from ..measure import kept_positions, measure
from ..policy import Policy
from .camera import ITERATIONS
from .images import check_images
from .memory import Memory
from .model import STream3R
from .plan import StreamPlan
from .predictions import Predictions, Sink
from .storage import load_plan, restore, save_session

__all__ = ["StreamSession"]


class StreamSession:
    """Feeds frames to a model one after the other and keeps what later frames need.

    Args:
        model: a `STream3R` in evaluation mode.
        mode: `"causal"`: all earlier frames stay in view; `"window"`: the first frame and the last five do.
        num_frames: length of the stream, where a budget is a share of it.
        use_kv_compression: after every frame, evict a share of what may be evicted, by the attention of that frame.
        eviction_ratio: that share, removed.
        importance_aggregation: `"sum"`, `"mean"` or `"max"` of that attention over the frame's tokens.
        use_layerwise_eviction: keep a share of the whole stream, by attention received over the stream, with more room
            for layers that look everywhere (Evict3R). Goes before `use_kv_compression`.
        budget_ratio: that share, kept: `budget_ratio * num_frames` frames per layer, on average.
        temp: temperature of the layers' shares.
        fidelity: `"guaranteed"`: no layer loses protected tokens, budgets add up, nothing changes at `num_frames`;
            `"reference"`: the published arithmetic of layer-wise eviction, defects included.
        policy: instead of the flags above: any kvsieve policy, such as `get_policy("evict3r", budget=4096)` (tokens
            per layer, on average) or `budget="2GiB"` (keys and values of the trunk, room for one frame included).
        camera_policy: policy of the camera head, where a frame is one token. By default everything stays, or, if the
            trunk evicts, the first frame and the last 255.
        special_frames: in how many of the latest frames the special tokens are protected. By default in all of them
            as long as `num_frames` says, and in as many as fit into half of the budget's room beyond.
        predictions: `"all"` keeps every frame's predictions, `"last"` those of the last call; a folder receives one
            file per frame, a function is called with `(frame index, predictions of that frame)`.

    Raises:
        PolicyError: settings out of range or in conflict (also a `ValueError`).
        BudgetError: a budget that needs `num_frames`. What needs the size of a frame is checked at the first one.
    """

    camera_head_iterations = ITERATIONS

    def __init__(
        self,
        model: STream3R,
        mode: str = "causal",
        num_frames: int | None = None,
        use_kv_compression: bool = False,
        eviction_ratio: float = 0.3,
        importance_aggregation: str = "sum",
        use_layerwise_eviction: bool = False,
        budget_ratio: float = 0.5,
        temp: float = 0.5,
        fidelity: str = "guaranteed",
        policy: Policy | None = None,
        *,
        camera_policy: Policy | None = None,
        special_frames: int | None = None,
        predictions: str | Path | Sink = "all",
    ) -> None:
        if not isinstance(model, STream3R):
            raise PolicyError(f"a stream needs a kvsieve.geometry.STream3R, not {type(model).__name__}")
        self.model, self.mode = model, mode
        self.plan = StreamPlan(
            mode, num_frames, use_kv_compression, eviction_ratio, importance_aggregation, use_layerwise_eviction,
            budget_ratio, temp, fidelity, policy, camera_policy, special_frames,
        )  # fmt: skip
        self.kept = Predictions(predictions)
        weight = next(model.aggregator.global_blocks.parameters())
        depth, width = model.config["depth"], model.config["embed_dim"]
        self.memory = Memory(self.plan, depth, model.config["camera_depth"], 2 * depth * width * weight.element_size())

    # ---- the stream

    @torch.no_grad()
    def forward_stream(self, images: Tensor) -> dict[str, Tensor]:
        """Look at the next frames. Frames of one call see each other in both directions.

        Args:
            images: `[S, 3, H, W]`, or `[B, S, 3, H, W]` for streams side by side, in [0, 1]; on any device.

        Returns:
            All predictions so far, `[B, frames so far, ...]`, as `STream3R.forward` names them. If predictions are
            not all kept, those of the new frames.

        Raises:
            DataError: images that the model cannot look at, or of another size than before. The stream goes on as if
                the call had not been made.
            BudgetError: at the first frame, a budget below what is protected.
        """
        check_images(images, self.model.patch_size)
        weight = next(self.model.parameters())
        first = self.memory.frames
        out = self.model(images.to(weight.device, weight.dtype), memory=self.memory)
        out.pop("pose_enc_list", None)
        return self.kept.add(first, out)

    def clear(self) -> None:
        """Forget the stream and its predictions; the settings stay."""
        self.memory.reset()
        self.kept.clear()

    # ---- predictions

    @property
    def predictions(self) -> dict[str, Tensor]:
        """What is kept of the predictions, `[B, frames, ...]`; empty before the first frame."""
        return self.kept.held()

    def get_all_predictions(self) -> dict[str, Tensor]:
        """Predictions of all frames, `[B, frames, ...]`.

        Raises:
            UnsupportedOperationError: they were not all kept.
        """
        if self.kept.keep != "all" and self.memory.frames:
            raise UnsupportedOperationError(
                f"predictions={self.kept.keep!r} does not keep all predictions; open the session with "
                'predictions="all", or collect what forward_stream returns'
            )
        return self.kept.held()

    def get_last_prediction(self) -> dict[str, Tensor]:
        """Predictions of the last frame, `[B, 1, ...]`."""
        return {name: value[:, -1:] for name, value in self.kept.held().items()}

    # ---- what is held

    @property
    def frames(self) -> int:
        """Frames seen so far."""
        return self.memory.frames

    @property
    def aggregator_kv_cache_depth(self) -> int:
        """Layers of the trunk's cache."""
        return self.memory.depth

    @property
    def camera_head_kv_cache_depth(self) -> int:
        """Layers of the camera head's cache, in each of its rounds."""
        return self.memory.camera_depth

    @property
    def aggregator_kv_cache_list(self) -> list[list[Tensor | None]]:
        """Per layer `[keys, values]`, `[B, H, N, D]` in order of arrival: a copy, to look at. `None` before the first
        frame."""
        if not self.memory.trunk:
            return [[None, None] for _ in range(self.memory.depth)]
        return [_contents(layer) for layer in self.memory.trunk]

    @property
    def camera_head_kv_cache_list(self) -> list[list[list[Tensor | None]]]:
        """Per round and block of the camera head `[keys, values]`, like `aggregator_kv_cache_list`."""
        depth, layers = self.memory.camera_depth, self.memory.camera
        if not layers:
            return [[[None, None] for _ in range(depth)] for _ in range(ITERATIONS)]
        return [[_contents(layer) for layer in layers[i : i + depth]] for i in range(0, len(layers), depth)]

    def tokens_per_layer(self) -> list[int]:
        """Tokens held by each layer of the trunk (by its longest head)."""
        return [layer.store.longest if layer.seen else 0 for layer in self.memory.trunk] or [0] * self.memory.depth

    def kept_tokens(self, layer: int) -> dict[str, Tensor]:
        """Where the tokens that a layer of the trunk holds came from.

        Returns:
            `frame` and `place`, `[B, H, N]` int64 in order of arrival: index of the frame, and of the token in it
            (special tokens first); -1 behind the last token of heads that hold fewer.
        """
        if not self.memory.trunk:
            empty = torch.empty(0, 0, 0, dtype=torch.long)
            return {"frame": empty, "place": empty}
        position, per = kept_positions(self.memory.trunk[layer]), self.memory.tokens_per_frame
        behind = position < 0
        return {
            "frame": (position // per).masked_fill(behind, -1),
            "place": (position % per).masked_fill(behind, -1),
        }

    def report(self) -> dict[str, Any]:
        """Measured state of the caches.

        Returns:
            `method`, `frames_seen`, `tokens_per_frame`, `tokens_per_layer`, `special_frames` (frames whose special
            tokens are protected, `None` for all), what `kvsieve.measure.measure` says of the trunk (`bytes_held`,
            `bytes_full`, `compression_ratio`, ...), the same of the camera head under `camera`, and
            `bytes_predictions`.
        """
        policy = self.memory.policy
        return {
            "method": policy.name if policy is not None else None,
            "mode": self.mode,
            "frames_seen": self.frames,
            "tokens_per_frame": self.memory.tokens_per_frame,
            "tokens_per_layer": self.tokens_per_layer(),
            "special_frames": policy.protect.kinds_recent if policy is not None else None,
            **measure(self.memory.trunk),
            "camera": measure(self.memory.camera),
            "bytes_predictions": self.kept.bytes,
        }

    # ---- storage

    def save(self, path: str | Path) -> None:
        """Write the running stream to one safetensors file, to go on later with `load`. Spare room is given up."""
        save_session(self, path)

    @classmethod
    def load(cls, path: str | Path, model: STream3R, *, predictions: str | Path | Sink = "all") -> StreamSession:
        """Read a stream written by `save`, for a model of the same sizes.

        Args:
            path: the file.
            model: the same model.
            predictions: as for a new session. The stored predictions come back where all or the last are kept.

        Raises:
            DataError: the file is missing, is no stored stream, or belongs to a model of other sizes.
        """
        plan, header, tensors = load_plan(path, model.config)
        session = cls(model, predictions=predictions, **{f.name: getattr(plan, f.name) for f in fields(plan)})
        restore(session, header, tensors)
        return session


def _contents(layer: KVLayer) -> list[Tensor | None]:
    if not layer.seen:
        return [None, None]
    store = layer.store
    order = store.read(POSITION).long().masked_fill(~store.live, torch.iinfo(torch.long).max).argsort(-1)[..., None]
    return [store.read(name).take_along_dim(order, 2) for name in (KEY, VALUE)]
