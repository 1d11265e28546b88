"""Layers whose attention goes through the kernels against the same layers without them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import kvsieve
from kvsieve.layer import KVLayer
from kvsieve.measure import kept_positions
from kvsieve.view import Visibility

B, H, HKV, D, DV = 2, 4, 2, 16, 8
CHUNKS = (20, 1, 1, 1, 3, 18, 1, 1, 1)

CASES: dict[str, dict[str, Any]] = {
    "h2o": {"budget": 12, "window_size": 4},
    "tova": {"budget": 12},
    "snapkv": {"budget": 12, "when": "every_forward", "window_size": 4},
    "adakv_snapkv": {"budget": 12, "when": "every_forward", "window_size": 4},
    "observed_attention": {"budget": 12, "share": "across_heads"},
    "knorm": {"threshold": -4.0, "window": 4},
    "evict3r": {"budget": 12},
}
RAGGED = ("adakv_snapkv", "observed_attention", "knorm")


def stream(name: str, device: torch.device, taken: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], set[str]]:
    """Outputs and kept positions after every chunk, and the kernels that were called."""
    from kvsieve.kernels import attention_mass, decode

    layer = KVLayer(kvsieve.get_policy(name, **CASES[name]))
    g = torch.Generator().manual_seed(1)
    outputs, kept, start = [], [], 0
    with (
        mock.patch("kvsieve.kernels.available", return_value=taken),
        mock.patch.object(attention_mass, "attention_mass", wraps=attention_mass.attention_mass) as mass,
        mock.patch.object(decode, "decode", wraps=decode.decode) as attend,
    ):
        for t in CHUNKS:
            q, k, v = (
                torch.randn(B, heads, t, d, generator=g).to(device) for heads, d in ((H, D), (HKV, D), (HKV, DV))
            )
            visibility = Visibility(start, t)
            layer.append(k, v)
            outputs.append(layer.attend(q, visibility).cpu())
            layer.observe(q, visibility)
            kept.append(kept_positions(layer).cpu())
            start += t
        called = {"mass"} if mass.called else set()
        return outputs, kept, called | ({"decode"} if attend.called else set())


@pytest.mark.parametrize("name", CASES)
def test_layers_through_the_kernels(kernels, name):
    outputs, kept, called = kernels.run(stream, name, kernels.device, True)
    want, want_kept, none = kernels.run(stream, name, kernels.device, False)
    assert not none
    assert called == {"decode"} if name == "knorm" else "mass" in called
    assert ("decode" in called) == (name in RAGGED)
    for got, expected in zip(outputs, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for got, expected in zip(kept, want_kept, strict=True):
        assert torch.equal(got, expected)
