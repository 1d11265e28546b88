"""The kernels under test: native where there is a graphics processor, else in triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from interpreted import Kernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[Kernels]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed; `pip install triton` runs these tests, without a graphics processor too")
    runner = Kernels()
    yield runner
    runner.close()
