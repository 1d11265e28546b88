"""Every layer keeps another part of the past, so that together they reach further back (LaCache, arXiv 2507.14204)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PolicyError
from ..protect import Protect
from ..scorer import Scorer
from ..view import LayerView

__all__ = ["Ladder", "compact"]


@dataclass(frozen=True)
class Ladder(Scorer):
    """When room is needed, groups of B neighbours become A: layer `i` keeps those at `i mod (B - A + 1)` and on. The
    next groups lie behind the last ones; where none is left, it starts over behind the sinks, on what is left there.
    What a group lets go leaves as room is needed, oldest first, so that the budget is used throughout. Use
    `positions="slot"` for the paper's in-cache positions.

    With `L` layers and `d = span - overlap`, `B = 1 + ceil((L - span) / d)` and `A = min(ceil(span / d), B)`.

    Attributes:
        span: in how many neighbouring layers a token is kept; a quarter of the layers by default.
        overlap: how many of these two neighbouring tokens share, below `span`; half of it by default.
        n_sink: first tokens that are never evicted.
    """

    name: ClassVar[str] = "ladder"
    source: ClassVar[str] = "LaCache, arXiv 2507.14204, section 3.2"

    span: int | None = None
    overlap: int | None = None
    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.span is not None and self.span < 1:
            raise PolicyError(f"ladder: span must be 1 layer or more, not {self.span}")
        if self.n_sink < 0 or (self.overlap is not None and self.overlap < 0):
            raise PolicyError("ladder: overlap and n_sink must be zero or more")
        if self.span is not None and self.overlap is not None and self.overlap >= self.span:
            raise PolicyError(f"ladder: overlap={self.overlap} must be below span={self.span}")

    @property
    def tensors_only(self) -> bool:
        return False

    def default_protect(self) -> Protect:
        return Protect(sink=self.n_sink)

    def groups(self, layers: int) -> tuple[int, int, int]:
        """Span, and slots of a group before and after it is compacted, in a model with so many managed layers.

        Raises:
            PolicyError: no ladder with this span and overlap fits that many layers.
        """
        span = max(1, layers // 4) if self.span is None else self.span
        overlap = span // 2 if self.overlap is None else self.overlap
        if not overlap < span < layers:
            raise PolicyError(
                f"ladder: span={span} and overlap={overlap} do not fit {layers} managed layers; "
                "overlap must be below span, and span below the number of layers"
            )
        before = 1 + math.ceil((layers - span) / (span - overlap))
        after = min(math.ceil(span / (span - overlap)), before)
        if before == after:
            raise PolicyError(
                f"ladder: with span={span} and overlap={overlap}, {layers} layers let nothing go; lower one of them"
            )
        return span, before, after

    def least(self, view: LayerView) -> int:
        _, before, after = self.groups(view.n_layers)
        return self.n_sink + view.n_layers + before + after

    def observe(self, view: LayerView) -> None:
        if "cursor" not in view.state:
            self.groups(view.n_layers)
            view.state["cursor"] = torch.full((view.positions.shape[0],), self.n_sink)

    def score(self, view: LayerView) -> Tensor:
        if not view.alike:
            raise PolicyError("ladder chooses the same tokens for all heads of a layer; use it with share='uniform'")
        held, leaving = view.valid[:, 0], view.column("leaving")[:, 0] > 0
        loose = (held & leaving & ~view.protected[:, 0]).sum(-1)
        short = ((held.sum(-1) - loose).cpu() - view.counts).tolist()
        if max(short) > 0:
            marks = torch.zeros(view.positions.shape, device=held.device)
            for b in (b for b, need in enumerate(short) if need > 0):
                slots = (held[b] & ~leaving[b]).nonzero()[:, 0]
                slots = slots[view.positions[b, 0, slots].argsort()]
                cursor = int(view.state["cursor"][b])
                gone, cursor = compact(
                    len(slots), short[b], cursor, self.n_sink, view.rank, view.n_layers, *self.groups(view.n_layers)
                )
                marks[b, :, slots[gone.to(slots.device)]] = 1.0
                view.state["cursor"][b] = cursor
            view.add("leaving", marks)
        return -view.column("leaving")


def compact(
    n: int, need: int, cursor: int, sink: int, layer: int, layers: int, span: int, before: int, after: int
) -> tuple[Tensor, int]:
    """Which of `n` slots layer `layer` of `layers` lets go, `[n]` bool on the CPU, at least `need` of them, and the new
    cursor. Groups begin at `cursor`; the last `layers` slots are left alone."""
    fewer, target = before - after, n - need
    fit = max(target - cursor - layers, 0) // after
    number = min(fit, -(-need // fewer))
    stays = _stays(torch.arange(n) - cursor, number, before, after, 1, layer)
    need -= number * fewer
    if need <= 0:
        return ~stays, cursor + number * after
    # start over, on what is left; `step` is how many times that would have to be done one group length at a time
    left = stays.nonzero()[:, 0]
    once = max((target - sink - layers) // after, 1) * fewer
    step = -(-need // once)
    while True:
        length = 1 + step * (before - 1)
        number = -(-need // (length - after))
        if sink + number * length <= len(left) - span:
            break
        if sink + length > len(left) - span:
            return ~stays, sink  # no room for the pattern; what is oldest leaves
        step += 1
    again = _stays(torch.arange(len(left)) - sink, number, length, after, step, layer)
    stays[left[~again]] = False
    return ~stays, sink + number * after


def _stays(slot: Tensor, number: int, length: int, after: int, step: int, layer: int) -> Tensor:
    """Bool: slots, counted from where `number` groups of `length` begin, that stay: those outside, and `after` in each
    group, `step` apart."""
    offset = slot % length - layer % (length - step * (after - 1))
    picked = (offset >= 0) & (offset < step * after) & (offset % step == 0)
    return picked | (slot < 0) | (slot >= number * length)
