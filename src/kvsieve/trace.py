"""What a cache held while it read: recorded from the cache itself after every forward pass, never simulated."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._rowlog import write_text
from .errors import DataError

if TYPE_CHECKING:
    from .cache import SieveCache

__all__ = ["Recorder", "Trace", "held_by"]

FORMAT = 1
NEVER = 0
"""In `Trace.left`: the token was held to the end."""


@dataclass(frozen=True)
class Trace:
    """When each token left each head of each layer; of batch row 0.

    A token that has left never comes back, so one number per token, head and layer tells the whole story.

    Attributes:
        left: `[L, Hkv, S]` int32; how many tokens the cache had seen when the token at this original position was let
            go, or 0 (`NEVER`) if it was still held at the end. Heads that hold fewer tokens than others are no
            special case.
        seen: `[steps]` int32, ascending; tokens seen after each recorded forward pass. The last one is `S`.
        layers: index of each recorded layer in the model.
        about: JSON-ready, whatever the recorder was told. Names in use: `method`, `budget`, `model`, `task`, `id`,
            `text` (all that was read), `offsets` (`[S][2]` characters of `text` that each token stands for; an empty
            range for special tokens), `evidence` and `answers` (lists of `[first, last + 1]` token positions that say
            what has to be known, and of those that say the answer itself), `asked` (tokens seen when the answer was
            about to be given), `question` (position of the first token of the question), `expected`, `answer`,
            `score`.
    """

    left: NDArray[np.int32] = field(repr=False)
    seen: NDArray[np.int32] = field(repr=False)
    layers: tuple[int, ...]
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens read, `S`."""
        return int(self.left.shape[-1])

    def held(self, seen: int | None = None) -> NDArray[np.bool_]:
        """`[L, Hkv, S]`: what was held once the cache had seen so many tokens; by default at the end.

        Tokens that came later count as not held. A token that was let go after the forward pass that ended at `seen`
        is not held either.
        """
        at = self.tokens if seen is None else seen
        held: NDArray[np.bool_] = (self.left == NEVER) | (self.left > at)
        held[..., at:] = False
        return held

    def share(self, seen: int | None = None) -> NDArray[np.float64]:
        """`[S]`: the share of all heads of all layers that held each token; see `held`."""
        return self.held(seen).mean(axis=(0, 1), dtype=np.float64)

    def with_about(self, about: Mapping[str, Any]) -> Trace:
        """The same with something else said about it."""
        return replace(self, about=dict(about))

    def save(self, path: str | Path) -> Path:
        """Write one `.npz` file in one step; the same trace gives the same bytes.

        Raises:
            DataError: `about` holds something that JSON cannot hold.
        """
        try:
            about = json.dumps({"format": FORMAT, **self.about}, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"a trace cannot hold this: {error}") from None
        arrays = {"left": self.left, "seen": self.seen, "layers": np.array(self.layers, dtype=np.int32)}
        arrays["about"] = np.frombuffer(about, dtype=np.uint8)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in arrays.items():
                one = io.BytesIO()
                np.lib.format.write_array(one, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), one.getvalue(), zipfile.ZIP_DEFLATED)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content.getvalue())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` has written.

        Raises:
            DataError: no such file, or not a trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                left, seen, layers = file["left"], file["seen"], tuple(int(i) for i in file["layers"])
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a recorded trace: {error}") from None
        if about.pop("format", None) != FORMAT:
            raise DataError(f"{path} was written by another version of kvsieve; record it again")
        if left.ndim != 3 or left.shape[0] != len(layers) or seen.ndim != 1:
            raise DataError(f"{path} is not a recorded trace: its parts do not fit together")
        return cls(left, seen, layers, about)


def held_by(cache: SieveCache) -> NDArray[np.bool_]:
    """`[L, Hkv, S]`: which of the `S` tokens seen each head of each managed layer holds now; of batch row 0."""
    layers = []
    for layer in cache.managed:
        kept = cache.kept_positions(layer.core.layer_idx)[0].cpu().numpy()
        table = np.zeros((kept.shape[0], layer.core.seen), dtype=bool)
        for row, positions in zip(table, kept, strict=True):
            row[positions[positions >= 0]] = True
        layers.append(table)
    return np.stack(layers)


class Recorder:
    """Watches one cache: call `step` after every forward pass, then `trace`.

    Args:
        cache: the cache, before its first token.
    """

    def __init__(self, cache: SieveCache) -> None:
        self.cache = cache
        self._layers = [layer.core for layer in cache.managed]
        self._left: NDArray[np.int32] | None = None
        self._seen: list[int] = []

    def step(self) -> None:
        """Note what left since the last call. Twice after the same forward pass, around an eviction, counts once."""
        now = self._layers[0].seen
        if not now:
            return
        held = held_by(self.cache)
        grown = np.zeros(held.shape, dtype=np.int32)
        if self._left is not None:
            grown[..., : self._left.shape[-1]] = self._left
        grown[~held & (grown == NEVER)] = now
        grown[held] = NEVER  # the last token may have been taken back and fed again
        self._left = grown
        if self._seen[-1:] != [now]:
            self._seen.append(now)

    def trace(self, **about: Any) -> Trace:
        """What was recorded so far.

        Args:
            about: see `Trace.about`.

        Raises:
            DataError: nothing was recorded.
        """
        if self._left is None:
            raise DataError("nothing was recorded: call step() after every forward pass")
        layers = tuple(core.layer_idx for core in self._layers)
        return Trace(
            self._left.copy(), np.array(self._seen, dtype=np.int32), layers, {"method": self.cache.policy.name, **about}
        )
