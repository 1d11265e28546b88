"""Settings for the whole suite: one thread, quiet libraries."""

from __future__ import annotations

import pytest
import torch
import transformers


def pytest_configure(config: pytest.Config) -> None:
    """One thread, so that numbers do not depend on the machine, and parallel workers do not fight."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
