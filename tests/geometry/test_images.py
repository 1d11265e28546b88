"""Pictures become what the published preprocessing makes of them, and bad ones are refused by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kvsieve.errors import DataError, KvsieveError, PolicyError
from kvsieve.geometry.images import check_images, list_images, load_and_preprocess_images


@pytest.fixture
def picture(tmp_path):
    """Writes a random picture of a size and gives its path."""

    def write(width, height, name=None, mode="RGB", seed=0):
        channels = {"RGB": 3, "RGBA": 4}[mode]
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
        path = tmp_path / (name or f"{width}x{height}.png")
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (512, 384, (392, 518)),
        (854, 480, (294, 518)),
        (1024, 512, (252, 518)),  # 18.5 patches: halves go to the even number
        (1036, 546, (280, 518)),  # 19.5 patches
        (518, 518, (518, 518)),
        (300, 900, (518, 518)),
    ],
)
def test_crop_sizes(picture, width, height, size):
    frames = load_and_preprocess_images([picture(width, height)])
    assert frames.shape == (1, 3, *size)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() < frames.max() <= 1


def test_crop_keeps_the_middle_of_a_tall_picture(picture, tmp_path):
    path = picture(20, 63)
    resized = Image.open(path).resize((28, 84), Image.Resampling.BICUBIC)  # 63 * 28 / 20 / 14 = 6.3 patches
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[:, 28:56] / 255
    assert torch.equal(load_and_preprocess_images([path], target_size=28)[0], expected)


def test_odd_rest_of_a_crop_is_floored_at_the_top(picture):
    path = picture(7, 12)
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[:, 2:9] / 255
    assert torch.equal(load_and_preprocess_images([path], target_size=7, patch_size=1)[0], expected)


@pytest.mark.parametrize(("width", "height", "inner"), [(512, 384, (392, 518)), (384, 512, (518, 392))])
def test_pad_fills_a_square_with_white(picture, width, height, inner):
    path = picture(width, height)
    frame = load_and_preprocess_images([path], mode="pad")[0]
    assert frame.shape == (3, 518, 518)
    resized = Image.open(path).resize((inner[1], inner[0]), Image.Resampling.BICUBIC)
    top, left = ((518 - side) // 2 for side in inner)
    inside = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    assert torch.equal(frame[:, top : top + inner[0], left : left + inner[1]], inside)
    outside = torch.ones(518, 518, dtype=torch.bool)
    outside[top : top + inner[0], left : left + inner[1]] = False
    assert (frame[:, outside] == 1).all()


def test_odd_padding_has_its_smaller_half_on_top(picture):
    frame = load_and_preprocess_images([picture(7, 4)], mode="pad", target_size=7, patch_size=1)[0]
    assert (frame[:, 0] == 1).all()
    assert (frame[:, -2:] == 1).all()
    assert not (frame[:, 1:5] == 1).all(dim=-1).any()


def test_mixed_sizes_are_padded_to_the_largest(picture):
    wide, high = picture(56, 28), picture(56, 56)
    frames = load_and_preprocess_images([wide, high], target_size=56)
    assert frames.shape == (2, 3, 56, 56)
    alone = load_and_preprocess_images([wide], target_size=56)[0]
    assert torch.equal(frames[0, :, 14:42], alone)
    assert (frames[0, :, :14] == 1).all()
    assert (frames[0, :, 42:] == 1).all()


def test_transparency_lies_on_white(tmp_path):
    pixels = np.zeros((14, 14, 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, 51  # red at a fifth
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frame = load_and_preprocess_images([tmp_path / "a.png"], target_size=14)[0]
    assert torch.allclose(frame[:, 0, 0], torch.tensor([1.0, 0.8, 0.8]), atol=1e-6)
    Image.fromarray(np.zeros((14, 14, 2), dtype=np.uint8)).save(tmp_path / "grey.png")
    assert (load_and_preprocess_images([tmp_path / "grey.png"], target_size=14) == 1).all()


def test_a_grey_picture_has_three_equal_channels(tmp_path):
    Image.fromarray(np.full((14, 14), 128, dtype=np.uint8)).save(tmp_path / "a.png")
    frame = load_and_preprocess_images([str(tmp_path / "a.png")], target_size=14)
    assert torch.allclose(frame, torch.tensor(128 / 255))


def test_bad_arguments_are_refused(picture):
    path = picture(28, 28)
    with pytest.raises(ValueError, match="no image was given"):
        load_and_preprocess_images([])
    with pytest.raises(PolicyError, match="mode='fit' is not one of crop, pad"):
        load_and_preprocess_images([path], mode="fit")
    with pytest.raises(PolicyError, match="multiple of patch_size=14"):
        load_and_preprocess_images([path], target_size=500)
    with pytest.raises(DataError, match="pass a list"):
        load_and_preprocess_images(str(path))


def test_bad_files_are_named(picture, tmp_path):
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        load_and_preprocess_images([tmp_path / "gone.png"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png cannot be read"):
        load_and_preprocess_images([tmp_path / "text.png"])
    whole = picture(64, 64).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png cannot be read"):
        load_and_preprocess_images([tmp_path / "cut.png"])
    with pytest.raises(DataError, match="cannot be read"):
        load_and_preprocess_images([tmp_path])
    Image.fromarray(np.zeros((14, 14), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits"):
        load_and_preprocess_images([tmp_path / "deep.png"])
    with pytest.raises(DataError, match=r"200x2\.png is 200 x 2 pixels"):
        load_and_preprocess_images([picture(200, 2)], target_size=28)


def test_missing_pillow_names_the_extra(picture, monkeypatch):
    path = picture(14, 14)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(KvsieveError, match=r"pip install 'kvsieve\[geometry\]'"):
        load_and_preprocess_images([path])


def test_folders_are_listed_in_natural_order(tmp_path):
    for name in ("f10.png", "f9.JPG", "f1.webp", "notes.txt", "f2.bmp", "f01.jpeg"):
        (tmp_path / name).touch()
    (tmp_path / "f3.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["f01.jpeg", "f1.webp", "f2.bmp", "f9.JPG", "f10.png"]
    with pytest.raises(DataError, match="holds no image"):
        list_images(tmp_path / "f3.png")
    with pytest.raises(DataError, match="does not exist"):
        list_images(tmp_path / "gone")
    with pytest.raises(DataError, match="is a file"):
        list_images(tmp_path / "notes.txt")


def test_good_images_pass():
    check_images(torch.rand(2, 3, 28, 14), 14)
    check_images(torch.rand(1, 2, 3, 14, 14).half(), 14)
    check_images(torch.full((1, 3, 14, 14), 1.005), 14)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 14, 14)), "must be a tensor"),
        (torch.zeros(3, 14, 14), "one frame"),
        (torch.zeros(0, 3, 14, 14), "empty"),
        (torch.zeros(1, 3, 0, 14), "empty"),
        (torch.zeros(1, 14, 14, 3), "14 channels"),
        (torch.zeros(1, 3, 14, 15), "14 x 15 pixels"),
        (torch.zeros(1, 3, 14, 14, dtype=torch.uint8), "divide|/ 255"),
        (torch.full((1, 3, 14, 14), torch.nan), "588 values that are NaN"),
        (torch.full((1, 3, 14, 14), torch.inf), "infinite"),
        (torch.full((1, 3, 14, 14), 255.0), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 14, 14), -1.0), r"must lie in \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        check_images(images, 14)


def test_one_nan_among_many_is_found():
    images = torch.rand(2, 3, 14, 14)
    images[1, 2, 3, 4] = torch.nan
    with pytest.raises(DataError, match="hold 1 values"):
        check_images(images, 14)
