"""The model and its streams against reference numbers (skipped where they are absent)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvsieve.geometry import STream3R, StreamSession
from kvsieve.ledger import POSITION

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "golden" / "geometry"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference numbers are not on this machine")

TOLERANCE = {"depth": 5e-6, "world_points": 5e-6, "pose_enc": 1e-5, "depth_conf": 5e-5, "world_points_conf": 5e-5}
SIZES = {
    "img_size": "img", "patch_size": "patch", "embed_dim": "dim", "num_heads": "heads", "depth": "depth",
    "encoder_depth": "dino_depth", "camera_depth": "cam_depth", "camera_num_heads": "cam_heads",
    "dpt_features": "dpt_features", "dpt_out_channels": "dpt_out", "dpt_layers": "dpt_layers",
}  # fmt: skip
LAYERWISE = {"p0.5_t0.5": (0.5, 0.5), "p0.5_t1e6": (0.5, 1e6), "p0.3_t1e6": (0.3, 1e6)}


@cache
def meta() -> dict[str, Any]:
    return json.loads((GOLDEN / "meta.json").read_text())


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


@cache
def model() -> STream3R:
    cfg = meta()["cfg"]
    found = STream3R(**{ours: cfg[theirs] for ours, theirs in SIZES.items()})
    found.load_state_dict(load_file(GOLDEN / "weights.safetensors"), strict=True)
    return found.eval()


def assert_same(got: dict[str, Tensor], scenario: str) -> None:
    for name, tolerance in TOLERANCE.items():
        torch.testing.assert_close(got[name], golden()[f"{scenario}/{name}"], rtol=0, atol=tolerance)


def run(scenario: str, **settings: Any) -> StreamSession:
    """Frame by frame, sizes compared after every frame."""
    session, want = StreamSession(model(), **settings), meta()["scenarios"][scenario]
    for i, image in enumerate(golden()["images"]):
        out = session.forward_stream(image[None])
        assert session.tokens_per_layer() == want["sizes"][i]
        camera = {block[0].shape[2] for round_ in session.camera_head_kv_cache_list for block in round_}
        assert sorted(camera) == want["camera_sizes"][i]
    assert_same(out, scenario)
    return session


def assert_same_keys(session: StreamSession, scenario: str) -> None:
    for layer, (keys, _) in enumerate(session.aggregator_kv_cache_list):
        torch.testing.assert_close(keys, golden()[f"{scenario}/key_cache/{layer}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["causal", "window", "full"])
@torch.no_grad()
def test_batch(mode):
    assert_same(model()(golden()["images"], mode=mode), f"batch_{mode}")


@pytest.mark.parametrize("mode", ["causal", "window"])
def test_session(mode):
    session = run(f"session_{mode}", mode=mode)
    if mode == "causal":
        assert_same_keys(session, "session_causal")


@pytest.mark.parametrize("case", LAYERWISE)
def test_layerwise(case):
    ratio, temp = LAYERWISE[case]
    name = f"layerwise_{case}"
    session = run(
        name, mode="causal", num_frames=6, use_layerwise_eviction=True, budget_ratio=ratio, temp=temp,
        fidelity="reference",
    )  # fmt: skip
    if temp > 1:
        assert_same_keys(session, name)
    for layer, core in enumerate(session.memory.trunk):
        order = core.store.read(POSITION)[0, 0].argsort()
        exposure = core.store.read("exposure")[0, 0][order] / session.memory.tokens_per_frame
        assert torch.equal(exposure.long(), golden()[f"{name}/exposure/{layer}"])
        want = golden()[f"{name}/cam_scores/{layer}"]
        counted = want.isfinite()  # protection is an infinite score in the reference
        mass = core.store.read("mass")[0, 0][order]
        torch.testing.assert_close(mass[counted], want[counted], rtol=5e-6, atol=0)


def test_every_key_of_the_published_model():
    with torch.device("meta"):
        state = STream3R().state_dict()
    want = json.loads((SHARED / "spec" / "stream3r_state_dict.json").read_text())
    assert len(want) == 1403
    assert {key: list(value.shape) for key, value in state.items()} == want
