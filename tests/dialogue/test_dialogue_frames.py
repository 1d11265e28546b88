"""Every source of frames gives the same frames, one at a time, and says what is wrong with it."""

from __future__ import annotations

import base64
import io
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kvsieve.dialogue.frames import VIDEO_SUFFIXES, Frames, _sampled, open_frames
from kvsieve.errors import DataError, KvsieveError

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 5, 7, 3), np.uint8)
GREY = PICTURES[..., 0]


def save(folder: Path, pictures: NDArray[np.uint8] = PICTURES, name: str = "frame_{}.png") -> list[Path]:
    """One file per picture, numbered without leading zeros."""
    folder.mkdir(exist_ok=True)
    files = [folder / name.format(i) for i in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(file)
    return files


def check(frames: Frames, expected: Any = PICTURES, count: int | None = 12) -> None:
    """They are `expected`, twice, and belong to whoever reads them."""
    assert frames.count == count
    for _ in range(2):
        found = list(frames)
        assert all(one.dtype == np.uint8 and one.flags.c_contiguous and one.flags.writeable for one in found)
        np.testing.assert_array_equal(np.stack(found), expected)
        for one in found:
            one[:] = 0


def test_arrays_and_tensors() -> None:
    first = PICTURES.transpose(0, 3, 1, 2)
    for source in (PICTURES, first, torch.tensor(PICTURES), torch.tensor(first.copy())):
        check(open_frames(source.copy() if isinstance(source, np.ndarray) else source))
        check(open_frames(list(source)))
        check(open_frames(tuple(source)))
        check(open_frames(deque(source)))
    for kind in (np.float32, np.float64):
        check(open_frames((PICTURES / 255).astype(kind)))
    check(open_frames(torch.tensor(first / 255, requires_grad=True)))
    check(open_frames(torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16).view(1, 1, 1, 3)), [[[[0, 128, 255]]]], 1)
    check(open_frames(np.array([-1e-7, 0.5, 1 + 1e-7]).reshape(1, 1, 1, 3)), [[[[0, 128, 255]]]], 1)


def test_grey_becomes_rgb() -> None:
    expected = np.stack([GREY] * 3, -1)
    for source in (GREY, torch.tensor(GREY), list(GREY), [Image.fromarray(one) for one in GREY]):
        check(open_frames(source), expected)
    check(open_frames((GREY / 255).astype(np.float32)), expected)


def test_what_is_transparent_is_laid_on_black() -> None:
    alpha = np.full((*GREY.shape, 1), 51, np.uint8)
    clear = np.concatenate([PICTURES, alpha], -1)
    expected = np.rint(PICTURES * 0.2)
    check(open_frames(clear), expected)
    check(open_frames(clear / 255), expected)
    check(open_frames([Image.fromarray(one) for one in clear]), expected)
    palette = Image.fromarray(PICTURES[0]).convert("P")
    solid = np.asarray(palette.convert("RGB"))
    palette.info["transparency"] = bytes(256)
    check(open_frames([palette]), np.zeros_like(PICTURES[:1]), 1)
    assert solid.any()


def test_the_last_side_decides_where_the_channels_are() -> None:
    picture = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    check(open_frames([picture]), picture[None], 1)
    check(open_frames([picture.transpose(0, 2, 1)]), picture.transpose(2, 1, 0)[None], 1)


def test_pictures_and_paths(tmp_path: Path) -> None:
    files = save(tmp_path)
    check(open_frames([Image.fromarray(one) for one in PICTURES]))
    check(open_frames(files))
    check(open_frames(tuple(str(file) for file in files)))
    check(open_frames([files[0], Image.fromarray(PICTURES[1]), PICTURES[2], *files[3:]]))
    frames = open_frames(iter(files))
    assert frames.count is None
    np.testing.assert_array_equal(np.stack(list(frames)), PICTURES)


def test_a_folder_in_the_natural_order_of_its_names(tmp_path: Path) -> None:
    save(tmp_path / "frames")
    (tmp_path / "frames" / "notes.txt").write_text("nothing")
    (tmp_path / "frames" / "._frame_1.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "frames" / "more.png").mkdir()
    check(open_frames(tmp_path / "frames"))
    check(open_frames(str(tmp_path / "frames")))


def test_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PICTURES)
    np.savez(tmp_path / "b.npz", frames=PICTURES, times=np.arange(12))
    np.savez_compressed(tmp_path / "c.npz", anything=PICTURES)
    for name in ("a.npy", "b.npz", "c.npz"):
        check(open_frames(tmp_path / name))
    np.savez(tmp_path / "d.npz", a=PICTURES, b=PICTURES)
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(tmp_path / "empty.npy", PICTURES[:0])
    (tmp_path / "text.npy").write_text("frames")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:200])
    (tmp_path / "nothing.npy").touch()
    for name, message in (
        ("d.npz", r"d.npz holds the arrays \['a', 'b'\]; one of them must be called frames"),
        ("objects.npy", "objects.npy cannot be read"),
        ("text.npy", "text.npy cannot be read"),
        ("cut.npz", "cut.npz cannot be read"),
        ("nothing.npy", "nothing.npy cannot be read"),
        ("empty.npy", "holds no frames"),
    ):
        with pytest.raises(DataError, match=rf"^v: .*{message}"):
            open_frames(tmp_path / name, where="v")


def test_an_iterator_can_be_gone_through_once() -> None:
    frames = open_frames((one for one in PICTURES), where="kitchen-1")
    assert frames.count is None
    assert open_frames(frames) is frames
    np.testing.assert_array_equal(np.stack(list(frames)), PICTURES)
    with pytest.raises(DataError, match=r"^kitchen-1: the frames came from an iterator, .* once"):
        iter(frames)


def test_what_makes_iterators_can_be_gone_through_often() -> None:
    class Camera:
        def __iter__(self) -> Iterator[NDArray[np.uint8]]:
            return iter(PICTURES)

    check(open_frames(Camera()), count=None)


def test_an_iterator_is_asked_for_what_is_needed_only() -> None:
    asked: list[int] = []
    alive: list[weakref.ref[Any]] = []

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for i in range(100):
            asked.append(i)
            picture = np.zeros((4, 4, 3), np.uint8)
            alive.append(weakref.ref(picture))
            yield picture

    frames = open_frames(pictures())
    assert asked == []
    for _ in islice(frames, 20):
        assert sum(ref() is not None for ref in alive) <= 2
    assert asked == list(range(20))


def test_files_are_opened_when_their_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = save(tmp_path)
    opened: list[str] = []
    plain = Image.open

    def noted(file: Any, *args: Any) -> Any:
        opened.append(Path(file).name)
        return plain(file, *args)

    monkeypatch.setattr(Image, "open", noted)
    for source in (tmp_path, files, iter(files)):
        opened.clear()
        frames = open_frames(source)
        assert opened == []
        assert len(list(islice(frames, 3))) == 3
        assert opened == ["frame_0.png", "frame_1.png", "frame_2.png"]


def test_arrays_need_no_other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file, *_) = save(tmp_path)
    for suffix in (".arrow", *VIDEO_SUFFIXES):
        (tmp_path / f"a{suffix}").touch()
    for name in ("PIL", "PIL.Image", "av", "pyarrow", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    check(open_frames(PICTURES))
    with pytest.raises(KvsieveError, match=r"^v: frame 0 .*need Pillow, .*'kvsieve\[vlm\]'"):
        list(open_frames([file], where="v"))
    with pytest.raises(KvsieveError, match=r"^v: arrow files need pyarrow, .*'kvsieve\[data\]'"):
        open_frames(tmp_path / "a.arrow", where="v")
    for suffix in VIDEO_SUFFIXES:
        with pytest.raises(KvsieveError, match=r"^v: video files need PyAV, .*'kvsieve\[video\]'"):
            open_frames(tmp_path / f"a{suffix}", where="v")


def test_sources_without_a_frame(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for source in ([], (), deque(), PICTURES[:0], torch.zeros(0, 4, 4, 3), tmp_path):
        with pytest.raises(DataError, match=r"^v: .* holds no (frames|image)"):
            open_frames(source, where="v")
    (tmp_path / "._a.png").touch()
    with pytest.raises(DataError, match=r"^v: the list holds no frames"):
        open_frames(tmp_path, where="v")
    frames = open_frames(iter(()), where="v")
    with pytest.raises(DataError, match=r"^v: the source holds no frames"):
        list(frames)


@pytest.mark.parametrize("source", [None, 3, {"a": 1}, {1, 2}, b"\xff\xd8", Image.new("RGB", (4, 4))])
def test_what_holds_no_frames(source: Any) -> None:
    with pytest.raises(DataError, match=r"^v: \w+ \(.*\) holds no frames; give a folder of pictures, a file"):
        open_frames(source, where="v")


@pytest.mark.parametrize("source", ["", "  ", "no/such/folder", "https://example.org/a.mp4", "a" * 5000, "a\0b"])
def test_texts_that_are_no_path(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^v: '.* is not the path of a file or folder that exists"):
        open_frames(source, where="v")
    with pytest.raises(DataError, match=r"^v: frame 1: '.* is not the path of a picture file that exists"):
        open_frames([PICTURES[0], source], where="v")
    with pytest.raises(DataError, match=r"^v: frame 0: .* is not the path of a picture file that exists"):
        open_frames([tmp_path], where="v")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good, bad, cut, deep, *_ = save(tmp_path)
    bad.write_text("no picture")
    cut.write_bytes(good.read_bytes()[:60])
    Image.new("I;16", (7, 5)).save(deep)
    for file in (bad, cut):
        frames = iter(open_frames([good, file], where="v"))
        next(frames)
        with pytest.raises(DataError, match=rf"^v: frame 1 \(.*{file.name}\) cannot be read"):
            next(frames)
    with pytest.raises(DataError, match=rf"^v: frame 0 \(.*{deep.name}\) has more than 8 bits per channel"):
        list(open_frames([deep], where="v"))
    for name in ("a.txt", "a.png", "a"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"^v: .*{name} is a file of an unknown kind; give .*\.mp4"):
            open_frames(tmp_path / name, where="v")
    (tmp_path / "a.png").unlink()
    frames = iter(open_frames(tmp_path, where="v"))
    next(frames)
    with pytest.raises(DataError, match=r"^v: frame 1 .*frame_1.png"):
        next(frames)


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    files = save(tmp_path)
    frames = open_frames(files, where="v")
    files[1].unlink()
    with pytest.raises(DataError, match=r"^v: frame 1 .*frame_1.png\) cannot be read.*No such file"):
        list(frames)


def test_frames_of_different_sizes() -> None:
    frames = iter(open_frames([np.zeros((32, 32, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)], where="v"))
    next(frames)
    with pytest.raises(DataError, match=r"^v: frame 1 is 64x48 pixels \(width x height\), the first was 32x32"):
        next(frames)


@pytest.mark.parametrize("shape", [(), (5,), (5, 7), (5, 7, 3), (5, 7, 4), (1, 12, 5, 7, 3)])
def test_arrays_that_are_no_stack(shape: tuple[int, ...]) -> None:
    for source in (np.zeros(shape, np.uint8), torch.zeros(shape)):
        with pytest.raises(DataError, match=r"^v: an array of shape \[.*\] is not one of frames; \[frames, H, W, 3\]"):
            open_frames(source, where="v")


@pytest.mark.parametrize("shape", [(5, 7, 2), (5, 7, 1), (1, 5, 7), (0, 7, 3), (5, 0), (7,), (1, 5, 7, 3)])
def test_arrays_that_are_no_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"^v: frame 1 has the shape \[.*\]; a picture is \[H, W, 3\]"):
        list(open_frames([PICTURES[0], np.zeros(shape, np.uint8)], where="v"))
    if len(shape) == 3 and shape[2] != 3:
        with pytest.raises(DataError, match=r"^v: frame 0 has the shape"):
            open_frames(np.zeros((6, *shape), np.uint8), where="v")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((5, 7, 3), np.int64), "is of type int64; uint8, or floats in"),
        (np.zeros((5, 7, 3), bool), "is of type bool"),
        (np.zeros((5, 7, 3), object), "is of type object"),
        (torch.zeros(5, 7, 3, dtype=torch.int32), "is of type int32"),
        (PICTURES[0].astype(np.float32), "reaches from [0-9] to 2[0-9]+; floats must lie in"),
        (np.full((5, 7), -0.01), "reaches from -0.01 to -0.01"),
        (np.full((5, 7), np.nan), "reaches from nan to nan"),
        (np.full((5, 7), np.inf), "reaches from inf to inf"),
        (torch.full((5, 7, 3), float("nan")), "reaches from nan"),
        ([[0, 0], [0, 0]], "is list .*; a picture is a Pillow image, a path, or an array"),
        (None, "is NoneType"),
        (b"\xff\xd8", "is bytes"),
        (Image.new("F", (7, 5)), "has more than 8 bits"),
    ],
)
def test_pictures_that_cannot_be_used(picture: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^v: frame 0 {message}"):
        list(open_frames([picture], where="v"))
    with pytest.raises(DataError, match=rf"^v: frame 1 {message}"):
        list(open_frames(iter([PICTURES[0], picture]), where="v"))
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        with pytest.raises(DataError, match=rf"^v: frame 0 {message}"):
            open_frames(picture[None], where="v")


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_rate_that_is_none(fps: Any) -> None:
    with pytest.raises(DataError, match=r"^v: fps must be a positive number of frames per second, not "):
        open_frames(PICTURES, fps=fps, where="v")


def test_a_rate_picks_frames_of_a_video_only() -> None:
    check(open_frames(PICTURES, fps=0.5))


def timed(times: list[float], end: float) -> Iterator[tuple[Fraction, Fraction, float]]:
    """Each frame, called by its time, in view until the next one comes."""
    for start, until in zip(times, [*times, end][1:], strict=True):
        yield Fraction(start), Fraction(until), start


@pytest.mark.parametrize(
    ("times", "end", "fps", "picked"),
    [
        ([0, 1, 2, 3], 4, 1, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 4, 0.5, [0, 2]),
        ([0, 1, 2, 3], 4, 0.4, [0, 2]),
        ([0, 1, 2], 3, 2, [0, 0, 1, 1, 2, 2]),
        ([5, 6, 7, 8], 9, 0.5, [5, 7]),
        ([0, 0.4, 3.2], 5, 1, [0, 0.4, 0.4, 0.4, 3.2]),
        ([0, 0.033, 0.067, 0.1, 0.133], 0.166, 30, [0, 0.033, 0.067, 0.1, 0.133]),
        ([0, 1, 2], 2, 1, [0, 1]),
        ([7], 7, 1, [7]),
        ([0, 1, 2, 3], 4, 0.01, [0]),
        ([], 0, 1, []),
    ],
    ids=str,
)
def test_the_frame_in_view(times: list[float], end: float, fps: float, picked: list[float]) -> None:
    assert list(_sampled(timed(times, end), Fraction(fps))) == picked


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_arrow(path: Path, columns: dict[str, Any], rows: int = 5, indexed: bool = False) -> Path:
    """Batches of `rows` rows."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(columns)
    make = arrow.ipc.new_file if indexed else arrow.ipc.new_stream
    with make(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("indexed", [False, True])
def test_arrow_files(tmp_path: Path, indexed: bool) -> None:
    encoded = [jpeg(one) for one in PICTURES]
    expected = [np.asarray(Image.open(io.BytesIO(one))) for one in encoded]
    text = [base64.b64encode(one).decode() for one in encoded]
    for cells in (encoded, text):
        path = write_arrow(tmp_path / "a.arrow", {"time": list(range(12)), "frame": cells}, indexed=indexed)
        check(open_frames(path), expected)


def test_arrow_files_are_decoded_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_arrow(tmp_path / "a.arrow", {"frame": [jpeg(one) for one in PICTURES]})
    decoded: list[None] = []
    plain = Image.open

    def noted(file: Any) -> Any:
        decoded.append(None)
        return plain(file)

    monkeypatch.setattr(Image, "open", noted)
    frames = open_frames(path)
    assert (frames.count, len(decoded)) == (12, 0)
    assert len(list(islice(frames, 7))) == len(decoded) == 7


def test_arrow_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", {"frame": [jpeg(PICTURES[0]), b"no picture"]}, rows=1)
    with pytest.raises(DataError, match=r"^v: row 1 of .*a.arrow cannot be read"):
        list(open_frames(path, where="v"))
    whole = path.read_bytes()
    for cells, message in (
        (["%"], "row 0 of .*a.arrow cannot be read"),
        (["é"], "row 0 of .*a.arrow cannot be read"),
        ([None], "row 0 of .*a.arrow holds NoneType; a picture is base64"),
        ([3], "row 0 of .*a.arrow holds int"),
    ):
        frames = open_frames(write_arrow(path, {"frame": cells}), where="v")
        with pytest.raises(DataError, match=f"^v: {message}"):
            list(frames)
    with pytest.raises(DataError, match=r"^v: .*a.arrow has the columns \['picture'\]; one must be called frame"):
        open_frames(write_arrow(path, {"picture": [b""]}), where="v")
    for indexed in (False, True):
        write_arrow(path, {"frame": [b""]}, rows=5, indexed=indexed)
        arrow_of_none = write_arrow(path, {"frame": np.array([], "S1")}, indexed=indexed)
        with pytest.raises(DataError, match=r"^v: .*a.arrow holds no frames"):
            open_frames(arrow_of_none, where="v")
    for content in (b"", b"no arrow at all", b"ARROW1 and then nothing", whole[:-300]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^v: .*a.arrow cannot be read"):
            open_frames(path, where="v")


CODECS = {".avi": "mpeg4", ".m4v": "mpeg4", ".mkv": "mpeg4", ".mov": "mpeg4", ".mp4": "mpeg4", ".webm": "libvpx"}


def film(path: Path, frames: int = 30, fps: int = 30) -> Path:
    """A video in which the brightness of frame i is 8 i."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(CODECS[path.suffix], rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for i in range(frames):
            picture = np.full((48, 64, 3), 8 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def numbers(frames: Any) -> list[int]:
    """Which frames of the film these are."""
    return [round(float(frame.mean()) / 8) for frame in frames]


def test_all_kinds_of_video_file_are_tested() -> None:
    assert set(CODECS) == set(VIDEO_SUFFIXES)


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_video_files(tmp_path: Path, suffix: str) -> None:
    frames = open_frames(film(tmp_path / f"a{suffix}"))
    assert frames.count == (None if suffix in (".mkv", ".webm") else 30)
    for _ in range(2):
        found = list(frames)
        assert all(one.shape == (48, 64, 3) and one.dtype == np.uint8 and one.flags.c_contiguous for one in found)
        assert numbers(found) == list(range(30))


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mp4"])
@pytest.mark.parametrize(
    ("fps", "picked"),
    [
        (30, list(range(30))),
        (10, list(range(0, 30, 3))),
        (2, [0, 15]),
        (0.5, [0]),
        (20, [i * 3 // 2 for i in range(20)]),
        (60, [i // 2 for i in range(60)]),
    ],
)
def test_a_video_sampled_at_a_rate(tmp_path: Path, suffix: str, fps: float, picked: list[int]) -> None:
    frames = open_frames(film(tmp_path / f"a{suffix}"), fps=fps)
    assert frames.count is None
    assert numbers(frames) == picked


def test_a_video_is_decoded_while_iterating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4")
    av = pytest.importorskip("av")
    turned: list[None] = []
    plain = np.rot90

    def noted(*args: Any) -> Any:
        turned.append(None)
        return plain(*args)

    monkeypatch.setattr(np, "rot90", noted)
    frames = iter(open_frames(path))
    assert numbers(islice(frames, 3)) == [0, 1, 2]
    assert len(turned) == 3
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(TypeError):
        list(open_frames(path))
    assert numbers(islice(frames, 2)) == [3, 4], "the file stays open between two frames"


def test_a_video_that_was_filmed_upright_is_turned(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    if not hasattr(av.VideoFrame, "rotation"):
        pytest.skip("this PyAV does not report rotations")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:24, :32] = 255
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44
    # A point (x, y) of the picture is to be shown at (-y, x), as in films of a phone held upright: a quarter turn
    # with the clock.
    values = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content[:matrix] + turned + content[matrix + 36 :])
    (frame,) = open_frames(path)
    assert frame.shape == (64, 48, 3)
    assert frame[:28, 28:].min() > 200, "the bright corner is on the right"
    assert frame[36:].max() < 50
    assert frame[:, :20].max() < 50


def test_video_files_that_cannot_be_read(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = film(tmp_path / "a.mp4")
    whole = path.read_bytes()
    for content in (b"", b"no video at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^v: .*a.mp4 cannot be read"):
            open_frames(path, where="v")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"^v: .*a.mp4 has no video in it"):
        open_frames(path, where="v")
