"""Result files of an earlier LongBench script: written for those who read them, read to compare with."""

from __future__ import annotations

from typing import Any

from .._fields import Fields
from ..errors import DataError
from .longbench_scores import bootstrap_interval

__all__ = ["earlier_results", "is_earlier", "read_earlier"]

_FIELDS = ("config", "results")


def earlier_results(
    plan: dict[str, Any], rows: dict[str, dict[str, Any]], seconds: dict[str, float], summary: dict[str, Any]
) -> dict[str, Any]:
    """What the script would have written of the run's last method, in its own fields.

    One thing differs: a failed example counts as 0 in the score. The script left it out, which raised the score.

    Args:
        plan, rows, seconds: as `load_run` reads them.
        summary: as `summarise` makes it.
    """
    method, keys = plan["methods"][-1], plan["keys"][-1]
    overall = next(one for one in summary["overall"] if one["method"] == method["label"])
    settings = plan["run"].get("strategy", {})
    results = []
    for item, key in zip(plan["items"], keys, strict=True):
        row = rows[key]
        good = row["status"] == "ok"
        results.append(
            {
                "id": item["id"].removeprefix(f"{item['task']}/") if len(plan["tasks"]) == 1 else item["id"],
                "prompt_length": item["prompt_tokens"],
                "output_text": row["text"] if good else "",
                "output_length": row["new_tokens"] if good else 0,
                "answers": row["expected"] if good else [],
                "timing": {"total_time": seconds.get(key)},
                "success": good,
                "score": row["score"] if good else 0.0,
                "error": None if good else row["error"],
            }
        )
    good_rows = [one for one in results if one["success"]]
    return {
        "config": {
            "model": plan["run"]["model"],
            "strategy": settings.get("strategy", method["label"]),
            "sink_tokens": settings.get("sink_tokens"),
            "recent_tokens": settings.get("recent_tokens"),
            "middle_budget_tokens": settings.get("middle_budget"),
            "uniform_stride": settings.get("uniform_stride", 0),
            "dataset": ",".join(task["name"] for task in plan["tasks"]),
            "num_examples": len(plan["items"]),
            "max_new_tokens": plan["run"].get("max_new_tokens"),
            "prefill_chunk_size": plan["run"]["chunk_size"],
            "rope_mode": "abs" if plan["run"]["positions"] == "original" else "raw_rel",
        },
        "summary": {
            "total_examples": len(results),
            "successful": len(good_rows),
            "failed": len(results) - len(good_rows),
            "avg_prompt_length": sum(one["prompt_length"] for one in results) / len(results),
            "avg_output_length": sum(one["output_length"] for one in good_rows) / max(1, len(good_rows)),
            "score": overall["score"],
            "metric": ",".join(task["metric"] for task in plan["tasks"]),
        },
        "results": results,
        "evaluation": {
            "score": overall["score"],
            "metric": ",".join(task["metric"] for task in plan["tasks"]),
            "num_scored": len(results),
        },
    }


def is_earlier(data: Any) -> bool:
    """Whether this is the content of such a file."""
    return isinstance(data, dict) and all(name in data for name in _FIELDS) and "overall" not in data


def read_earlier(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Such a file as a summary with one method; failed examples count as 0. What it does not say is None.

    Raises:
        DataError: it holds no results, or they have no scores.
    """
    config, found = Fields(data["config"], f"{where}: config"), data["results"]
    if not isinstance(found, list) or not found:
        raise DataError(f"{where} holds no results")
    scores: dict[str, float] = {}
    for i, one in enumerate(found):
        fields = Fields(one, f"{where}: result {i}")
        good = bool(one.get("success", True))
        if good and fields.absent("score"):
            raise fields.error("score", "is missing")
        name = str(one.get("id", i))
        if name in scores:
            raise fields.error("id", f"{name!r} occurs twice")
        scores[name] = float(one["score"]) if good else 0.0
    values = list(scores.values())
    dataset = config.words("dataset")
    failed = sum(not one.get("success", True) for one in found)
    interval = bootstrap_interval(values)
    common = {
        "method": config.words("strategy") or "earlier run",
        "policy": None,
        "budget": "",
        "score": 100 * sum(values) / len(values),
        "interval": None if interval is None else list(interval),
        "samples": len(values),
        "failed": failed,
        "kept_share": None,
        "tokens_kept": None,
        "bytes_held": None,
        "bytes_full": None,
        "survival": None,
        "seconds": None,
    }
    return {
        "kind": "longbench",
        "run": {"model": config.words("model")},
        "tasks": [{"name": dataset, "metric": "", "samples": len(values)}],
        "results": [common | {"task": dataset, "length": None, "sample_scores": scores}],
        "overall": [common],
        "failures": [],
        "notes": [],
    }
