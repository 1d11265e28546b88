"""The caches of one stream: one layer for every global block, and for every block and round of the camera head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError, UnsupportedOperationError
from ..joint import LayerGroup
from ..layer import KVLayer
from ..ledger import Kind
from ..policy import Policy
from ..view import Visibility
from .aggregator import SPECIALS
from .blocks import Attend
from .camera import ITERATIONS
from .plan import StreamPlan

__all__ = ["Memory"]


class Memory:
    """What a running stream holds; the model asks it for attention.

    Args:
        plan: what to keep.
        depth: global blocks of the trunk.
        camera_depth: blocks of the camera head.
        each: bytes of one token's key and value in all global blocks, for one row of a batch.
    """

    def __init__(self, plan: StreamPlan, depth: int, camera_depth: int, each: int) -> None:
        self.plan, self.depth, self.camera_depth, self.each = plan, depth, camera_depth, each
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self.trunk: list[KVLayer] = []
        self.camera: list[KVLayer] = []
        self.policy: Policy | None = None
        self.size = (0, 0)
        self.batch = self.tokens_per_frame = self.frames = self._arriving = 0

    @property
    def empty(self) -> bool:
        """Whether no frame has come in."""
        return self.frames == 0

    # ---- one forward pass of the model

    def begin(self, batch: int, frames: int, size: tuple[int, int], tokens: int) -> None:
        """`frames` new frames are about to come in for `batch` streams, each of `size` (height, width) pixels and
        `tokens` tokens.

        Raises:
            DataError: the stream has frames of another size, or another number of streams.
            BudgetError: the budget is below what is protected.
        """
        if self._arriving:
            raise UnsupportedOperationError("an earlier frame was interrupted half-way; clear() the session")
        if self.empty:
            self.prepare(batch, size, tokens)
        elif size != self.size:
            raise DataError(
                f"the stream has frames of {self.size} pixels (height, width), these have {size}: images must "
                "keep their size within a stream; clear() the session or open another one"
            )
        elif batch != self.batch:
            raise DataError(f"the session holds {self.batch} streams side by side, these frames are for {batch}")
        self._arriving = frames
        new = torch.arange(self.frames, self.frames + frames, dtype=torch.int32)
        self._segments = new.repeat_interleave(tokens), new
        kind = torch.full((frames, tokens), int(Kind.PATCH), dtype=torch.uint8)
        kind[:, :SPECIALS] = int(Kind.SPECIAL)
        self._kinds = kind.flatten(), torch.full((frames,), int(Kind.SPECIAL), dtype=torch.uint8)

    def finish(self) -> None:
        """The frames have gone through."""
        self.frames += self._arriving
        self._arriving = 0

    def prepare(self, batch: int, size: tuple[int, int], tokens: int) -> None:
        """Make the layers."""
        plan, n = self.plan, self.camera_depth * ITERATIONS
        policy, camera, group = plan.trunk(tokens, batch * self.each), plan.camera(), LayerGroup()
        self.policy, self.batch, self.size, self.tokens_per_frame = policy, batch, size, tokens
        self.trunk = [
            KVLayer(policy, i, i, self.depth, group=group, window=plan.window, room=tokens) for i in range(self.depth)
        ]
        self.camera = [KVLayer(camera, i, i, n, window=plan.window, room=1) for i in range(n)]

    def trunk_attention(self, layer: int) -> Attend:
        """Attention of global block `layer`."""
        return self._attend(self.trunk[layer], 0)

    def camera_attention(self, round_: int, block: int) -> Attend:
        """Attention of a block of the camera head in one of its rounds."""
        return self._attend(self.camera[round_ * self.camera_depth + block], 1)

    def _attend(self, layer: KVLayer, which: int) -> Attend:
        kind, segment = self._kinds[which], self._segments[which]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer.append(k, v, kind.to(k.device), segment.to(k.device))
            everything = Visibility(layer.seen - q.shape[2], q.shape[2], everything=True)
            out = layer.attend(q, everything)
            layer.observe(q, everything)
            return out

        return attend
