"""Blockwise attention and attention mass against the twins that materialise the matrix."""

from __future__ import annotations

import pytest
import torch

from kvsieve import attention
from kvsieve.attention import (
    attend,
    attend_and_count,
    attend_few,
    attention_mass,
    count_one,
)
from kvsieve.attention_naive import attend_naive, attention_mass_naive


@pytest.fixture(params=[attention.BLOCK_BYTES, 1], ids=["one block", "many blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_BYTES", request.param)


@pytest.fixture(params=[attention.MANY_LOGITS, 0], ids=["all heads", "head by head"])
def _heads(request, monkeypatch):
    monkeypatch.setattr(attention, "MANY_LOGITS", request.param)
    if not request.param:
        monkeypatch.setattr(attention, "HEAD_LOGITS", 1)  # blocks of few rows


def test_mass_needs_no_gradient():
    q, k = torch.randn(1, 2, 600, 8, requires_grad=True), torch.randn(1, 1, 600, 8, requires_grad=True)
    assert not attention_mass(q, k, causal_offset=0).requires_grad


SHAPES = [
    (1, 4, 2, 40, 40, 8),
    (1, 4, 2, 40, 25, 8),
    (2, 6, 2, 33, 50, 16),
    (2, 4, 4, 1, 30, 8),
    (1, 8, 1, 300, 300, 4),
]


@pytest.mark.usefixtures("_blocks", "_heads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "weights", "mask"])
@pytest.mark.parametrize("reduce", ["sum", "max", "square"])
def test_mass_and_output_equal_naive(shape, extra, reduce):
    b, h, hkv, t, n, d = shape
    torch.manual_seed(0)
    q, k, v = torch.randn(b, h, t, d), torch.randn(b, hkv, n, d), torch.randn(b, hkv, n, d)
    rows, columns = torch.arange(t)[:, None], torch.arange(n)
    mask = columns <= rows + n - t
    settings = {}
    if extra == "softcap":
        settings["softcap"] = 3.0
    if extra == "sinks":
        settings["sinks"] = torch.randn(h)
    how = {"causal_offset": n - t}
    if extra == "mask":
        heads = (torch.rand(b, hkv, t, n) < 0.7) & mask
        heads[:, :, 0] = False  # a query that sees nothing
        mask = heads.repeat_interleave(h // hkv, 1)
        how = {"visible": lambda s, e: heads[:, :, s:e]}
    weights = torch.rand(b, h, t) if extra == "weights" else None
    got = attention_mass(q, k, weights, reduce, **how, **settings)
    want = attention_mass_naive(q, k, weights, reduce, mask=mask.expand(b, h, t, n), **settings)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        attend(q, k, v, **how, **settings),
        attend_naive(q, k, v, mask=mask.expand(b, h, t, n), **settings),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.usefixtures("_blocks", "_heads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "scale"])
@pytest.mark.parametrize("reduce", ["sum", "max", "square"])
def test_counting_on_the_way_equals_naive(shape, extra, reduce):
    """Every query sees every key: one computation gives what two naive ones do."""
    b, h, hkv, t, n, d = shape
    torch.manual_seed(0)
    q, k, v = torch.randn(b, h, t, d), torch.randn(b, hkv, n, d), torch.randn(b, hkv, n, d + 2)
    settings = {"softcap": {"softcap": 3.0}, "sinks": {"sinks": torch.randn(h)}, "scale": {"scale": 0.7}}.get(extra, {})
    out, mass = attend_and_count(q, k, v, reduce, **settings)
    torch.testing.assert_close(out, attend_naive(q, k, v, **settings), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass, attention_mass_naive(q, k, None, reduce, **settings), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, attend(q, k, v, **settings), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass, attention_mass(q, k, None, reduce, **settings), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_blocks", "_heads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_counting_on_the_way_in_other_precisions(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 8, dtype=torch.float64).to(dtype) for heads in (4, 2, 2))
    out, mass = attend_and_count(q, k, v)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    assert out.dtype == dtype
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out, attend_naive(q, k, v), **tolerance)
    torch.testing.assert_close(mass, attention_mass_naive(q, k), **tolerance)


@pytest.mark.parametrize("shape", [(2, 4, 9, 30, 8), (1, 1, 300, 300, 4), (2, 3, 1, 7, 8)], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_without_groups_equals_naive(shape, scale):
    """No mask and one query head per key head: the stock kernel."""
    b, h, t, n, d = shape
    q, k, v = (torch.randn(b, h, length, d, dtype=torch.float64) for length in (t, n, n))
    got = attend(q, k, v, scale=scale)
    torch.testing.assert_close(got, attend_naive(q, k, v, scale=scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 1, 40, 8), (2, 6, 2, 5, 33, 8), (1, 4, 4, 3, 9, 8), (2, 4, 1, 7, 7, 4)], ids=str
)
@pytest.mark.parametrize("masked", ["none", "shared", "per_head"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_few_queries_equal_naive(shape, masked, scale):
    b, h, hkv, t, n, d = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, heads, length, d, dtype=torch.float64) for heads, length in ((h, t), (hkv, n), (hkv, n)))
    mask = None
    if masked != "none":
        heads = 1 if masked == "shared" else hkv
        mask = torch.rand(b, heads, t, n) < 0.6
        mask[..., 0] = True
    wide = None if mask is None else mask.expand(b, hkv, t, n).repeat_interleave(h // hkv, 1)
    got = attend_few(q, k, v, mask, scale=scale)
    torch.testing.assert_close(got, attend_naive(q, k, v, scale=scale, mask=wide), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["sum", "max", "square"])
@pytest.mark.parametrize("tile", [5, 1000])
def test_one_query_is_counted_as_it_attends(dtype, reduce, tile):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8).to(dtype) for heads, n in ((6, 1), (2, 37), (2, 37)))
    out, mass = count_one(q, k, v, reduce, tile=tile)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out, attend_naive(q, k, v), **loose)
    torch.testing.assert_close(mass, attention_mass_naive(q, k, None, reduce), **loose)
    assert (out.dtype, mass.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(attend_and_count(q, k, v, reduce), count_one(q, k, v, reduce))
    live = torch.rand(2, 2, 37) < 0.6
    mask = live.repeat_interleave(3, 1)[:, :, None]
    out, mass = count_one(q, k, v, reduce, live=live, tile=tile)
    torch.testing.assert_close(out, attend_naive(q, k, v, mask=mask), **loose)
    torch.testing.assert_close(mass, attention_mass_naive(q, k, None, reduce, mask=mask), **loose)
    assert not bool(mass[~live].any())


def test_mass_is_conserved_and_lse_reused():
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 64, 8)
    mass = attention_mass(q, k, causal_offset=0)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), 128.0), rtol=1e-5, atol=1e-4)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    logits = logits.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(attention_mass(q, k, causal_offset=0, lse=logits.logsumexp(-1)), mass)


def test_half_precision_accumulates_in_float32():
    q, k = torch.randn(1, 2, 256, 16), torch.randn(1, 1, 256, 16)
    exact = attention_mass_naive(q.bfloat16(), k.bfloat16())
    got = attention_mass(q.bfloat16(), k.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=2e-2, atol=1e-2)


def test_float64_stays_float64():
    q, k = torch.randn(1, 2, 9, 4, dtype=torch.float64), torch.randn(1, 1, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(attention_mass(q, k), attention_mass_naive(q, k), rtol=1e-13, atol=1e-13)


def test_half_precision_is_widened_head_by_head(monkeypatch):
    monkeypatch.setattr(attention, "MANY_LOGITS", 0)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 8).bfloat16() for heads in (4, 2, 2))
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None].expand(1, 4, -1, -1)
    got = attention_mass(q, k, causal_offset=0)
    torch.testing.assert_close(got, attention_mass_naive(q, k, mask=mask), rtol=1e-5, atol=1e-6)
    out, mass = attend_and_count(q, k, v)
    torch.testing.assert_close(mass, attention_mass_naive(q, k), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, attend_naive(q, k, v), rtol=2e-2, atol=2e-2)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="median"):
        attention_mass(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2), reduce="median")
