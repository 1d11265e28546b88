"""Triton kernels for NVIDIA and AMD processors, each with a naive twin in `naive`.

Importing this package does not import triton; its modules `attention_mass` and `decode` do. Ask `available` first.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["DTYPES", "MAX_HEAD_DIM", "available"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def available(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on a device that triton serves, all in the same one of `DTYPES`, with a
    last dimension of at most `MAX_HEAD_DIM`."""
    return bool(tensors) and all(
        x.is_cuda and x.dtype == tensors[0].dtype and x.dtype in DTYPES and 0 < x.shape[-1] <= MAX_HEAD_DIM
        and _served(x.device)
        for x in tensors
    )  # fmt: skip


@cache
def _served(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    # triton supports NVIDIA processors from compute capability 8.0 on
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
