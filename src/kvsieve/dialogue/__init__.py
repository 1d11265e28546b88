"""Dialogue over streamed video under a context budget: records, predictions, matching and metrics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .matching import Matching, Pair, Window, assign, get_window, match
    from .metrics import Difference, Interval, PooledScore, VideoScore, difference, pool, score_video
    from .predictions import Predictions, Summary, VideoPrediction, read_predictions, write_predictions
    from .records import Substep, Turn, Utterance, VideoRecord, parse_record, read_records
    from .results import ResultFiles, RunnerNumbers, metrics_table, write_metrics
    from .similarity import get_similarity, list_similarities, register_similarity, sentence_encoder

__all__ = [
    "Difference",
    "Interval",
    "Matching",
    "Pair",
    "PooledScore",
    "Predictions",
    "ResultFiles",
    "RunnerNumbers",
    "Substep",
    "Summary",
    "Turn",
    "Utterance",
    "VideoPrediction",
    "VideoRecord",
    "VideoScore",
    "Window",
    "assign",
    "difference",
    "get_similarity",
    "get_window",
    "list_similarities",
    "match",
    "metrics_table",
    "parse_record",
    "pool",
    "read_predictions",
    "read_records",
    "register_similarity",
    "score_video",
    "sentence_encoder",
    "write_metrics",
    "write_predictions",
]

_LAZY = {
    name: module
    for module, names in {
        "matching": ("Matching", "Pair", "Window", "assign", "get_window", "match"),
        "metrics": ("Difference", "Interval", "PooledScore", "VideoScore", "difference", "pool", "score_video"),
        "predictions": ("Predictions", "Summary", "VideoPrediction", "read_predictions", "write_predictions"),
        "records": ("Substep", "Turn", "Utterance", "VideoRecord", "parse_record", "read_records"),
        "results": ("ResultFiles", "RunnerNumbers", "metrics_table", "write_metrics"),
        "similarity": ("get_similarity", "list_similarities", "register_similarity", "sentence_encoder"),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used."""
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
