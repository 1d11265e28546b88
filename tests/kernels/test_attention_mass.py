"""The Triton kernels of `attention_mass` against their naive twin in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvsieve.attention import attention_mass as blockwise
from kvsieve.kernels import available
from kvsieve.kernels.naive import attention_mass_naive, log_sum_exp_naive

# B, H, Hkv, T, N, D
SHAPES = [
    (2, 4, 2, 1, 45, 64),  # one query; the heads of a group share one block
    (1, 6, 2, 37, 21, 80),  # head dim and T no power of two, three heads in a group, N below a block
    (1, 2, 1, 80, 100, 16),  # several blocks of rows and of keys
]
MORE_SHAPES = [
    (1, 2, 1, 1, 1, 16),  # one query, one key
    (1, 7, 1, 19, 70, 24),  # a group of seven
    (1, 4, 4, 20, 70, 96),  # one head in a group
    (1, 2, 1, 40, 40, 128),
    (1, 1, 1, 18, 33, 256),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = {"rtol": 1e-5, "atol": 2e-6}  # for 16 bits too: inputs are the same, and products accumulate in float32


def tensors(shape, dtype, device, seed=0):
    """Queries and keys whose softmax is neither flat nor one-hot."""
    b, h, hkv, t, n, d = shape
    made = torch.Generator().manual_seed(seed)
    q, k = torch.randn(b, h, t, d, generator=made), torch.randn(b, hkv, n, d, generator=made)
    return (1.5 * q).to(device, dtype), k.to(device, dtype)


def options(shape, device):
    """Name -> options for both sides, for a shape."""
    b, h, hkv, t, n, _ = shape
    made = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, n + 1, (b, hkv), generator=made, dtype=torch.int32)
    lengths[0, 0] = 0  # a head that holds nothing
    lengths[-1, -1] = n - n // 3
    positions = torch.stack([torch.randperm(n + 9, generator=made)[:n] for _ in range(b * hkv)]).view(b, hkv, n)
    weights = torch.rand(b, h, t, generator=made) * (torch.rand(b, h, t, generator=made) < 0.6)
    table = {
        "everything": {},
        "triangle": {"causal_offset": n - t},
        "older keys only in part": {"causal_offset": max(n // 3 - t, 0)},
        "rows that see nothing": {"causal_offset": -(t // 2) - 1},
        "lengths": {"lengths": lengths},
        "lengths, offsets": {"lengths": lengths, "causal_offset": lengths - t},
        "positions": {"positions": positions, "causal_offset": n + 8 - t, "lengths": lengths},
        "weights": {"weights": weights, "causal_offset": n - t},
        "softcap, sinks": {"softcap": 4.0, "sinks": torch.randn(h, generator=made), "causal_offset": n - t},
        "sinks, rows that see nothing": {"sinks": torch.randn(h, generator=made), "causal_offset": -t},
        "scale": {"scale": 0.3, "weights": torch.rand(1, 1, t, generator=made)},
    }
    return {
        name: {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in row.items()}
        for name, row in table.items()
    }


NAMES = list(options(SHAPES[0], "cpu"))


def wide(row):
    return {key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in row.items()}


def check(kernels, shape, dtype, row, reduce, settings=None):
    q, k = tensors(shape, dtype, kernels.device)
    got = kernels("attention_mass", "attention_mass", q, k, reduce=reduce, settings=settings, **row)
    want = attention_mass_naive(q.double(), k.double(), reduce=reduce, **wide(row))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, **EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_equals_naive(kernels, shape, name):
    check(kernels, shape, torch.float32, options(shape, kernels.device)[name], "sum")


@pytest.mark.parametrize("name", ["everything", "lengths, offsets"])
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=str)
def test_more_shapes(kernels, shape, name):
    check(kernels, shape, torch.float32, options(shape, kernels.device)[name], "sum")


@pytest.mark.parametrize("reduce", ["sum", "max", "square"])
@pytest.mark.parametrize("name", ["weights", "softcap, sinks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_and_dtypes(kernels, dtype, name, reduce):
    shape = (2, 4, 2, 21, 45, 40)
    check(kernels, shape, dtype, options(shape, kernels.device)[name], reduce)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("name", ["everything", "triangle", "older keys only in part", "lengths, offsets", "positions"])
def test_split_loops(kernels, name, reduce):
    """Loops cut into as many parts as there are blocks; some parts see nothing."""
    shape = (1, 2, 1, 50, 110, 16)
    row = options(shape, kernels.device)[name]
    check(kernels, shape, torch.float32, row, reduce, {"shared.PROGRAMS": 1 << 20, "shared.MIN_BLOCKS": 1})


@pytest.mark.parametrize("name", NAMES)
def test_log_sum_exp(kernels, name):
    shape = (2, 4, 2, 21, 45, 40)
    q, k = tensors(shape, torch.float32, kernels.device)
    row = {key: x for key, x in options(shape, kernels.device)[name].items() if key != "weights"}
    got = kernels("attention_mass", "log_sum_exp", q, k, **row)
    torch.testing.assert_close(got.double(), log_sum_exp_naive(q.double(), k.double(), **wide(row)), **EXACT)


def test_saved_log_sum_exp_is_used(kernels):
    q, k = tensors((1, 4, 2, 21, 45, 40), torch.float32, kernels.device)
    lse = log_sum_exp_naive(q, k, causal_offset=24)
    plain = kernels("attention_mass", "attention_mass", q, k, causal_offset=24)
    given = kernels("attention_mass", "attention_mass", q, k, lse=lse, causal_offset=24)
    torch.testing.assert_close(given, plain, **EXACT)
    halved = kernels("attention_mass", "attention_mass", q, k, lse=lse + 2.0**0.5, causal_offset=24)
    torch.testing.assert_close(halved, plain * torch.tensor(-(2.0**0.5)).exp().item(), **EXACT)


def test_rows_that_saw_nothing_in_the_forward_pass(kernels):
    q, k = tensors((1, 4, 2, 21, 45, 40), torch.float32, kernels.device)
    lse = log_sum_exp_naive(q, k)
    weights = torch.ones_like(lse)
    weights[:, 1, :9] = weights[:, 3, 20] = 0.0
    lse[:, 1, :9], lse[:, 3, 20] = -float("inf"), float("inf")
    got = kernels("attention_mass", "attention_mass", q, k, lse=lse)
    torch.testing.assert_close(got, attention_mass_naive(q, k, weights), **EXACT)


def test_mass_is_conserved_and_the_same_every_time(kernels):
    q, k = tensors((1, 4, 2, 90, 90, 32), torch.bfloat16, kernels.device)
    first = kernels("attention_mass", "attention_mass", q, k, causal_offset=0)
    again = kernels("attention_mass", "attention_mass", q, k, causal_offset=0)
    assert torch.equal(first, again)
    torch.testing.assert_close(first.sum(-1), torch.full_like(first.sum(-1), 180.0))


def test_the_blockwise_function_agrees(kernels):
    """The same answer as the function for every device, on its own terms."""
    q, k = tensors((2, 6, 2, 33, 50, 16), torch.float32, kernels.device)
    weights = torch.rand(2, 1, 33, device=kernels.device)
    for reduce in ("sum", "max", "square"):
        got = kernels("attention_mass", "attention_mass", q, k, weights, reduce, causal_offset=17)
        torch.testing.assert_close(got, blockwise(q, k, weights, reduce, causal_offset=17), **EXACT)


def test_any_layout_and_garbage_in_free_slots(kernels):
    """Views into larger buffers, tokens before heads, and memory that nobody has written."""
    q, k = tensors((2, 4, 2, 21, 45, 40), torch.float32, kernels.device)
    want = attention_mass_naive(q.double(), k.double(), causal_offset=24)
    buffer = torch.full((2, 2, 64, 40), float("nan"), device=q.device)
    buffer[:, :, :45] = k
    lengths = torch.full((2, 2), 45, device=q.device)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = kernels("attention_mass", "attention_mass", q, buffer, causal_offset=24, lengths=lengths)
    torch.testing.assert_close(got[:, :, :45].double(), want, **EXACT)
    assert not got[:, :, 45:].any()
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(
        kernels("attention_mass", "attention_mass", q, turned, causal_offset=24).double(), want, **EXACT
    )


@pytest.mark.parametrize("shape", [(1, 2, 1, 0, 5, 16), (1, 2, 1, 5, 0, 16), (0, 2, 1, 5, 5, 16)], ids=str)
def test_nothing_to_do(kernels, shape):
    q, k = tensors(shape, torch.float32, kernels.device)
    got = kernels("attention_mass", "attention_mass", q, k)
    assert got.shape == k.shape[:3]
    assert not got.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 3, 16, dtype=torch.float64)}, "not torch.float64"),
        ({"k": torch.zeros(1, 1, 3, 16, dtype=torch.float16)}, "with torch.float16"),
        ({"k": torch.zeros(1, 1, 3, 8)}, "do not belong together"),
        ({"q": torch.zeros(1, 2, 3, 300), "k": torch.zeros(1, 1, 3, 300)}, "up to 256"),
        ({"reduce": "mean"}, "is not"),
        ({"positions": torch.zeros(1, 1, 3)}, "causal_offset"),
    ],
)
def test_errors(kernels, change, message):
    call = {"q": torch.zeros(1, 2, 3, 16), "k": torch.zeros(1, 1, 3, 16), **change}
    with pytest.raises(ValueError, match=message):
        kernels("attention_mass", "attention_mass", **call)


def test_available_only_on_a_device(kernels):
    x = torch.zeros(1, 1, 2, 16, device=kernels.device)
    assert available(x) == kernels.native
    assert not available(x.double())
    assert not available(x.cpu())
    assert not available()


def test_importing_kvsieve_leaves_triton_alone():
    code = (
        "import sys, kvsieve.kernels, kvsieve.kernels.naive; sys.exit('kvsieve.kernels.attention_mass' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="large shapes need a graphics processor")
@pytest.mark.parametrize("shape", [(1, 32, 8, 4096, 4096, 128), (2, 28, 4, 1, 9001, 128), (1, 8, 2, 64, 20000, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_large(kernels, shape, dtype, reduce):
    t, n = shape[3:5]
    q, k = tensors(shape, dtype, kernels.device)
    got = kernels("attention_mass", "attention_mass", q, k, reduce=reduce, causal_offset=n - t)
    want = blockwise(q.double(), k.double(), reduce=reduce, causal_offset=n - t)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6 * t)
