"""Names of runs, such as `full`, `window` or `evict3r` at a budget, turned into settings of a `StreamSession`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..budgets import parse_bytes
from ..errors import BudgetError, PolicyError
from ..policy import get_policy, list_methods
from ..scorer import SCORERS
from .model import STream3R
from .session import StreamSession

__all__ = ["BUDGET_RATIO", "Asked", "Run", "check_run", "plan_runs", "run_names", "share_of_stream"]

BUDGET_RATIO = 0.5
"""Share of the stream that an evicting run keeps where nothing else is said; the default of `StreamSession`."""
_ALIASES = {"recent": "sink_recent"}
_RATIO_FORM = re.compile(r"frame_attention\(ratio=([0-9.eE+-]+)\)")


@dataclass(frozen=True)
class Run:
    """One way of streaming the frames.

    Attributes:
        name: unique among the runs, for tables.
        method: without the budget, for plots.
        settings: keyword arguments of `StreamSession`.
        budget: what was asked to be kept, for people; empty where nothing was.
        ratio: the share of the stream that this is, where it is one.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    budget: str = ""
    ratio: float | None = None

    @property
    def folder(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^\w.]+", "_", self.name.replace("%", "pct")).strip("_")

    def session(self, model: STream3R, **more: Any) -> StreamSession:
        """A new session."""
        return StreamSession(model, **self.settings, **more)


@dataclass(frozen=True)
class Asked:
    """What the runs have in common; the words are those of `StreamSession`.

    Attributes:
        tokens_per_frame: tokens of one frame.
        num_frames: length of the stream, of which `budget_ratios` are shares.
        budget_ratios: shares of the stream kept, every one of them in a run of its own. Each is turned into one number
            of tokens per layer for all methods.
        budgets: instead, tokens per layer (int), shares of the frames seen so far (float), or bytes such as `"2GiB"`.
        mode: of runs that do not fix it.
        eviction_ratio: share that `frame_attention` removes after every frame, instead of keeping a budget.
    """

    tokens_per_frame: int
    num_frames: int
    budget_ratios: tuple[float, ...] = ()
    budgets: tuple[int | float | str, ...] = ()
    mode: str = "causal"
    eviction_ratio: float | None = None
    importance_aggregation: str = "sum"
    temp: float = 0.5
    fidelity: str = "guaranteed"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise PolicyError(f"num_frames must be 1 or more, not {self.num_frames}")
        if self.budgets and self.budget_ratios:
            raise PolicyError("give either budgets or budget_ratios: shares of the whole stream")
        for ratio in self.budget_ratios:
            if not 0.0 < ratio <= 1.0:
                raise BudgetError(f"budget_ratio is the share of the stream kept and must lie in (0, 1], not {ratio}")
        for budget in self.budgets:
            if isinstance(budget, str):
                parse_bytes(budget)


def run_names() -> list[str]:
    """What a run may be called: the stream's own ways, then every method that can run in a stream."""
    methods = [n for n in list_methods() if not (SCORERS[n].wants_hidden or SCORERS[n].wants_rope)]
    return ["full", "window", "recent", *(n for n in methods if n != "full"), "frame_attention(ratio=0.3)"]


def plan_runs(names: Sequence[str], asked: Asked) -> list[Run]:
    """The runs of these names, in order; those that evict come once for every budget.

    `full` keeps everything, `window` the first frame and the last five, `recent` the first frame and what else of the
    newest fits, `frame_attention(ratio=0.3)` lets that share go after every frame; all others are methods.

    Raises:
        PolicyError: an unknown name, a method that cannot run in a stream, a name given twice, or a setting that no
            run uses.
    """
    runs: list[Run] = []
    for name in (name.strip() for name in names):
        runs += _runs(name, asked)
    if not runs:
        raise PolicyError(f"no run was named; there are: {', '.join(run_names())}")
    twice = sorted({run.name for run in runs if sum(run.name == other.name for other in runs) > 1})
    if twice:
        raise PolicyError(f"{', '.join(twice)} is asked for more than once")
    if asked.fidelity != "guaranteed" and all("fidelity" not in run.settings for run in runs):
        raise PolicyError(
            f"fidelity={asked.fidelity!r} concerns evict3r with a budget_ratio, which is not among the runs"
        )
    return runs


def check_run(run: Run, model: STream3R, tokens_per_frame: int) -> None:
    """Raise now what the first frame would raise, before other runs have taken their time.

    Raises:
        BudgetError: the budget is below what is protected.
        PolicyError: settings that do not go together.
    """
    session = run.session(model)
    session.plan.trunk(tokens_per_frame, session.memory.each)
    session.plan.camera()


def share_of_stream(ratio: float, asked: Asked) -> int:
    """Tokens per layer."""
    # the nudge keeps shares such as 0.29 of 100 tokens from losing a token to binary fractions
    return max(1, math.floor(ratio * asked.num_frames * asked.tokens_per_frame + 1e-6))


def _runs(name: str, asked: Asked) -> list[Run]:
    if name == "full":
        return [Run("full", "full", {"mode": "causal"})]
    if name == "window":
        return [Run("window", "window", {"mode": "window"}, "last 5 frames")]
    common: dict[str, Any] = {"mode": asked.mode, "num_frames": asked.num_frames}
    match = _RATIO_FORM.fullmatch(name)
    removed = _number(match[1], name) if match else None
    if name == "frame_attention" and not (asked.budgets or asked.budget_ratios):
        removed = asked.eviction_ratio
    if removed is not None:
        common |= {"use_kv_compression": True, "eviction_ratio": removed}
        common |= {"importance_aggregation": asked.importance_aggregation}
        label = f"frame_attention(ratio={removed:g})"
        return [Run(label, "frame_attention(ratio)", common, f"{removed:.0%} of what may leave, after every frame")]
    _check_method(name)
    return [_at(name, common, budget, ratio, asked) for budget, ratio in _budgets(asked)]


def _budgets(asked: Asked) -> list[tuple[int | float | str, float | None]]:
    if asked.budgets:
        return [(budget, None) for budget in asked.budgets]
    return [(share_of_stream(ratio, asked), ratio) for ratio in asked.budget_ratios or (BUDGET_RATIO,)]


def _at(name: str, common: dict[str, Any], budget: int | float | str, ratio: float | None, asked: Asked) -> Run:
    if ratio is not None:
        label = f"{100 * ratio:g}%"
    elif isinstance(budget, float):
        label = f"{100 * budget:g}% of the past"
    else:
        label = str(budget)
    said = {"recent": "first frame and newest tokens, "}.get(name, "")
    said += f"{label} of the stream: {budget} tokens per layer" if ratio is not None else label
    if name == "evict3r" and ratio is not None and asked.fidelity != "guaranteed":
        settings: dict[str, Any] = {"use_layerwise_eviction": True, "budget_ratio": ratio, "temp": asked.temp}
        settings["fidelity"] = asked.fidelity
    else:
        hypers: dict[str, dict[str, Any]] = {
            "evict3r": {"temp": asked.temp},
            "frame_attention": {"aggregation": asked.importance_aggregation},
            "random": {"seed": asked.seed},
            "recent": {"sink_tokens": 0},
        }
        settings = {"policy": get_policy(_ALIASES.get(name, name), budget=budget, **hypers.get(name, {}))}
    return Run(f"{name} {label}", name, common | settings, said, ratio)


def _check_method(name: str) -> None:
    known = run_names()
    if name in known:
        return
    if name in SCORERS:
        needs = "hidden states" if SCORERS[name].wants_hidden else "rotary positions"
        raise PolicyError(f"{name} reads {needs} of a text model and cannot run in a stream")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise PolicyError(f"unknown run {name!r}{hint} There are: {', '.join(known)}")


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PolicyError(f"{name}: {text!r} is not a number") from None
