"""From rows to results. Neither model nor data is needed, so results can always be made again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .contenders import FULL
from .longbench_scores import LENGTH_BUCKETS, bootstrap_of_groups, length_bucket
from .metrics import average

__all__ = ["HELD", "summarise"]

HELD = 0.5
"""A wrong answer counts as kept but ignored if at least this share of all heads held it, else as evicted."""
_LOW, _OFF_TARGET, _FEW_DEPTHS = 10.0, 0.03, 11
_Row = dict[str, Any]


def summarise(plan: dict[str, Any], rows: dict[str, _Row], seconds: dict[str, float] | None = None) -> dict[str, Any]:
    """The content of `summary.json`.

    A sample that failed scores 0 and is counted in `failed`; it is never left out of a mean. Numbers about the cache
    are means over the samples that did not fail. Differences from the full cache are over the same samples.

    Args:
        plan: as `Run.describe` makes it.
        rows: by key.
        seconds: by key.

    Returns:
        `run`, `tasks`, `results` (per method, task and, for `ruler`, length), `overall` (per method: the mean of
        tasks, each counting the same), `failures`, `notes`.
    """
    groups = _groups(plan)
    results, overall, failures = [], [], []
    full: dict[Any, list[float]] = {}
    for method, keys in zip(plan["methods"], plan["keys"], strict=True):
        found = [(item, rows[key]) for item, key in zip(plan["items"], keys, strict=True) if key in rows]
        mine = []
        for group in groups:
            chosen = [(item, row) for item, row in found if _group(plan, item) == group]
            if chosen:
                one = _result(plan, method, group, chosen)
                scores = list(one["sample_scores"].values())
                if method["label"] == FULL:
                    full[group] = scores
                one |= _against(scores, full.get(group), plan, method["label"])
                mine.append(one)
        results += mine
        taken = sum((seconds or {}).get(key, 0.0) for key in keys)
        overall.append(_overall(plan, method, [row for _, row in found], mine) | {"seconds": taken})
        failures += [
            {"method": method["label"], "task": item["task"], "id": item["id"], "error": row["error"]}
            for item, row in found
            if row["status"] != "ok"
        ]
    _compare_overall(plan, overall, results)
    return {
        "format": plan["format"],
        "kind": plan["kind"],
        "run": plan["run"],
        "tasks": plan["tasks"],
        "results": results,
        "overall": overall,
        "failures": failures,
        "notes": [*plan["notes"], *_notes(plan, overall, results, list(rows.values()))],
    }


def _groups(plan: dict[str, Any]) -> list[Any]:
    return list(dict.fromkeys(_group(plan, item) for item in plan["items"]))


def _group(plan: dict[str, Any], item: dict[str, Any]) -> tuple[str, int | None]:
    return item["task"], item["length"] if plan["kind"] != "longbench" else None


def _result(plan: dict[str, Any], method: dict[str, Any], group: Any, chosen: Sequence[tuple[Any, _Row]]) -> _Row:
    good = [row for _, row in chosen if row["status"] == "ok"]
    scores = {item["id"]: float(row["score"] or 0.0) if row["status"] == "ok" else 0.0 for item, row in chosen}
    profile, scored = plan["run"].get("profile", "fixed"), all(row.get("score", 0.0) is not None for _, row in chosen)
    return {
        "method": method["label"],
        "policy": None if method["name"] == FULL else method["name"],
        "budget": method["budget"],
        "task": group[0],
        "length": group[1],
        "score": average(list(scores.values()), profile=profile) if scored else None,
        "interval": _interval(list(scores.values()), plan) if scored else None,
        "samples": len(chosen),
        "failed": len(chosen) - len(good),
        **_cache(good),
        "survival": _survival(good),
        "by_depth": _by_depth(chosen, plan["run"].get("grid", False)),
        "by_length": _by_length(chosen) if plan["kind"] == "longbench" else {},
        "sample_scores": scores if scored else {},
    }


def _cache(rows: Sequence[_Row]) -> dict[str, Any]:
    if not rows:
        return dict.fromkeys(("kept_share", "tokens_kept", "bytes_held", "bytes_full", "prompt_tokens"))
    return {
        "kept_share": _mean([row["kept_share"] for row in rows]),
        "tokens_kept": _mean([row["tokens_kept"] for row in rows]),
        "bytes_held": round(_mean([row["bytes_held"] for row in rows])),
        "bytes_full": round(_mean([row["bytes_full"] for row in rows])),
        "prompt_tokens": _mean([row["prompt_tokens"] for row in rows]),
    }


def _survival(rows: Sequence[_Row]) -> dict[str, Any] | None:
    """What became of the answers that can be located."""
    known = [row for row in rows if row["survival"] is not None]
    if not known:
        return None
    layers = zip(*(row["survival_by_layer"] for row in known), strict=True)
    wrong = [row for row in known if row["score"] < 1]
    return {
        "answerable": len(known),
        "held": sum(row["survival"] >= HELD for row in known),
        "share": _mean([row["survival"] for row in known]),
        "by_layer": [_mean(layer) for layer in layers],
        "wrong_evicted": sum(row["survival"] < HELD for row in wrong),
        "wrong_held": sum(row["survival"] >= HELD for row in wrong),
    }


def _by_depth(chosen: Sequence[tuple[Any, _Row]], grid: bool) -> list[_Row]:
    """Scores by where the answer stood. Many depths, spread over the samples, are put into tenths."""
    depths = {item["depth"] for item, _ in chosen if item["depth"] is not None}
    given = grid or len(depths) <= _FEW_DEPTHS
    cells: dict[float, list[_Row]] = {}
    for item, row in chosen:
        if item["depth"] is not None:
            place = item["depth"] if given else (min(int(item["depth"] * 10), 9) + 0.5) / 10
            cells.setdefault(round(place, 6), []).append(row)
    found = []
    for depth, rows in sorted(cells.items()):
        held = [row["survival"] for row in rows if row.get("survival") is not None]
        scores = [row["score"] if row["status"] == "ok" else 0.0 for row in rows]
        found.append(
            {
                "depth": depth,
                "score": 100 * _mean(scores),
                "survival": _mean(held) if held else None,
                "samples": len(rows),
            }
        )
    return found


def _by_length(chosen: Sequence[tuple[Any, _Row]]) -> dict[str, Any]:
    if any(item["length"] is None for item, _ in chosen):
        return {}
    cells: dict[str, list[float]] = {name: [] for name in LENGTH_BUCKETS}
    for item, row in chosen:
        cells[length_bucket(item["length"])].append(row["score"] if row["status"] == "ok" else 0.0)
    return {name: {"score": 100 * _mean(cell) if cell else None, "samples": len(cell)} for name, cell in cells.items()}


def _against(scores: list[float], full: list[float] | None, plan: dict[str, Any], label: str) -> dict[str, Any]:
    if label == FULL or not scores or full is None or len(full) != len(scores):
        return {"delta": None, "delta_interval": None}
    change = [a - b for a, b in zip(scores, full, strict=True)]
    return {"delta": 100 * _mean(change), "delta_interval": _interval(change, plan)}


def _overall(plan: dict[str, Any], method: dict[str, Any], rows: list[_Row], results: list[_Row]) -> dict[str, Any]:
    good = [row for row in rows if row["status"] == "ok"]
    survived = [one["survival"] for one in results if one["survival"] is not None]
    scores = [score for one in results for score in one["sample_scores"].values()]
    return {
        "method": method["label"],
        "policy": None if method["name"] == FULL else method["name"],
        "budget": method["budget"],
        "score": _mean([one["score"] for one in results]) if scores else None,
        "interval": _interval_of([list(one["sample_scores"].values()) for one in results], plan),
        **_cache(good),
        "survival": _mean([one["share"] for one in survived]) if survived else None,
        "wrong_evicted": sum(one["wrong_evicted"] for one in survived) if survived else None,
        "wrong_held": sum(one["wrong_held"] for one in survived) if survived else None,
        "samples": len(rows),
        "failed": len(rows) - len(good),
    }


def _compare_overall(plan: dict[str, Any], overall: list[_Row], results: list[_Row]) -> None:
    full = {_place(one): one["sample_scores"] for one in results if one["method"] == FULL}
    for one in overall:
        mine = [result for result in results if result["method"] == one["method"]]
        known = [result["delta"] for result in mine if result["delta"] is not None]
        whole = one["method"] != FULL and bool(known) and len(known) == len(mine)
        one["delta"], one["delta_interval"] = _mean(known) if whole else None, None
        if whole:
            pairs = [(result["sample_scores"], full[_place(result)]) for result in mine]
            one["delta_interval"] = _interval_of([[a[key] - b[key] for key in a] for a, b in pairs], plan)


def _place(result: _Row) -> tuple[str, int | None]:
    return result["task"], result["length"]


def _notes(plan: dict[str, Any], overall: Sequence[_Row], results: Sequence[_Row], rows: Sequence[_Row]) -> list[str]:
    notes, aware = [], plan["run"].get("mode") != "query-agnostic"
    steady = [method["label"] for method in plan["methods"] if method.get("steady")]
    if steady and not aware:
        notes.append(
            f"{', '.join(steady)} hold their budget after every forward pass, also while the question is read, so that "
            "the question has a say in that."
        )
    if steady and aware:
        notes.append(
            f"{', '.join(steady)} hold their budget after every forward pass: what they let go while the context was "
            "read was decided before the question was seen."
        )
    if not aware and len(steady) + 1 < len(plan["methods"]):
        notes.append("The question was read after the eviction and is held in full, on top of what was asked for.")
    others = next((row["unmanaged_layers"] for row in rows if row.get("unmanaged_layers")), None)
    if others:
        kinds = ", ".join(sorted(set(others.values())))
        notes.append(
            f"{len(others)} layers of this model ({kinds}) are not managed: nothing is evicted from them, and kept, "
            "cache held and answer held are over the others."
        )
    for one in overall:
        if one["method"] == FULL or one["kept_share"] is None:
            continue
        asked = _asked_share(one["budget"])
        if one["kept_share"] > 1 - 1e-9:
            notes.append(
                f"{one['method']} evicted nothing: its budget ({one['budget']}) holds every prompt of this run "
                f"({one['prompt_tokens']:.0f} tokens on average). Its row says nothing about the method."
            )
        elif asked is not None and aware and abs(one["kept_share"] - asked) > _OFF_TARGET:
            notes.append(
                f"{one['method']} was asked to keep {asked:.0%} and kept {one['kept_share']:.0%} as measured: what it "
                "protects, or its own rule, decides."
            )
    for result in results:
        if result["method"] == FULL and result["score"] is not None and result["score"] < _LOW and not result["failed"]:
            at = f" at {result['length']:,} tokens" if result["length"] and plan["kind"] != "longbench" else ""
            notes.append(
                f"{result['task']}{at}: the full cache itself scores {result['score']:.1f}, so this task tells nothing "
                f"about eviction with {plan['run']['model']}."
            )
    return notes


def _asked_share(budget: str) -> float | None:
    head, _, tail = budget.partition(" of the tokens")
    return float(head) if tail == "" and budget.endswith(" of the tokens") else None


def _interval(scores: Sequence[float], plan: dict[str, Any]) -> list[float] | None:
    return _interval_of([scores], plan)


def _interval_of(groups: Sequence[Sequence[float]], plan: dict[str, Any]) -> list[float] | None:
    found = bootstrap_of_groups(groups, seed=plan["run"]["seed"])
    return None if found is None else list(found)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
