"""From picture files to what the model reads: float32 `[S, 3, H, W]` in [0, 1], sides multiples of the patch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, KvsieveError, PolicyError

__all__ = ["IMAGE_MODES", "check_images", "list_images", "load_and_preprocess_images", "pillow"]

IMAGE_MODES = ("crop", "pad")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
WHITE = 1.0
TOLERANCE = 0.01
"""How far from [0, 1] a resampled picture may reach."""
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes with more than eight bits per channel."""


def load_and_preprocess_images(
    paths: Iterable[str | os.PathLike[str]], mode: str = "crop", target_size: int = 518, patch_size: int = 14
) -> Tensor:
    """Read pictures the way the published model was fed.

    `"crop"` makes every picture `target_size` wide, rounds its height to whole patches, and cuts the middle
    `target_size` rows out of one that is taller. `"pad"` makes the longer side `target_size`, rounds the other one to
    whole patches, and fills up to a square with white, the smaller half on top and left. Rounding is Python's own
    (halves to even), resampling is Pillow's bicubic. A transparent picture is laid on white. Pictures that differ
    in size after this are filled up with white to the largest height and width. Orientation tags are not applied.

    Args:
        paths: picture files, in the order of the frames.
        mode: `"crop"` or `"pad"`.
        target_size: width (crop) or longer side (pad) in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.

    Returns:
        float32 `[S, 3, H, W]` in [0, 1], on the CPU.

    Raises:
        DataError: no path was given, or a file is missing, is no 8-bit picture, or is too narrow for one patch.
        PolicyError: an unknown mode, or sizes that do not fit each other.
        KvsieveError: Pillow is not installed.

    Source: the preprocessing of VGGT, which StreamVGGT and STream3R share; the defaults are theirs.
    """
    if mode not in IMAGE_MODES:
        raise PolicyError(f"mode={mode!r} is not one of {', '.join(IMAGE_MODES)}")
    if patch_size < 1 or target_size < 1 or target_size % patch_size:
        raise PolicyError(f"target_size={target_size} must be a positive multiple of patch_size={patch_size}")
    if isinstance(paths, (str, os.PathLike)):
        raise DataError(f"paths is the single path {os.fspath(paths)!r}; pass a list, such as list_images(folder)")
    files = [Path(path) for path in paths]
    if not files:
        raise DataError("no image was given; pass at least one path, such as list_images(folder)")
    frames = [_to_tensor(_resize(_read(file), mode, target_size, patch_size, file)) for file in files]
    if mode == "pad":
        height = width = target_size
    else:
        frames = [_middle_rows(frame, target_size) for frame in frames]
        height, width = (max(frame.shape[side] for frame in frames) for side in (1, 2))
    return torch.stack([_fill_up(frame, height, width) for frame in frames])


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures (png, jpg, jpeg, webp, bmp) directly in a folder, numbers in their names compared as numbers.

    Raises:
        DataError: the folder is missing, is no folder, or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; pass a folder with images ({', '.join(SUFFIXES)})")
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise DataError(f"{folder} holds no image; files that end in {', '.join(SUFFIXES)} are read")
    return sorted(found, key=lambda path: (_natural(path.name), path.name))


def check_images(images: Tensor, patch_size: int) -> None:
    """Refuse a tensor that the model cannot read, before it turns into NaN depth.

    Args:
        images: `[S, 3, H, W]` or `[B, S, 3, H, W]`, floating, in [0, 1], H and W multiples of `patch_size` (pixels).

    Raises:
        DataError: with what is wrong: type, rank, channels, size, an empty side, NaN or infinity, or the range.
    """
    if not isinstance(images, Tensor):
        raise DataError(f"images must be a tensor [S, 3, H, W] or [B, S, 3, H, W], not {type(images).__name__}")
    shape = list(images.shape)
    if images.ndim not in (4, 5):
        raise DataError(
            f"images have shape {shape}; [S, 3, H, W] or [B, S, 3, H, W] is allowed (one frame: image[None])"
        )
    if images.numel() == 0:
        raise DataError(f"images have shape {shape}, which is empty; pass at least one frame")
    if shape[-3] != 3:
        raise DataError(
            f"images have shape {shape}: {shape[-3]} channels where 3 are needed; channels come before H, W"
        )
    height, width = shape[-2:]
    if height % patch_size or width % patch_size:
        raise DataError(
            f"images are {height} x {width} pixels; both sides must be multiples of the patch size {patch_size}: "
            "use load_and_preprocess_images, or resize"
        )
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}; the model reads floats in [0, 1]: images.float() / 255 for 8 bits")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~images.isfinite()).sum())
        raise DataError(f"images hold {bad} values that are NaN or infinite; they must lie in [0, 1]")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise DataError(
            f"images reach from {low:.4g} to {high:.4g}; they must lie in [0, 1]: divide 8-bit values by 255, "
            "and do not normalise, the model does that itself"
        )


def pillow(module: str = "Image") -> Any:
    """A module of Pillow, or an error that says how to install it."""
    try:
        return import_module(f"PIL.{module}")
    except ImportError as error:
        raise KvsieveError("images need Pillow, which is not installed: pip install 'kvsieve[geometry]'") from error


def _read(path: Path) -> Any:
    """A picture in Pillow's mode RGB."""
    image_module = pillow()
    try:
        with image_module.open(path) as opened:
            opened.load()
            picture = opened.copy()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path of this image") from None
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); convert it to 8-bit PNG or JPEG") from error
    if picture.mode in _DEEP:
        raise DataError(f"{path} has more than 8 bits per channel (mode {picture.mode}); convert it to 8-bit RGB")
    if picture.mode in ("LA", "La", "PA", "RGBa") or (picture.mode == "P" and "transparency" in picture.info):
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        picture = image_module.alpha_composite(image_module.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _resize(picture: Any, mode: str, target: int, patch: int, path: Path) -> Any:
    """One side becomes `target`, the other a multiple of `patch`."""
    width, height = picture.size
    if mode == "crop" or width >= height:
        new_width, new_height = target, round(height * (target / width) / patch) * patch
    else:
        new_width, new_height = round(width * (target / height) / patch) * patch, target
    if not new_width or not new_height:
        raise DataError(
            f"{path} is {width} x {height} pixels: less than one patch of {patch} is left of its shorter side at "
            f"target_size={target}; cut the image to a less extreme shape"
        )
    return picture.resize((new_width, new_height), pillow().Resampling.BICUBIC)


def _to_tensor(picture: Any) -> Tensor:
    """float32 `[3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).contiguous().float() / 255


def _middle_rows(frame: Tensor, rows: int) -> Tensor:
    start = max(0, frame.shape[1] - rows) // 2
    return frame[:, start : start + rows]


def _fill_up(frame: Tensor, height: int, width: int) -> Tensor:
    """White around `frame`, the smaller half on top and left."""
    down, across = height - frame.shape[1], width - frame.shape[2]
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return torch.nn.functional.pad(frame, margins, value=WHITE)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: digits by value, other text without case."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part.lower()) for part in parts]
