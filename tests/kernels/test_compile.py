"""The kernels compile to machine code: the interpreter does not check types, and needs no registers."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest

POINTERS = {
    "i32": ("places", "lengths", "offsets", "starts", "query_places"),
    "fp32": ("lse", "weights", "mass", "sinks", "parts", "lses", "logits"),
}
SHARED_BYTES = 99 << 10
"""What the smallest processors with compute capability 8 grant a program."""

COMMON = {"group": 4, "d": 128, "causal": True, "offset_per_head": False, "widen": False, "block_d": 128}
PLAIN = {**COMMON, "placed": False, "ragged": False, "capped": False}
EVERY = {**COMMON, "group": 7, "d": 80, "placed": True, "ragged": True, "capped": True, "offset_per_head": True}
TILE = {"block_r": 64, "block_n": 128}
SPAN = {
    "group": 4, "d": 128, "dv": 128, "collected": True, "widen": False,
    "block_r": 32, "block_n": 64, "block_d": 128, "block_v": 128,
}  # fmt: skip
CASES = [
    ("attention_mass", "_lse_kernel", 8, {**EVERY, "block_r": 128, "block_n": 64}),
    ("attention_mass", "_mass_kernel", 8, {**PLAIN, **TILE, "weighted": False, "reduction": 0}),
    ("attention_mass", "_mass_kernel", 8, {**EVERY, **TILE, "weighted": True, "reduction": 1}),
    ("decode", "_span_kernel", 4, {**SPAN, "placed": True, "capped": True}),
    ("decode", "_join_kernel", 4, {"group": 4, "dv": 128, "sunk": True, "block_s": 64, "block_v": 128}),
    ("decode", "_received_kernel", 4, {"reduction": 0, "block_r": 4, "block_n": 128}),
]


def compile_all(cache: str) -> list[tuple[str, int, int]]:
    """`(case, bytes of machine code, bytes of shared memory)` in bfloat16, for compute capability 9.0."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvsieve.kernels import attention_mass, decode

    modules = {"attention_mass": attention_mass, "decode": decode}
    made = []
    for module, name, warps, constants in CASES:
        kernel = getattr(modules[module], name)
        signature = {p.name: kind_of(p.name, module, constants) for p in kernel.params}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, p in enumerate(kernel.params)
            if signature[p.name].startswith("*") or p.name.startswith("stride")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        made.append((name, len(code.asm["cubin"]), code.metadata.shared))
    return made


def kind_of(argument: str, module: str, constants: dict[str, int]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in ("q", "k", "keys", "values") or (argument == "out" and module == "decode"):
        return "*bf16"
    for kind, names in POINTERS.items():
        if argument in names or (argument == "out" and kind == "fp32"):
            return f"*{kind}"
    return "fp32" if argument in ("factor", "cap") else "i32"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = pool.submit(compile_all, str(tmp_path)).result()
    assert len(made) == len(CASES)
    for case, code, shared in made:
        assert code > 0, case
        assert shared <= SHARED_BYTES, case
