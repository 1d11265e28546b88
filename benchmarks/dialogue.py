"""What a context strategy costs a stream of frames. Two sections, each in one run:

overhead   seconds of a frame with reductions / seconds of a frame without, at equal cache length: streams that are
           reduced whenever they are full alternate with streams that start afresh there; compared are frames at cache
           lengths that both have (medians), the time of the reductions shared out over the frames between them.
           Always silent, so that every frame is one forward pass. Bundled model, and a larger one with random weights.
endless    the bundled model over many thousand frames: tokens and bytes of the cache, memory of the process and
           seconds per frame, early and late.

python benchmarks/dialogue.py overhead endless --output benchmarks/dialogue
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvsieve
from kvsieve import zoo
from kvsieve.dialogue import DropMiddle, PolicyStrategy, VisionLanguageModel, VLMStreamRunner
from kvsieve.dialogue.assembly import HELD_OUT, SIDE, AssemblyVideo

SETTINGS: dict[str, int] = {"max_seq_len": 192, "reserved_seq_len": 24, "last_keep_len": 48}
LONG: dict[str, int] = {"max_seq_len": 512, "reserved_seq_len": 24, "last_keep_len": 192}


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def repeated(video: AssemblyVideo, count: int) -> Iterator[np.ndarray]:
    """The frames of a video, over and over."""
    return itertools.islice(itertools.cycle(video.frames), count)


def record(video: AssemblyVideo, count: int) -> dict[str, Any]:
    """A stream of `count` frames, opened with the video's instruction."""
    return video.record() | {"frames": repeated(video, count)}


def larger() -> VisionLanguageModel:
    """The bundled model's tokenizer with eight layers of width 512 and random weights."""
    from transformers import SmolVLMForConditionalGeneration

    small = zoo.load("mini-vlm")
    config = small.model.config.__class__.from_dict(small.model.config.to_dict())
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1408, 8
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 8, 2, 64
    torch.manual_seed(0)
    return VisionLanguageModel(SmolVLMForConditionalGeneration(config), small.tokenizer, small.processor)


def overhead(vlm: VisionLanguageModel, settings: dict[str, int], name: str, repeats: int) -> dict[str, Any]:
    """Alternate a stream that is reduced with streams that are cut where it would be."""
    video = AssemblyVideo(HELD_OUT, steps=10)
    silent: dict[str, Any] = {"max_new_tokens": 8, "not_talk_threshold": 0.0}
    full = VLMStreamRunner(vlm, context_strategy_type=PolicyStrategy("full"), **silent)
    reduced = VLMStreamRunner(vlm, context_strategy_type=DropMiddle(**settings), **silent)
    filled = settings["max_seq_len"] // 2  # frames of two tokens
    ratios: list[float] = []
    for _ in range(repeats):
        mine = list(reduced.stream(record(video, 4 * filled)))
        first = next(i for i, out in enumerate(mine) if out.events)
        last = max(i for i, out in enumerate(mine) if out.events)
        mine = mine[first:last]  # whole periods, so that every reduction is shared out over its frames
        low, high = min(out.cache_tokens for out in mine), max(out.cache_tokens for out in mine)
        theirs: list[Any] = []
        while len(theirs) < len(mine):
            again = full.stream(record(video, high // 2))
            theirs += [out for out in again if low <= out.cache_tokens <= high]
        events = [event["seconds"] for out in mine for event in out.events]
        shared_out = sum(events) / len(mine)
        per_frame = statistics.median(out.seconds for out in mine if not out.events) + shared_out
        plain = statistics.median(out.seconds for out in theirs)
        ratios.append(per_frame / plain)
    return {
        "model": name,
        **settings,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(value, 3) for value in ratios],
        "frame_ms": round(1000 * per_frame, 3),
        "plain_frame_ms": round(1000 * plain, 3),
        "reduction_ms_median": round(1000 * statistics.median(events), 3),
        "frames_per_reduction": round(len(mine) / len(events), 1),
        "cache_tokens": [low, high],
    }


def endless(frames: int) -> dict[str, Any]:
    """One stream, measured in ten parts."""
    vlm, video = zoo.load("mini-vlm"), AssemblyVideo(HELD_OUT, steps=10, gap=(20, 30))
    runner = VLMStreamRunner(vlm, context_strategy_type=DropMiddle(**SETTINGS), max_new_tokens=16)
    part, rows = frames // 10, []
    seconds: list[float] = []
    bytes_held, tokens = 0, 0
    for index, out in enumerate(runner.stream(record(video, frames)), 1):
        assert runner.context is not None
        seconds.append(out.seconds)
        tokens, bytes_held = max(tokens, runner.context.largest), max(bytes_held, runner.context.bytes)
        if index % part == 0:
            rows.append(
                {
                    "frames": index,
                    "median_ms": round(1000 * statistics.median(seconds), 3),
                    "mean_ms": round(1000 * statistics.fmean(seconds), 3),
                    "most_cache_tokens": tokens,
                    "most_cache_bytes": bytes_held,
                    "process_mib": round(rss() / 2**20, 1),
                    "reductions": runner.context.compressions,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            seconds, tokens, bytes_held = [], 0, 0
    return {"frames": frames, **SETTINGS, "parts": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=["overhead", "endless"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=20_000, help="of the endless stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "frame": SIDE,
        "torch": torch.__version__,
        "kvsieve": kvsieve.__version__,
    }
    if "overhead" in options.sections:
        results["overhead"] = [
            overhead(zoo.load("mini-vlm"), SETTINGS, "mini-vlm", options.repeats),
            overhead(larger(), LONG, "8 layers of width 512, random weights", options.repeats),
        ]
        print(json.dumps(results["overhead"], indent=1))
    if "endless" in options.sections:
        results["endless"] = endless(options.frames)
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
