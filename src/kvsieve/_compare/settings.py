"""What the user asked for, checked before anything is loaded or written."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import BudgetError, DataError, PolicyError

__all__ = ["BASELINE", "DEFAULT_METHODS", "MATCH", "Settings", "kind_of", "resolve_methods"]

BASELINE = "baseline"
"""The name under which `full` appears in results."""

DEFAULT_METHODS = (BASELINE, "kvzap", "random", "streaming_llm", "expected_attention", "observed_attention")

MATCH = "match"
"""As a threshold: choose the one that removes as much as `compression_ratio` asks of the other methods."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
_THRESHOLD_METHODS = frozenset({"kvzap"})
_UNMANAGED = frozenset({"full"})


@dataclass(frozen=True)
class Settings:
    """The arguments of `kvsieve.compare_compression_methods`, which documents them."""

    data_path: str | None = None
    model_name: str = "mini-lm"
    compression_ratio: float = 0.5
    threshold: float | str = -7.0
    kvzap_scorer_model: str | None = None
    max_samples: int | None = None
    chunk_size: int = 1
    device: str | None = None
    output_dir: str = "./comparison_results"
    methods: tuple[str, ...] | None = None
    sliding_window_size: int = 128
    n_sink: int = 4
    protect_recent: int = 0
    n_future_positions: int = 512
    use_covariance: bool = True
    use_vnorm: bool = True
    max_length: int = 8192
    seed: int = 42
    dtype: str | None = None
    include_observed_attention: bool = True
    num_gpus: int = 1
    shard: str | None = None
    resume: bool = False
    text_field: str | None = None

    def __post_init__(self) -> None:
        """Raise on the first value that is not allowed.

        Raises:
            BudgetError: a ratio outside [0, 1).
            DataError: a data file that is not there.
            PolicyError: anything else.
        """
        _number("compression_ratio", self.compression_ratio)
        if not 0.0 <= self.compression_ratio < 1.0:
            raise BudgetError(
                f"compression_ratio is the share removed and must lie in [0, 1), not {self.compression_ratio}"
            )
        if self.threshold != MATCH:
            _number("threshold", self.threshold)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise PolicyError(f"{name} must be a whole number of {least} or more, not {value!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise PolicyError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.data_path is not None and not Path(self.data_path).is_file():
            raise DataError(
                f"{self.data_path}: no such file; give a JSONL file with one object and its text per line, or leave "
                "the data out to use the Python language reference"
            )
        if not self.output_dir or (Path(self.output_dir).exists() and not Path(self.output_dir).is_dir()):
            raise PolicyError(f"output_dir must name a folder, not {self.output_dir!r}")
        _ = self.part

    @property
    def part(self) -> tuple[int, int]:
        """This run's shard as (index from 0, number of shards).

        Raises:
            PolicyError: `shard` is not of the form `i/n` with 0 <= i < n.
        """
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", str(self.shard).strip())
        if match is None or not int(match[1]) < int(match[2]):
            raise PolicyError(
                f"shard must be i/n with 0 <= i < n, such as 0/4 for the first of four, not {self.shard!r}"
            )
        return int(match[1]), int(match[2])

    def command(self) -> str:
        """The `kvsieve compare` line that asks for the same numbers."""
        words = ["kvsieve", "compare"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in ("resume", "output_dir", "shard"):
                continue
            flag = "--" + _FLAGS.get(field.name, field.name).replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


_FLAGS = {"data_path": "data", "model_name": "model"}
_LEAST = {
    "max_samples": 1,
    "chunk_size": 1,
    "sliding_window_size": 0,
    "n_sink": 0,
    "protect_recent": 0,
    "n_future_positions": 1,
    "max_length": 2,
    "seed": 0,
    "num_gpus": 1,
}


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        hint = f' (or "{MATCH}")' if name == "threshold" else ""
        raise PolicyError(f"{name} must be a finite number{hint}, not {value!r}")


def resolve_methods(asked: Iterable[str] | None, include_observed_attention: bool = True) -> tuple[str, ...]:
    """Registered names of the methods to run, `full` first (every other number is a difference from it).

    Args:
        asked: names as users write them; `"all"` stands for every registered method, `None` for the default ones.
        include_observed_attention: leave `observed_attention` out of the default and of `"all"` if false.

    Raises:
        PolicyError: an unknown name; the message has the nearest known ones.
    """
    from ..policy import list_methods

    known = list_methods()
    names = ["full"]
    wanted = DEFAULT_METHODS if asked is None else tuple(name.strip() for name in asked if name.strip())
    if not wanted:
        raise PolicyError(f"no method was named; known methods: all, {BASELINE}, {', '.join(known)}")
    for given in wanted:
        name = _registered(given.lower().replace("-", "_"))
        if name == "all" or asked is None:
            group = known if name == "all" else [name]
            names += [n for n in group if include_observed_attention or n != "observed_attention"]
        elif name in known:
            names.append(name)
        else:
            near = difflib.get_close_matches(name, [*known, BASELINE, "all"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise PolicyError(f"unknown method {given!r}{hint} Known methods: all, {BASELINE}, {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def _registered(name: str) -> str:
    return "full" if name == BASELINE else name


def kind_of(name: str) -> str:
    """What decides how much a method keeps: `"ratio"`, `"threshold"`, or `"none"` for the full cache."""
    return "threshold" if name in _THRESHOLD_METHODS else "none" if name in _UNMANAGED else "ratio"
