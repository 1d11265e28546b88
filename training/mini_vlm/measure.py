"""Measures a model on held-out videos that fit into the length it was trained at, as the runner streams them.

    python training/mini_vlm/measure.py src/kvsieve/zoo/mini_vlm --videos 60 --seeds 0 1 2 --out measured.json

Nothing is dropped. Every video is watched from its first frame to its last; what the model said before stays in its
context, mistakes included. Then it is asked for a summary, at a frame drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from kvsieve.dialogue import PolicyStrategy, VisionLanguageModel, VLMStreamRunner, parse_record, pool
from kvsieve.dialogue.assembly import HELD_OUT, PLACES, REQUEST, AssemblyVideo
from kvsieve.dialogue.context import greedy

GAP = (2, 6)
"""Frames from one step to the next: ten steps and what is said make some 230 tokens."""
WINDOW = 0.5
"""Seconds a line may be off: one frame."""


def measure(vlm: VisionLanguageModel, videos: int, seed: int) -> dict[str, Any]:
    """Rates over held-out videos; `entries`: share of right lines by the number of the part they name."""
    runner = VLMStreamRunner(vlm, context_strategy_type=PolicyStrategy("full"), max_new_tokens=16)
    scores, named, right, summaries = [], Counter(), Counter(), 0
    tokens = 0
    for index in range(videos):
        number = HELD_OUT + 10_000 * (seed + 100) + index
        video = AssemblyVideo(number, steps=4 + index % (PLACES - 3), gap=GAP)
        record = parse_record(video.record())
        stop = random.Random(number).randrange(len(video.frames))
        spoken: dict[int, str] = {}
        for out in runner.stream(record):
            spoken[out.frame_idx_in_stream] = out.gen
            tokens = max(tokens, out.cache_tokens)
            if out.frame_idx_in_stream == stop:
                summaries += asked(runner) == video.task.summary(done_at(video, stop))
                break
        watched = runner.run_inference_on_video(record)["prediction"]
        scores.append(watched.score(window=WINDOW, similarity="exact"))
        said = {line.frame: line.text for line in watched.spoken}
        for frame, done in video.events.items():
            entry = min(done + 1, len(video.task.parts) + 1)
            name = "end" if entry > len(video.task.parts) else str(entry)
            named[name] += 1
            right[name] += said.get(frame) == video.task.line(done)
    pooled = pool(scores)
    found = {name: pooled.rates[name] for name in ("silence_accuracy", "timing_f1", "f1")}
    return {
        "seed": seed,
        "videos": videos,
        "lines": pooled.counts["references"],
        **found,
        "f1_interval": [pooled.intervals["f1"].low, pooled.intervals["f1"].high] if pooled.intervals["f1"] else None,
        "summaries_right": summaries / videos,
        "most_tokens": tokens,
        "entries": {name: round(right[name] / named[name], 3) for name in sorted(named, key=lambda n: (len(n), n))},
    }


def done_at(video: AssemblyVideo, frame: int) -> int:
    """Steps done when a frame is shown."""
    return max([video.start, *(done for at, done in video.events.items() if at <= frame)])


@torch.inference_mode()
def asked(runner: VLMStreamRunner) -> str:
    """The summary that the model gives now."""
    context, vlm = runner.context, runner.vlm
    assert context is not None
    logits = context.feed(vlm.encode(vlm.format.turn("system", REQUEST) + "Assistant:"))
    return vlm.decode(context.reply(logits, 48, greedy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported folder")
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vlm = VisionLanguageModel.load(options.model)
    rows = [measure(vlm, options.videos, seed) for seed in options.seeds]
    for row in rows:
        json.dump(row, sys.stdout)
        print()
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
