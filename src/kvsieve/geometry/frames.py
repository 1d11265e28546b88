"""Frames of a stream that are read from disk one at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import DataError
from .images import list_images, load_and_preprocess_images, pillow
from .model import STream3R

__all__ = ["ImageFiles", "open_images"]


class ImageFiles:
    """Pictures of one size, as `load_and_preprocess_images` gives them, read when they are asked for.

    Args:
        paths: picture files, all of the same size in pixels.
        mode, target_size, patch_size: see `load_and_preprocess_images`.
    """

    def __init__(self, paths: Sequence[Path], mode: str, target_size: int, patch_size: int) -> None:
        self.paths, self._how = list(paths), (mode, target_size, patch_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Tensor:
        """`[3, H, W]`."""
        return load_and_preprocess_images([self.paths[index]], *self._how)[0]


def open_images(
    folder: str | os.PathLike[str], model: STream3R, mode: str = "crop", most: int | None = None
) -> ImageFiles | Tensor:
    """The first `most` pictures of a folder, by their names, in the size that a model was made for.

    Pictures of one size are read as they are needed. Where sizes differ, all are read at once, since the largest
    decides how far the others are filled up.

    Raises:
        DataError: no picture, or one that cannot be read.
        PolicyError: an unknown mode.
    """
    paths = list_images(folder)[:most]
    how = (mode, model.config["img_size"], model.config["patch_size"])
    if len({_size(path) for path in paths}) > 1:
        return load_and_preprocess_images(paths, *how)
    load_and_preprocess_images(paths[:1], *how)  # refuses now what it would refuse at the first frame
    return ImageFiles(paths, *how)


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the head of the file."""
    image_module = pillow()
    try:
        with image_module.open(path) as picture:
            return (picture.width, picture.height)
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); convert it to 8-bit PNG or JPEG") from error
