"""The Triton kernels of `decode` against their naive twin in float64, and against attention over dense storage."""

from __future__ import annotations

import pytest
import torch

from kvsieve.attention_naive import attend_naive
from kvsieve.kernels.naive import decode_naive

# B, H, Hkv, T, D, Dv, longest head
SHAPES = [
    (2, 4, 2, 1, 64, 64, 50),
    (1, 7, 1, 3, 80, 24, 70),  # a group of seven, values of another width
    (2, 2, 2, 5, 16, 16, 9),  # fewer keys than a block
    (1, 4, 1, 9, 128, 128, 40),
]
EXACT = {"rtol": 1e-5, "atol": 2e-6}
# outputs and the probabilities that multiply the values are rounded to the dtype
ROUNDED = {
    torch.float32: EXACT,
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def packed(shape, dtype, device):
    """Queries, keys, values, starts, lengths; one head holds nothing, and free slots hold garbage."""
    b, h, hkv, t, d, dv, longest = shape
    made = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (b * hkv,), generator=made)
    if b * hkv > 1:
        lengths[0] = 0
    lengths[-1] = longest
    room = lengths + 3
    starts = room.cumsum(0) - room
    total = int(room.sum())
    q = 1.5 * torch.randn(b, h, t, d, generator=made)
    keys, values = torch.randn(total, d, generator=made), torch.randn(total, dv, generator=made)
    free = torch.ones(total, dtype=torch.bool)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        free[start : start + length] = False
    keys[free], values[free] = float("nan"), float("nan")
    where = (starts.view(b, hkv).to(device), lengths.view(b, hkv).to(device))
    return (*(x.to(device, dtype) for x in (q, keys, values)), *where), free


def options(shape, total, device):
    b, h, _, t, _, _, longest = shape
    made = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 2 * longest, (total,), generator=made)
    table = {
        "plain": {},
        "positions": {"positions": positions, "query_positions": torch.arange(longest, longest + t)},
        "rows that see nothing": {
            "positions": positions + 1,
            "query_positions": torch.randint(0, longest, (b, t), generator=made) * (torch.arange(t) > 0),
        },
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": torch.randn(h, generator=made), "scale": 0.2},
        "sinks, rows that see nothing": {
            "positions": positions + 1,
            "query_positions": torch.zeros(t, dtype=torch.long),
            "sinks": torch.randn(h, generator=made),
        },
    }
    return {
        name: {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in row.items()}
        for name, row in table.items()
    }


NAMES = list(options(SHAPES[0], 1, "cpu"))


def check(kernels, shape, name, dtype, reduce, settings=None):
    tensors, free = packed(shape, dtype, kernels.device)
    row = options(shape, len(free), kernels.device)[name]
    out, mass = kernels("decode", "decode", *tensors, reduce=reduce, settings=settings, **row)
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    want, want_mass = decode_naive(*wide, reduce=reduce, **row)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, **ROUNDED[dtype])
    assert (mass is None) == (reduce is None)
    if mass is not None:
        torch.testing.assert_close(mass.double(), want_mass, **EXACT)
        assert not mass[free.to(mass.device)].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_equals_naive(kernels, shape, name):
    check(kernels, shape, name, torch.float32, "sum")


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_more_shapes(kernels, shape):
    check(kernels, shape, "positions", torch.float32, None)


@pytest.mark.parametrize("reduce", [None, "max", "square"])
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_reductions_and_dtypes(kernels, dtype, reduce):
    check(kernels, SHAPES[0], "plain", dtype, reduce)


@pytest.mark.parametrize("name", ["plain", "positions", "sinks, rows that see nothing"])
def test_many_spans(kernels, name):
    """Three spans, most of them beyond the end of the shorter heads."""
    settings = {"shared.MIN_BLOCKS": 1, "decode.MAX_SPLITS": 3}
    check(kernels, (2, 4, 2, 2, 16, 16, 190), name, torch.float32, "sum", settings)


def test_equals_attention_over_dense_storage(kernels):
    """Heads of equal length, packed, are the dense layout."""
    b, h, hkv, n, d = 2, 4, 2, 33, 32
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, device=kernels.device) for shape in ((b, h, 1, d), (b, hkv, n, d), (b, hkv, n, d)))
    lengths = torch.full((b, hkv), n)
    starts = torch.arange(b * hkv).view(b, hkv) * n
    out, mass = kernels(
        "decode", "decode", q, k.reshape(-1, d), v.reshape(-1, d), starts, lengths, reduce="sum", longest=n
    )
    torch.testing.assert_close(out, attend_naive(q, k, v), **EXACT)
    torch.testing.assert_close(mass.view(b, hkv, n).sum(-1), torch.full((b, hkv), 2.0, device=q.device))


def test_nothing_stored(kernels):
    q, none = torch.zeros(1, 2, 1, 16, device=kernels.device), torch.zeros(1, 1, dtype=torch.long)
    out, mass = kernels("decode", "decode", q, q[0, 0, :0], q[0, 0, :0], none, none, reduce="sum")
    assert out.shape == q.shape
    assert not out.any()
    assert mass.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(5, 8, dtype=torch.float16)}, "float16, bfloat16 or float32"),
        ({"keys": torch.zeros(5, 8)}, "do not belong to queries"),
        ({"starts": torch.zeros(1, 2, dtype=torch.long)}, "do not belong to heads"),
        ({"positions": torch.zeros(5)}, "only together"),
        ({"reduce": "mean"}, "is not"),
    ],
)
def test_errors(kernels, change, message):
    whole = torch.zeros(1, 1, dtype=torch.long)
    call = {"q": torch.zeros(1, 2, 1, 16), "keys": torch.zeros(5, 16), "values": torch.zeros(5, 8)}
    with pytest.raises(ValueError, match=message):
        kernels("decode", "decode", **{**call, "starts": whole, "lengths": whole + 5, **change})


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="large shapes need a graphics processor")
@pytest.mark.parametrize("shape", [(1, 32, 8, 1, 128, 128, 30000), (4, 28, 4, 4, 128, 128, 3000)], ids=str)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_large(kernels, shape, dtype):
    check(kernels, shape, "positions", dtype, "sum")
