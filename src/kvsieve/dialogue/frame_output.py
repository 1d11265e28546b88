"""What happened at every frame of a video, and the same for a whole video."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .context import StreamContext
from .predictions import Summary, VideoPrediction
from .records import Utterance, VideoRecord

__all__ = ["FrameOutput", "prediction_of"]


@dataclass(frozen=True)
class FrameOutput:
    """What happened at one frame.

    Attributes:
        gen: what was said; empty for silence.
        ref: what was to be said at this frame, lines joined by a space; empty for silence.
        frame_idx_in_stream: from 0.
        timestamp_in_stream: seconds on the clock of the video.
        silence: probability that the model gave to silence; None where it was not asked.
        cache_tokens: tokens in the cache after the frame.
        seconds: time that the frame took, reply and reductions included.
        events: reductions of the cache in front of this frame.
        summaries: summaries written in front of this frame.
    """

    gen: str
    ref: str
    frame_idx_in_stream: int
    timestamp_in_stream: float
    silence: float | None = None
    cache_tokens: int = 0
    seconds: float = 0.0
    events: tuple[Mapping[str, Any], ...] = ()
    summaries: tuple[Summary, ...] = ()


def prediction_of(record: VideoRecord, outputs: Sequence[FrameOutput], context: StreamContext) -> VideoPrediction:
    """A video that was watched to its end, for files and scores, with `numbers` on time and memory.

    Args:
        record: the video.
        outputs: one for every frame, at least one.
        context: what it was watched in.
    """
    spoken = tuple(Utterance(one.timestamp_in_stream, one.gen, one.frame_idx_in_stream) for one in outputs if one.gen)
    asked = [one.silence for one in outputs if one.silence is not None]
    numbers = {
        "cache_compressions": context.compressions,
        "avg_cache_size": float(np.mean([one.cache_tokens for one in outputs])),
        "max_cache_size": context.largest,
        "cache_bytes": context.bytes_largest,
        "time_per_frame": float(np.mean([one.seconds for one in outputs])),
        "median_time_per_frame": float(np.median([one.seconds for one in outputs])),
        "peak_memory_mb": _peak_memory(context.vlm.model.device),
        "tokens_fed": context.fed,
        "mean_silence": float(np.mean(asked)) if asked else None,
    }
    return VideoPrediction(
        video_id=record.video_id,
        key=record.key,
        fps=record.fps,
        dataset=record.dataset,
        frames=len(outputs),
        spoken=spoken,
        references=record.references,
        summaries=tuple(summary for one in outputs for summary in one.summaries),
        events=tuple(event for one in outputs for event in one.events),
        cache_tokens=tuple(one.cache_tokens for one in outputs),
        numbers=numbers,
    )


def _peak_memory(device: torch.device) -> float | None:
    """MB: the most that was allocated on an accelerator, else the most that the process has held, where the system
    tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
