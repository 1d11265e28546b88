"""Kernels without a graphics processor: a process of its own runs them in triton's interpreter.

The interpreter has to be chosen before triton is first imported, and other tests of the same run may have imported it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

T = TypeVar("T")


class Kernels:
    """`kernels(module, function, *args, settings={}, **options)` calls `kvsieve.kernels.<module>.<function>`;
    `settings` maps `"<module>.<constant>"` to another value for the time of the call."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    native = device.type == "cuda"

    def __init__(self) -> None:
        self._pool = None
        if not self.native:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_interpret)

    def __call__(self, module: str, function: str, *args: Any, settings: dict[str, int] | None = None, **options: Any):
        job = (module, function, settings or {}, args, options)
        return _call(*job) if self._pool is None else self._pool.submit(_call, *job).result()

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, a function of a test module, where the kernels can run."""
        return function(*args) if self._pool is None else self._pool.submit(function, *args).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _call(module: str, function: str, settings: dict[str, int], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    where = importlib.import_module(f"kvsieve.kernels.{module}")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        for name, value in settings.items():
            patch.setattr(f"kvsieve.kernels.{name}", value)
        return getattr(where, function)(*args, **options)
