"""Dialogue over streamed video under a context budget: records, predictions, matching and metrics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assembly import AssemblyVideo
    from .baseline import BaselineGenerator
    from .factory import ContextStrategyFactory, PolicyStrategy, register_strategy
    from .frame_output import FrameOutput
    from .frames import Frames, open_frames
    from .matching import Matching, Pair, Window, assign, get_window, match
    from .metrics import Difference, Interval, PooledScore, VideoScore, difference, pool, score_video
    from .page import write_timeline_page
    from .predictions import Predictions, Summary, VideoPrediction, read_predictions, write_predictions
    from .records import Substep, Turn, Utterance, VideoRecord, parse_record, read_records
    from .results import ResultFiles, RunnerNumbers, metrics_table, write_metrics
    from .run import run_dialogue
    from .runner import VLMStreamRunner
    from .similarity import get_similarity, list_similarities, register_similarity, sentence_encoder
    from .strategies import BaseContextStrategy, DropAll, DropMiddle, KeepNothing, SummarizeAndDrop
    from .timeline import draw_timeline
    from .vlm import VisionLanguageModel

__all__ = [
    "AssemblyVideo",
    "BaseContextStrategy",
    "BaselineGenerator",
    "ContextStrategyFactory",
    "Difference",
    "DropAll",
    "DropMiddle",
    "FrameOutput",
    "Frames",
    "Interval",
    "KeepNothing",
    "Matching",
    "Pair",
    "PolicyStrategy",
    "PooledScore",
    "Predictions",
    "ResultFiles",
    "RunnerNumbers",
    "Substep",
    "SummarizeAndDrop",
    "Summary",
    "Turn",
    "Utterance",
    "VLMStreamRunner",
    "VideoPrediction",
    "VideoRecord",
    "VideoScore",
    "VisionLanguageModel",
    "Window",
    "assign",
    "difference",
    "draw_timeline",
    "get_similarity",
    "get_window",
    "list_similarities",
    "match",
    "metrics_table",
    "open_frames",
    "parse_record",
    "pool",
    "read_predictions",
    "read_records",
    "register_similarity",
    "register_strategy",
    "run_dialogue",
    "score_video",
    "sentence_encoder",
    "write_metrics",
    "write_predictions",
    "write_timeline_page",
]

_LAZY = {
    name: module
    for module, names in {
        "assembly": ("AssemblyVideo",),
        "baseline": ("BaselineGenerator",),
        "frames": ("Frames", "open_frames"),
        "page": ("write_timeline_page",),
        "run": ("run_dialogue",),
        "frame_output": ("FrameOutput",),
        "runner": ("VLMStreamRunner",),
        "factory": ("ContextStrategyFactory", "PolicyStrategy", "register_strategy"),
        "strategies": ("BaseContextStrategy", "DropAll", "DropMiddle", "KeepNothing", "SummarizeAndDrop"),
        "timeline": ("draw_timeline",),
        "vlm": ("VisionLanguageModel",),
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
