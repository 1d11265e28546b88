"""The frames of a video, from whatever holds them: pictures, arrays, a folder, or a file."""

from __future__ import annotations

import base64
import io
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, KvsieveError

__all__ = ["VIDEO_SUFFIXES", "Frames", "open_frames"]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_ALLOWED = (
    f"give a folder of pictures, a file that ends in {', '.join(('.npy', '.npz', '.arrow', *VIDEO_SUFFIXES))}, "
    "an array [frames, H, W, 3], or a list or an iterator of pictures"
)
_COLUMN = "frame"
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes with more than eight bits per channel."""
_ROUNDING = 1e-5
"""How far from [0, 1] rounding may have carried a value."""
_NEARLY = Fraction(1, 1000)
"""Seconds by which the times in a file may be off, as Matroska and WebM round them to whole milliseconds."""

Frame = NDArray[np.uint8]
T = TypeVar("T")


class Frames:
    """The frames of one video, made by `open_frames`.

    Each frame is `[H, W, 3]` uint8 RGB, contiguous, and belongs to whoever iterates: writing to it changes nothing
    else. All frames have the size of the first one. What can be read again may be iterated several times, also at
    once; frames that came from an iterator can be gone through once.

    Attributes:
        count: how many frames there are; `None` where that takes decoding (a video file that does not say, or is
            sampled at a rate) or is not known at all (an iterator). For a video file it is what the file says.
    """

    def __init__(self, read: Callable[[], Iterator[Any]], count: int | None, where: str) -> None:
        self.count = count
        self._read = read
        self._where = where

    def __iter__(self) -> Iterator[Frame]:
        """Decode one frame after another.

        Raises:
            DataError: a picture cannot be decoded, is no picture, or differs in size from the first one; there was no
                frame; or the frames came from an iterator that is used up.
        """
        return self._checked(self._read())

    def _checked(self, pictures: Iterator[Any]) -> Iterator[Frame]:
        first: tuple[int, ...] | None = None
        for i, picture in enumerate(pictures):
            frame = _frame(picture, f"{self._where}: frame {i}")
            first = first or frame.shape
            if frame.shape != first:
                raise DataError(
                    f"{self._where}: frame {i} is {_size(frame.shape)} pixels (width x height), the first was "
                    f"{_size(first)}; all frames of a video must have one size"
                )
            yield frame
        if first is None:
            raise _no_frames(self._where, "the source")


def open_frames(source: Any, *, fps: float | None = None, where: str = "video") -> Frames:
    """One way to read frames from whatever holds them.

    A picture is a Pillow image, the path of a picture file, or an array or tensor `[H, W, 3]`, `[3, H, W]` (where the
    last side is not 3), `[H, W]` (grey) or `[H, W, 4]` (with transparency), uint8, or floats in [0, 1], which are
    multiplied by 255 and rounded. Transparent pictures are laid on black. Orientation tags of pictures are not
    applied; the rotation that a video file asks for is, where PyAV is new enough to report it.

    `source` is one of:

    * an array or tensor `[frames, ...]` of such pictures (`[n, m, 3]` and `[n, m, 4]` are refused as single ones);
    * a list, a tuple or another sized collection of pictures;
    * an iterator of pictures, which can be gone through once;
    * a folder: its png, jpg, jpeg, webp and bmp files, numbers in their names compared as numbers;
    * an `.npy` file, or an `.npz` file with the array under `frames` or as its only one (`.npz` is read as a whole);
    * an `.arrow` file with a column `frame` of pictures in base64 or as bytes; needs `kvsieve[data]`;
    * a video file (`VIDEO_SUFFIXES`); needs `kvsieve[video]`.

    Folders, lists of paths, `.npy`, `.arrow` and video files are read frame by frame while iterating. Reading picture
    files and `.arrow` files needs Pillow (`kvsieve[vlm]`).

    Args:
        source: what holds the frames; `Frames` are handed back as they are.
        fps: frames per second to sample a video file at: frame i is the one in view `i / fps` seconds after the first.
            By default every frame is read. Sources other than video files have no times: all their frames are read.
        where: what messages begin with.

    Raises:
        DataError: there is no frame, a path is missing or ends in something unknown, a file cannot be read, an array
            has the wrong shape or type, or `fps` is not a positive number. The rest is found while iterating.
        KvsieveError: a package that is needed for this source is not installed.
    """
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf):
        raise DataError(f"{where}: fps must be a positive number of frames per second, not {fps!r}")
    if isinstance(source, Frames):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _path(_existing(source, where, "file or folder", Path.exists), fps, where)
    if isinstance(source, np.ndarray) or _is(source, "torch", "Tensor"):
        return _stack(source, where)
    if isinstance(source, (list, tuple)):
        return _listed(source, where)
    if isinstance(source, Iterator):
        return Frames(_Once(source, where), None, where)
    # The order of a set means nothing, and iterating a mapping or bytes gives no pictures.
    if isinstance(source, Iterable) and not isinstance(source, (Mapping, Set, bytes, bytearray)):
        count = len(source) if isinstance(source, Sized) else None
        if count == 0:
            raise _no_frames(where, f"the {type(source).__name__}")
        return Frames(partial(iter, source), count, where)
    raise DataError(f"{where}: {type(source).__name__} ({source!r:.80}) holds no frames; {_ALLOWED}")


class _Once:
    """Hands out an iterator, and says so when asked again."""

    def __init__(self, iterator: Iterator[Any], where: str) -> None:
        self.iterator: Iterator[Any] | None = iterator
        self.where = where

    def __call__(self) -> Iterator[Any]:
        if self.iterator is None:
            raise DataError(
                f"{self.where}: the frames came from an iterator, which can be gone through once, and has been; "
                "give a list, a folder or a file to read them several times"
            )
        iterator, self.iterator = self.iterator, None
        return iterator


def _path(path: Path, fps: float | None, where: str) -> Frames:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path, where)
    if suffix in (".npy", ".npz"):
        return _stack(_numpy(path, where), f"{where}: {path}")
    if suffix == ".arrow":
        count = sum(len(column) for column in _columns(path, where))
        if count == 0:
            raise _no_frames(where, path)
        return Frames(partial(_arrow_pictures, path, where), count, where)
    if suffix in VIDEO_SUFFIXES:
        with _video(path, where) as container:
            count = container.streams.video[0].frames
        # How many frames a rate picks depends on the times of all of them.
        return Frames(partial(_video_pictures, path, fps, where), count if count and fps is None else None, where)
    raise DataError(f"{where}: {path} is a file of an unknown kind; {_ALLOWED}")


def _existing(given: str | os.PathLike[str], where: str, what: str, exists: Callable[[Path], bool]) -> Path:
    try:
        path = Path(given)
        if str(given).strip() and exists(path):
            return path
    except (OSError, ValueError):  # a text too long for a path, or with a zero in it
        pass
    raise DataError(f"{where}: {str(given)!r:.200} is not the path of a {what} that exists")


def _folder(folder: Path, where: str) -> Frames:
    from ..geometry.images import list_images  # it imports torch, which reading records does not need

    try:
        found = list_images(folder)
    except (DataError, OSError) as error:
        raise DataError(f"{where}: {error}") from None
    # Names with a dot in front are what a system keeps beside the pictures, such as "._frame_1.jpg".
    return _listed([file for file in found if not file.name.startswith(".")], where)


def _listed(pictures: Sequence[Any], where: str) -> Frames:
    if not pictures:
        raise _no_frames(where, f"the {type(pictures).__name__}")
    for i, picture in enumerate(pictures):
        if isinstance(picture, (str, os.PathLike)):
            _existing(picture, f"{where}: frame {i}", "picture file", Path.is_file)
    return Frames(partial(iter, pictures), len(pictures), where)


def _stack(stack: Any, where: str) -> Frames:
    shape = list(stack.shape)
    if len(shape) not in (3, 4) or (len(shape) == 3 and shape[2] in (3, 4)):
        one = "; for a single picture: picture[None]" if len(shape) == 3 else ""
        raise DataError(
            f"{where}: an array of shape {shape} is not one of frames; [frames, H, W, 3], [frames, 3, H, W] and "
            f"[frames, H, W] are allowed{one}"
        )
    if shape[0] == 0:
        raise _no_frames(where, f"an array of shape {shape}")
    _frame(stack[0], f"{where}: frame 0")  # what is wrong with the first one is mostly wrong with all
    return Frames(lambda: (stack[i] for i in range(shape[0])), shape[0], where)


def _numpy(path: Path, where: str) -> Any:
    """The array in a file; that of an `.npy` stays on disk."""
    with _reading(f"{where}: {path}", zipfile.BadZipFile, zlib.error), path.open("rb") as file:
        if file.read(2) != b"PK":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        file.seek(0)
        with np.load(file, allow_pickle=False) as loaded:
            names = list(loaded.files)
            name = "frames" if "frames" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise DataError(f"{where}: {path} holds the arrays {names}; one of them must be called frames")
            return loaded[name]


def _columns(path: Path, where: str) -> Iterator[Any]:
    """The column of pictures, one batch of rows after another, mapped into memory and not decoded."""
    arrow = _package("pyarrow", "arrow files", "pyarrow", "data", where)
    with _reading(f"{where}: {path}", arrow.ArrowException), arrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":  # the file format; the stream format has no such mark
            reader = arrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            reader = batches = arrow.ipc.open_stream(file)
        if _COLUMN not in reader.schema.names:
            raise DataError(f"{where}: {path} has the columns {reader.schema.names}; one must be called {_COLUMN}")
        for batch in batches:
            yield batch.column(_COLUMN)


def _arrow_pictures(path: Path, where: str) -> Iterator[Any]:
    row = 0
    for column in _columns(path, where):
        for cell in column:
            value, name = cell.as_py(), f"{where}: row {row} of {path}"
            if not isinstance(value, (str, bytes)):
                raise DataError(f"{name} holds {type(value).__name__}; a picture is base64 text or bytes")
            with _reading(name):
                encoded = base64.b64decode(value) if isinstance(value, str) else value
            yield _decoded(io.BytesIO(encoded), name)
            row += 1


@contextmanager
def _video(path: Path, where: str) -> Iterator[Any]:
    """An open video file with at least one video stream."""
    av = _package("av", "video files", "PyAV", "video", where)
    with _reading(f"{where}: {path}", av.error.FFmpegError), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{where}: {path} has no video in it")
        yield container


def _video_pictures(path: Path, fps: float | None, where: str) -> Iterator[Any]:
    with _video(path, where) as container:
        shown: Iterator[Any] = container.decode(video=0)
        if fps is not None:
            shown = _sampled(_timed(shown, container.streams.video[0].average_rate), Fraction(fps))
        for frame in shown:
            # The degrees, counted against the clock, by which a player turns the picture; older PyAV does not say.
            turns = round(getattr(frame, "rotation", 0) / 90)
            yield np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _timed(frames: Iterator[Any], rate: Fraction | None) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Each frame with the seconds it comes into view and goes; where the file does not say, `rate` tells."""
    usual, end = 1 / rate if rate else Fraction(0), Fraction(0)
    for frame in frames:
        start = end if frame.pts is None else frame.pts * frame.time_base
        length = getattr(frame, "duration", None)
        end = start + (length * frame.time_base if length and frame.time_base else usual)
        yield start, end, frame


def _sampled(timed: Iterable[tuple[Fraction, Fraction, T]], fps: Fraction) -> Iterator[T]:
    """What is in view 0, 1 / fps, 2 / fps ... seconds after the first frame came into view, until the last one goes.

    Args:
        timed: start and end in seconds of each frame, and the frame. A frame stays in view until the next one comes.
        fps: frames per second wanted.
    """
    rest = iter(timed)
    for begin, end, frame in rest:
        due, held = begin, frame
        for start, later, following in rest:
            while due + _NEARLY < start:
                yield held
                due += 1 / fps
            end, held = later, following
        while due == begin or due + _NEARLY < end:
            yield held
            due += 1 / fps


def _frame(picture: Any, name: str) -> Frame:
    """A picture as `[H, W, 3]` uint8 in memory of its own; `name` is what messages begin with."""
    if isinstance(picture, (str, os.PathLike)):
        picture = _decoded(Path(picture), f"{name} ({os.fspath(picture)})")
    elif _is(picture, "PIL.Image", "Image"):
        picture = _from_pillow(picture, name)
    elif _is(picture, "torch", "Tensor"):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
    if not isinstance(picture, np.ndarray):
        raise DataError(
            f"{name} is {type(picture).__name__} ({picture!r:.80}); a picture is a Pillow image, a path, or an array"
        )
    array = _channels_last(picture, name)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # also where they are NaN
            raise DataError(f"{name} reaches from {low:.4g} to {high:.4g}; floats must lie in [0, 1] and not be NaN")
        array = np.rint(array.clip(0, 1).astype(np.float32) * 255)
    elif array.dtype != np.uint8:
        raise DataError(f"{name} is of type {array.dtype}; uint8, or floats in [0, 1], are allowed")
    if array.shape[2] == 4:
        array = np.rint(array[:, :, :3].astype(np.float32) * (array[:, :, 3:] / np.float32(255)))
    return np.array(array, np.uint8, order="C")


def _channels_last(array: NDArray[Any], name: str) -> NDArray[Any]:
    """`[H, W, 3]` or `[H, W, 4]`, as a view."""
    if array.size and array.ndim == 2:
        return np.broadcast_to(array[:, :, None], (*array.shape, 3))
    if array.size and array.ndim == 3:
        if array.shape[2] != 3 and array.shape[0] == 3:
            return np.moveaxis(array, 0, 2)
        if array.shape[2] in (3, 4):
            return array
    raise DataError(
        f"{name} has the shape {list(array.shape)}; a picture is [H, W, 3], [3, H, W], [H, W] or [H, W, 4], not empty"
    )


def _decoded(file: Path | io.BytesIO, name: str) -> NDArray[Any]:
    image = _package("PIL.Image", "picture files", "Pillow", "vlm", name)
    with _reading(name, image.DecompressionBombError), image.open(file) as picture:
        return _from_pillow(picture, name)


def _from_pillow(picture: Any, name: str) -> NDArray[Any]:
    if picture.mode in _DEEP:
        raise DataError(f"{name} has more than 8 bits per channel (mode {picture.mode}); convert it to 8-bit RGB")
    clear = picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info
    with _reading(name):
        return np.asarray(picture.convert("RGBA" if clear else "RGB"))


@contextmanager
def _reading(name: str, *also: type[Exception]) -> Iterator[None]:
    """What goes wrong when a file is not what it should be, as an error that begins with `name`."""
    expected: tuple[type[Exception], ...] = (OSError, EOFError, SyntaxError, ValueError, *also)
    try:
        yield
    except DataError:
        raise
    except expected as error:
        raise DataError(f"{name} cannot be read: is it damaged, or of another kind? ({error})") from error


def _package(module: str, what: str, package: str, extra: str, where: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise KvsieveError(
            f"{where}: {what} need {package}, which is not installed: pip install 'kvsieve[{extra}]'"
        ) from error


def _is(value: Any, module: str, name: str) -> bool:
    """Whether it is of a class whose module need not be there: nothing can be of it while that is not imported."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))


def _no_frames(where: str, what: object) -> DataError:
    return DataError(f"{where}: {what} holds no frames; a video has at least one")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
