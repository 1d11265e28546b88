"""What becomes of a stream's predictions: all kept, the last ones kept, written to disk, or handed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import PolicyError

__all__ = ["Predictions", "Sink"]

Sink = Callable[[int, dict[str, Tensor]], None]
"""Called with the index of a frame and its predictions, `[B, 1, ...]`."""


class Predictions:
    """Keeps `[B, frames, ...]` tensors without copying all of them at every frame.

    Args:
        keep: `"all"`, `"last"`, a folder, or a `Sink`.
    """

    def __init__(self, keep: str | Path | Sink) -> None:
        if isinstance(keep, str) and keep not in ("all", "last"):
            raise PolicyError(
                f'predictions={keep!r} is not "all" or "last"; a folder is given as a pathlib.Path, a function as it is'
            )
        self.keep = keep
        self.clear()

    def clear(self) -> None:
        """Forget what is kept."""
        self._buffers: dict[str, Tensor] = {}
        self._count = 0

    def add(self, first: int, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the predictions of the frames from index `first` on; returns what `forward_stream` returns."""
        frames = next(iter(new.values())).shape[1]
        if self.keep == "all":
            self._append(new, frames)
            return self.held()
        self._buffers, self._count = dict(new), frames
        if not isinstance(self.keep, str):
            for i in range(frames):
                one = {name: value[:, i : i + 1] for name, value in new.items()}
                if isinstance(self.keep, Path):
                    self._write(self.keep, first + i, one)
                else:
                    self.keep(first + i, one)
        return self.held()

    def restore(self, held: dict[str, Tensor]) -> None:
        """Begin with these."""
        if isinstance(self.keep, str):
            self._buffers, self._count = held, next(iter(held.values())).shape[1] if held else 0

    def held(self) -> dict[str, Tensor]:
        """`[B, frames, ...]` of what is kept: views, which later frames leave as they are."""
        return {name: buffer[:, : self._count] for name, buffer in self._buffers.items()}

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers.values())

    def _append(self, new: dict[str, Tensor], frames: int) -> None:
        need = self._count + frames
        for name, value in new.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape[1] < need:
                roomy = value.new_empty(value.shape[0], max(need + need // 2, 4), *value.shape[2:])
                if buffer is not None:
                    roomy[:, : self._count] = buffer[:, : self._count]
                self._buffers[name] = buffer = roomy
            buffer[:, self._count : need] = value
        self._count = need

    @staticmethod
    def _write(folder: Path, index: int, frame: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous().cpu() for name, value in frame.items()}
        save_file(tensors, folder / f"frame_{index:06d}.safetensors")
