"""The model as a module: modes, files, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from common import SIZES, frames, tiny
from safetensors.torch import load_file, save_file

from kvsieve import DataError, PolicyError, UnsupportedModelError
from kvsieve.geometry import STream3R, blocks
from kvsieve.geometry.blocks import batch_attention, frames_seen, rotary_table, rotate


@pytest.mark.parametrize("mode", ["causal", "window", "full"])
def test_attention_with_and_without_a_mask(mode, monkeypatch):
    """Long sequences go frame by frame; both ways equal attention over the frames that are seen."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 8 * 3, 4, dtype=torch.float64)
    want = torch.empty_like(q)
    for i in range(8):
        at = [f * 3 + j for f in frames_seen(mode, i, 8) for j in range(3)]
        here = slice(i * 3, i * 3 + 3)
        logits = q[:, :, here] @ k[:, :, at].transpose(-1, -2) / 2
        want[:, :, here] = logits.softmax(-1) @ v[:, :, at]
    torch.testing.assert_close(batch_attention(mode, 8, 3)(q, k, v), want)
    monkeypatch.setattr(blocks, "MASKED", 0)
    torch.testing.assert_close(batch_attention(mode, 8, 3)(q, k, v), want)


def test_frames_seen():
    assert frames_seen("full", 1, 4) == [0, 1, 2, 3]
    assert frames_seen("causal", 2, 4) == [0, 1, 2]
    assert [frames_seen("window", i, 8) for i in (0, 4, 5, 7)] == [
        [0],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
        [0, 3, 4, 5, 6, 7],
    ]
    with pytest.raises(PolicyError, match="full, causal, window"):
        frames_seen("sideways", 0, 1)


def test_rotation_by_hand():
    """Half of a head turns with the row, half with the column; special tokens do not turn."""
    cos, sin = rotary_table(2, 3, 1, 8, torch.device("cpu"), torch.float64)
    x = torch.randn(1, 1, 7, 8, dtype=torch.float64)
    got = rotate(x, cos, sin)[0, 0]
    for token in range(7):
        row, column = (0, 0) if token == 0 else ((token - 1) // 3 + 1, (token - 1) % 3 + 1)
        for half, place in ((0, row), (4, column)):
            for j, frequency in enumerate((1.0, 0.1)):
                a, b = x[0, 0, token, half + j], x[0, 0, token, half + j + 2]
                angle = torch.tensor(place * frequency, dtype=torch.float64)
                torch.testing.assert_close(
                    got[token, half + j], a * angle.cos() - b * angle.sin(), rtol=1e-6, atol=1e-7
                )
                torch.testing.assert_close(
                    got[token, half + j + 2], b * angle.cos() + a * angle.sin(), rtol=1e-6, atol=1e-7
                )


@torch.no_grad()
def test_shapes_batches_and_other_resolutions():
    wide = torch.stack([frames(3, (24, 40)), frames(3, (24, 40), seed=1)])
    out = tiny()(wide)
    assert out["depth"].shape == (2, 3, 24, 40, 1)
    assert out["world_points"].shape == (2, 3, 24, 40, 3)
    assert out["depth_conf"].shape == out["world_points_conf"].shape == (2, 3, 24, 40)
    assert out["pose_enc"].shape == (2, 3, 9)
    assert bool((out["depth"] > 0).all())
    assert bool((out["depth_conf"] > 1).all())
    alone = tiny()(wide[1])
    torch.testing.assert_close(out["depth"][1:], alone["depth"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_many_frames_go_through_the_heads_in_parts():
    images = frames(10)
    parts = [tiny()(images[:n], mode="causal")["depth"] for n in (10, 3)]
    torch.testing.assert_close(parts[0][:, :3], parts[1], rtol=1e-4, atol=1e-5)


def test_training_gives_every_round_and_gradients_everywhere():
    torch.manual_seed(0)
    model = STream3R(**SIZES).train()
    out = model(frames(2))
    assert len(out["pose_enc_list"]) == 4
    assert torch.equal(out["pose_enc_list"][-1], out["pose_enc"])
    values = [out[key] for key in ("depth", "depth_conf", "world_points", "world_points_conf")]
    sum(value.sum() for value in [*values, *out["pose_enc_list"]]).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert without == ["aggregator.patch_embed.mask_token"]


def test_save_and_load(tmp_path):
    tiny().save_pretrained(tmp_path / "model", dtype=torch.float16)
    loaded = STream3R.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == tiny().config
    for key, value in tiny().state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=2e-3, atol=1e-3)
    with torch.no_grad():
        assert loaded(frames(2))["depth"].isfinite().all()


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


def test_a_tracker_is_skipped_on_request_only(folder):
    change(folder, lambda state: state.update({"track_head.x": torch.zeros(3)}))
    with pytest.raises(UnsupportedModelError, match=r"point tracker .*track_head\.x.*skip_track_head=True"):
        STream3R.from_pretrained(folder)
    STream3R.from_pretrained(folder, skip_track_head=True)


def test_weights_that_do_not_fit(folder):
    change(folder, lambda state: state.update({"extra.weight": torch.zeros(3)}))
    change(folder, lambda state: state.pop("camera_head.embed_pose.bias"))
    change(folder, lambda state: state.update({"depth_head.norm.weight": torch.zeros(3)}))
    with pytest.raises(UnsupportedModelError) as error:
        STream3R.from_pretrained(folder)
    for words in (
        "1 missing (camera_head.embed_pose.bias)",
        "1 not part of the model (extra.weight)",
        "1 of another shape (depth_head.norm.weight (3,), expected (64,))",
    ):
        assert words in str(error.value)


def test_configurations_that_do_not_fit(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "depth": 4}))
    with pytest.raises(UnsupportedModelError, match="do not fit its configuration"):
        STream3R.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "wings": 2}))
    with pytest.raises(UnsupportedModelError, match="unknown entries wings"):
        STream3R.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        STream3R.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"has no config\.json"):
        STream3R.from_pretrained(folder)


def test_a_name_that_is_neither_folder_nor_repository(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="is not a folder"):
        STream3R.from_pretrained("no such/model here")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"embed_dim": 30}, "multiple of 4"),
        ({"img_size": 33}, "multiple of patch_size"),
        ({"dpt_layers": [0, 1, 2, 3]}, "below depth=3"),
        ({"dpt_out_channels": [8, 8, 8]}, "four entries"),
        ({"dpt_features": 12}, "dpt_features of 8"),
        ({"camera_num_heads": 5}, "camera_num_heads"),
        ({"depth": 0}, "depth=0 must be positive"),
    ],
)
def test_sizes_that_do_not_fit_together(sizes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        STream3R(**{**SIZES, **sizes})


def test_unknown_mode():
    with pytest.raises(PolicyError, match="full, causal, window"):
        tiny()(frames(1), mode="sideways")
