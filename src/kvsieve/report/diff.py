"""Two runs side by side: what changed, and whether that is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._rowlog import read_json
from ..errors import DataError
from ..tasks.contenders import FULL
from ..tasks.earlier import is_earlier, read_earlier
from ..tasks.longbench_scores import bootstrap_interval
from ..tasks.run import SUMMARY
from .tables import markdown_table

__all__ = ["compare_runs", "diff_markdown", "load_summary"]

_COLUMNS = (
    "task", "A", "B", "score A", "score B", "B - A", "95 % interval", "won", "lost", "kept A", "kept B", "held A",
    "held B",
)  # fmt: skip


def load_summary(path: str | Path) -> dict[str, Any]:
    """A `summary.json`, the folder that holds one, or a result file of the earlier LongBench script.

    Raises:
        DataError: it is none of these.
    """
    path = Path(path)
    file = path / SUMMARY if path.is_dir() else path
    data = read_json(file, "give summary.json of a run, or the folder it is in")
    if is_earlier(data):
        return read_earlier(data, str(file))
    if not isinstance(data, dict) or "overall" not in data or "results" not in data:
        raise DataError(f"{file} holds no results of `kvsieve longbench` or `kvsieve ruler`")
    return data


def compare_runs(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Compare what two runs have in common, method by method and task by task.

    Methods are paired by name. If each run has exactly one method that the other lacks, these two are a pair as well.

    Returns:
        `pairs`: for each method pair and task `a`, `b` (names), `task`, `length`, `score_a`, `score_b`, `delta`
        (B - A) and `interval` (95 %, None for fewer than three), both over the samples in both, `shared` (how many),
        `won` and `lost` (samples that B scored higher or lower), `kept_a`, `kept_b` (shares), `bytes_a`, `bytes_b`,
        `seconds_a`, `seconds_b` (whole method); and `notes`.

    Raises:
        DataError: they have no method and task with a score in common.
    """
    names_a, names_b = ([one["method"] for one in run["overall"]] for run in (a, b))
    pairs = [(name, name) for name in names_a if name in names_b]
    only_a = [name for name in names_a if name not in names_b and name != FULL]
    only_b = [name for name in names_b if name not in names_a and name != FULL]
    if len(only_a) == len(only_b) == 1:
        pairs.append((only_a[0], only_b[0]))
    found = []
    for name_a, name_b in pairs:
        for one in a["results"]:
            twin = next(
                (
                    other
                    for other in b["results"]
                    if one["method"] == name_a
                    and other["method"] == name_b
                    and (one["task"], one["length"]) == (other["task"], other["length"])
                ),
                None,
            )
            if twin is not None and None not in (one["score"], twin["score"]):
                found.append(_pair(one, twin) | {"seconds_a": _seconds(a, name_a), "seconds_b": _seconds(b, name_b)})
    if not found:
        raise DataError(
            f"the runs have nothing in common: A has {_contents(a)}; B has {_contents(b)}. Methods are paired by name"
        )
    return {"pairs": found, "notes": _notes(a, b, found, only_a, only_b)}


def diff_markdown(diff: dict[str, Any]) -> str:
    """The comparison as a Markdown table with notes."""
    rows = []
    for one in diff["pairs"]:
        task = one["task"] if one["length"] is None else f"{one['task']}, {one['length']:,}"
        interval = "" if one["interval"] is None else "{:+.1f} to {:+.1f}".format(*one["interval"])
        rows.append(
            [
                task, one["a"], one["b"], f"{one['score_a']:.1f}", f"{one['score_b']:.1f}", f"{one['delta']:+.1f}",
                interval, str(one["won"]), str(one["lost"]), _share(one["kept_a"]), _share(one["kept_b"]),
                _mib(one["bytes_a"]), _mib(one["bytes_b"]),
            ]
        )  # fmt: skip
    notes = "\n".join(f"- {note}" for note in diff["notes"])
    return "\n\n".join(part for part in (markdown_table(_COLUMNS, rows), notes) if part) + "\n"


def _pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    shared = [key for key in a["sample_scores"] if key in b["sample_scores"]]
    change = [b["sample_scores"][key] - a["sample_scores"][key] for key in shared]
    interval = bootstrap_interval(change) if change else None
    return {
        "a": a["method"],
        "b": b["method"],
        "task": a["task"],
        "length": a["length"],
        "score_a": a["score"],
        "score_b": b["score"],
        "delta": 100 * sum(change) / len(change) if change else b["score"] - a["score"],
        "interval": None if interval is None else list(interval),
        "shared": len(shared),
        "samples_a": a["samples"],
        "samples_b": b["samples"],
        "interval_a": a["interval"],
        "interval_b": b["interval"],
        "won": sum(value > 0 for value in change),
        "lost": sum(value < 0 for value in change),
        "kept_a": a["kept_share"],
        "kept_b": b["kept_share"],
        "bytes_a": a["bytes_held"],
        "bytes_b": b["bytes_held"],
    }


def _notes(
    a: dict[str, Any], b: dict[str, Any], pairs: list[dict[str, Any]], only_a: list[str], only_b: list[str]
) -> list[str]:
    notes = []
    for name in ("model", "dtype", "mode", "profile", "seed", "chunk_size", "positions", "data_fingerprint"):
        left, right = (run["run"].get(name) for run in (a, b))
        if left is not None and right is not None and left != right:
            notes.append(f"The runs differ in {name.replace('_', ' ')}: {left} and {right}.")
    if any(one["shared"] < max(one["samples_a"], one["samples_b"]) for one in pairs):
        notes.append("Some samples are in one run only: B - A, its interval, won and lost are over those in both.")
    paired = {one["a"] for one in pairs} | {one["b"] for one in pairs}
    for run, names in (("A", only_a), ("B", only_b)):
        left_out = [name for name in names if name not in paired]
        if left_out:
            notes.append(f"Only {run} has {', '.join(left_out)}.")
    return notes


def _seconds(run: dict[str, Any], name: str) -> float | None:
    return next((one["seconds"] for one in run["overall"] if one["method"] == name), None)


def _contents(run: dict[str, Any]) -> str:
    methods = ", ".join(one["method"] for one in run["overall"])
    return f"{methods} on {', '.join(task['name'] for task in run['tasks'])}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.2f} MiB"
