"""From rows to results. Nothing here needs the model or the texts, so results can always be made again."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["missing_cells", "summarise"]

RESAMPLES = 2000
_OFF_TARGET = 0.02


def missing_cells(plan: dict[str, Any], rows: dict[str, dict[str, Any]]) -> int:
    """Cells of the plan that no row answers, failed ones not counted."""
    return sum(key not in rows for key, _, _ in plan["cells"])


def summarise(plan: dict[str, Any], rows: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two result files.

    A method with a failed cell has no perplexity: a mean over the texts that happened to work would compare unequal
    things.

    Args:
        plan: as `describe` makes it.
        rows: one row per cell, by key.

    Returns:
        The content of `detailed_results.json` and of `comparison_summary.json`.
    """
    by_method: list[list[dict[str, Any]]] = [[] for _ in plan["methods"]]
    for key, method, _ in plan["cells"]:
        by_method[method].append(rows[key])
    methods = [_method(about, cells) for about, cells in zip(plan["methods"], by_method, strict=True)]
    baseline = methods[0]
    notes = list(plan["notes"])
    for result, about in zip(methods, plan["methods"], strict=True):
        if result["status"] == "ok":
            result |= _against(result, baseline, plan["run"]["seed"])
            notes += _off_target(result, about)
    detailed = {"run": plan["run"], "notes": notes, "methods": {m["method_name"]: m for m in methods}}
    summary = {
        "baseline_perplexity": baseline["perplexity"],
        "results": [
            {
                "method": m["method_name"],
                "kind": m["kind"],
                "asked": m["asked"],
                "status": m["status"],
                "perplexity": m["perplexity"],
                "ppl_delta": m["ppl_delta"],
                "ppl_delta_pct": m["ppl_delta_pct"],
                "ppl_delta_interval": m["ppl_delta_interval"],
                "ppl_delta_pct_interval": m["ppl_delta_pct_interval"],
                "compression_ratio": m["compression_stats"]["avg_compression_ratio"],
                "bytes_held": m["bytes_held"],
                "bytes_full": m["bytes_full"],
                "mean_visible_keys": m["mean_visible_keys"],
                "mode": m["mode"],
                "chunk_size": m["chunk_size"],
                "seconds": m["seconds"],
                "errors": m["errors"],
            }
            for m in methods
        ],
        "notes": notes,
        "run": plan["run"],
    }
    return detailed, summary


def _method(about: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    good = [cell for cell in cells if cell["status"] == "ok"]
    errors = [f"{cell['sample']}: {cell['error']}" for cell in cells if cell["status"] != "ok"]
    whole = not errors
    nll = math.fsum(float(cell["nll"]) for cell in good)
    tokens = sum(cell["tokens"] for cell in good)
    seen, held = (sum(cell[name] for cell in good) for name in ("keys_seen", "keys_held"))
    rates = [1 - cell["keys_held"] / cell["keys_seen"] for cell in good]
    visible = math.fsum(cell["mean_visible_keys"] * cell["tokens"] for cell in good)
    return {
        "method_name": about["method"],
        "kind": about["kind"],
        "asked": about["asked"],
        "options": about["options"],
        "status": "ok" if whole else "failed",
        "errors": errors,
        "perplexity": _exp(nll / tokens) if whole else None,
        "avg_nll": nll / tokens if whole else None,
        "ppl_delta": None,
        "ppl_delta_pct": None,
        "ppl_delta_interval": None,
        "ppl_delta_pct_interval": None,
        "total_tokens": tokens,
        "num_samples": len(good),
        "compression_stats": {
            "avg_compression_ratio": math.fsum(rates) / len(rates) if whole else None,
            "sparsity_percentage": 100 * (seen - held) / seen if whole else None,
            "total_keys_original": seen,
            "total_keys_kept": held,
            "total_keys_discarded": seen - held,
        },
        "bytes_held": sum(cell["bytes_held"] for cell in good),
        "bytes_full": sum(cell["bytes_full"] for cell in good),
        "mean_visible_keys": visible / tokens if whole else None,
        "mode": " + ".join(sorted({cell["mode"] for cell in good})),
        "chunk_size": good[0]["chunk_size"] if good else None,
        "seconds": math.fsum(cell["seconds"] for cell in good),
        "nll_per_sample": [float(cell["nll"]) / cell["tokens"] for cell in good],
        "samples": good,
    }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _against(result: dict[str, Any], baseline: dict[str, Any], seed: int) -> dict[str, Any]:
    """What a method costs compared with the full cache on the same texts."""
    if baseline["status"] != "ok":
        return {}
    delta = result["perplexity"] - baseline["perplexity"]
    intervals = (None, None) if result is baseline else _intervals(result, baseline, seed)
    return {
        "ppl_delta": delta,
        "ppl_delta_pct": 100 * delta / baseline["perplexity"],
        "ppl_delta_interval": intervals[0],
        "ppl_delta_pct_interval": intervals[1],
    }


def _intervals(
    result: dict[str, Any], baseline: dict[str, Any], seed: int
) -> tuple[list[float] | None, list[float] | None]:
    """95 % bootstrap intervals of the difference in perplexity and of the same in per cent. Texts are drawn, the same
    ones for both, so how hard a text is drops out of the second almost altogether."""
    import numpy as np

    count = len(result["samples"])
    if count < 3:
        return None, None
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    with np.errstate(over="ignore", invalid="ignore"):
        means = []
        for one in (result, baseline):
            nll = np.array([float(cell["nll"]) for cell in one["samples"]])
            tokens = np.array([cell["tokens"] for cell in one["samples"]])
            means.append(nll[drawn].sum(1) / tokens[drawn].sum(1))
        ends = [0.025, 0.975]
        delta = np.quantile(np.exp(means[0]) - np.exp(means[1]), ends)
        per_cent = np.quantile(100 * np.expm1(means[0] - means[1]), ends)
    return delta.tolist(), per_cent.tolist()


def _off_target(result: dict[str, Any], about: dict[str, Any]) -> list[str]:
    measured = result["compression_stats"]["avg_compression_ratio"]
    if about["kind"] != "ratio" or abs(measured - about["asked"]) <= _OFF_TARGET:
        return []
    return [
        f"{result['method_name']}: asked to remove {about['asked']:.0%}, removed {measured:.0%} as measured (what it "
        "protects, or its own rule, decides)."
    ]
