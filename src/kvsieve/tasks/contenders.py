"""The methods of a run: names and budgets as users write them, made into policies."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .. import zoo
from ..errors import PolicyError
from ..policy import Policy, get_policy, list_methods
from ..scorer import SCORERS

__all__ = ["FULL", "Contender", "contenders", "parse_amount", "parse_options"]

FULL = "full"
"""The method that every other one is compared with."""


@dataclass(frozen=True)
class Contender:
    """A method with a budget.

    Attributes:
        label: its name in results, unique in a run.
        name: registered name of the method.
        budget: what it may keep; None for the method's own, or for a threshold.
        options: further arguments of `get_policy`.
    """

    label: str
    name: str
    budget: float | int | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """The budget, for people."""
        if self.name == FULL:
            return "everything"
        if "threshold" in self.options:
            return f"scores of {self.options['threshold']:g} or more"
        if self.budget is None:
            return "the method's own"
        if isinstance(self.budget, float):
            return f"{self.budget:.4g} of the tokens"
        return f"{self.budget:,} tokens" if isinstance(self.budget, int) else self.budget

    def policy(self, seed: int, item: str) -> Policy:
        """A policy for one item. A share of the tokens is applied once, when the reader says so; methods that draw
        numbers draw others for each item."""
        list_methods()  # defining the methods registers them
        options = dict(self.options)
        if isinstance(self.budget, float):
            options.setdefault("when", "request")
        if self.budget is not None:
            options["budget"] = self.budget
        if "seed" in {f.name for f in fields(SCORERS[self.name])}:
            options.setdefault("seed", zlib.crc32(f"{seed}/{item}".encode()))
        return get_policy(self.name, **options)


def contenders(
    names: Sequence[str],
    budgets: Sequence[float | int | str | None],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    model_name: str = "mini-lm",
) -> list[Contender]:
    """Every method with every budget, the full cache first.

    Args:
        names: registered names, or `all`; `baseline` and `none` stand for `full`.
        budgets: what to keep; see `get_policy`.
        options: arguments of `get_policy` by method name.
        model_name: a bundled model brings a surrogate for kvzap.

    Raises:
        PolicyError: an unknown method or option, or a value outside its range.
        BudgetError: a budget outside its range.
    """
    left: dict[str, dict[str, Any]] = {name: dict(values) for name, values in (options or {}).items()}
    known = list_methods()
    wanted: list[str] = []
    for name in names:
        name = name.strip().lower().replace("-", "_")
        wanted += known if name == "all" else [FULL if name in ("baseline", "none", "") else name]
    found = [Contender(FULL, FULL)]
    for name in dict.fromkeys(wanted):
        if name == FULL:
            continue
        if name not in known:
            get_policy(name)  # raises, with the nearest known name
        given = left.pop(name, {})
        if "scorer" in {f.name for f in fields(SCORERS[name])}:
            given.setdefault("scorer", _surrogate(model_name))
        if "threshold" in given:
            found.append(Contender(name, name, None, given))
            continue
        for budget in dict.fromkeys(budgets) or [None]:
            label = name if len(set(budgets)) < 2 else f"{name}@{budget}"
            found.append(Contender(label, name, budget, given))
    if left:
        raise PolicyError(f"options were given for {', '.join(left)}, which this run does not have")
    for one in found:
        one.policy(0, "")
    return found


def parse_amount(text: str) -> float | int | str:
    """A budget as typed: `0.25` is a share, `1024` tokens, `512MiB` bytes."""
    text = text.strip()
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def parse_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`snapkv.window_size=16` and the like as arguments of `get_policy` by method.

    Raises:
        PolicyError: not of this form.
    """
    out: dict[str, dict[str, Any]] = {}
    for text in texts:
        head, equals, value = text.partition("=")
        name, dot, key = head.partition(".")
        if not (equals and dot and name and key and value):
            raise PolicyError(f"an option is METHOD.NAME=VALUE, such as snapkv.window_size=16, not {text!r}")
        flags: dict[str, Any] = {"true": True, "false": False, "none": None}
        lower = value.strip().lower()
        out.setdefault(name.strip(), {})[key.strip()] = flags[lower] if lower in flags else parse_amount(value)
    return out


def _surrogate(model_name: str) -> str:
    if model_name in zoo.list_models("text") and (zoo.path(model_name) / "kvzap").is_dir():
        return str(zoo.path(model_name) / "kvzap")
    raise PolicyError(
        f"kvzap needs a surrogate made for {model_name}: train one with `kvsieve train-kvzap --model {model_name}` and "
        "name it with --option kvzap.scorer=FOLDER, or leave kvzap out"
    )
