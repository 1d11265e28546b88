"""What several commands do alike."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["few_threads", "typed_flags"]

_SMALL = 30_000_000
"""Parameters below which one thread is fastest."""


def typed_flags(ctx: typer.Context) -> dict[str, str]:
    """Flags that were typed, by parameter, as one would type them again."""
    out = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            value, flags = ctx.params[parameter.name or ""], [*parameter.opts, *parameter.secondary_opts]
            flag = flags[0] if value is not False else flags[-1]
            out[parameter.name or ""] = flag if isinstance(value, bool) else f"{flag}={value}"
    return out


def few_threads(model: nn.Module) -> None:
    """The steps of a small model are too short to share: threads wait for each other longer than they work, and for
    seconds where another program has the second core. `OMP_NUM_THREADS` goes before this."""
    import torch

    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
