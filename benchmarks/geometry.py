"""What eviction costs a stream of frames, and what it saves. Three sections, each in one run:

overhead   seconds of a frame with layer-wise eviction / seconds of a frame over a plain cache of as many tokens.
           Random weights, two sizes; medians of alternating frames, and their quartiles.
scratch    peak memory of one layer's attention with its scores, against attention alone, at 20,820 tokens
           (1,041 new ones, 16 heads of 64: the published model after 20 frames of 518 x 392). Every variant runs in
           a process of its own; what is compared is how far its resident memory rises.
endless    the bundled model over thousands of frames under a fixed token budget, beside the same stream with
           nothing evicted: bytes of the cache, memory of the process, seconds per frame. Writes a picture.

python benchmarks/geometry.py overhead scratch endless --output benchmarks/geometry
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import kvsieve
from kvsieve import get_policy
from kvsieve.geometry import STream3R, StreamSession, render_sequence

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "img_size": 224, "embed_dim": 192, "num_heads": 4, "depth": 4, "encoder_depth": 4, "camera_depth": 2,
        "camera_num_heads": 4, "dpt_features": 64, "dpt_out_channels": [32, 64, 128, 128], "dpt_layers": [0, 1, 2, 3],
    },
    "wide": {
        "img_size": 518, "embed_dim": 512, "num_heads": 8, "depth": 4, "encoder_depth": 4, "camera_depth": 2,
        "camera_num_heads": 8, "dpt_features": 64, "dpt_out_channels": [64, 128, 256, 256], "dpt_layers": [0, 1, 2, 3],
    },
}  # fmt: skip
FRAMES = {"small": ((168, 224), 24, 12), "wide": ((294, 518), 8, 6)}
"""Height and width of the images, frames held, frames timed."""


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def overhead(name: str) -> dict[str, Any]:
    """Alternate: a frame over a plain cache of K tokens (a copy of one stream), a frame that is followed by eviction
    to K tokens."""
    torch.manual_seed(0)
    model = STream3R(**SIZES[name]).eval()
    (height, width), held, timed = FRAMES[name]
    images = torch.rand(held + timed + 1, 3, height, width)
    tokens = model.tokens_per_frame(height, width)
    plain = StreamSession(model, predictions="last")
    evicting = StreamSession(model, policy=get_policy("evict3r", budget=held * tokens), predictions="last")
    for image in images[:held]:
        plain.forward_stream(image[None])
        evicting.forward_stream(image[None])
    evicting.forward_stream(images[held][None])
    seconds: dict[str, list[float]] = {"plain": [], "evict3r": []}
    for image in images[held + 1 :]:
        before = plain.memory.__dict__ | {}
        kept = [(core, core.store.n, core.seen) for core in (*plain.memory.trunk, *plain.memory.camera)]
        for key, session in (("plain", plain), ("evict3r", evicting)):
            start = time.perf_counter()
            session.forward_stream(image[None])
            seconds[key].append(time.perf_counter() - start)
        for core, n, seen in kept:  # the plain cache goes back to K tokens
            core.store.n, core.seen = n, seen
        plain.memory.frames = before["frames"]
    ratios = [e / p for e, p in zip(seconds["evict3r"], seconds["plain"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "size": name, "tokens_per_frame": tokens, "tokens_held": held * tokens, "frames_timed": timed,
        "plain_s": statistics.median(seconds["plain"]), "evict3r_s": statistics.median(seconds["evict3r"]),
        "ratio": statistics.median(ratios), "ratio_quartiles": [quartiles[0], quartiles[2]],
    }  # fmt: skip


SCRATCH = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention
from kvsieve.attention import attend_and_count
torch.set_num_threads(1)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 16, n, 64) for n in (1041, 20820, 20820))
small = [x[:, :, :64] for x in (q, k, v)]
scaled_dot_product_attention(*small); attend_and_count(*small)
# the high-water mark of this program alone: what getrusage tells is inherited from the process that started it
peak = lambda: 1024 * int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])
before = peak()
if sys.argv[1] == "attention":
    out = scaled_dot_product_attention(q, k, v)
elif sys.argv[1] == "attention_and_scores":
    out, mass = attend_and_count(q, k, v)
else:
    p = (q @ k.transpose(-1, -2) / 8).softmax(-1); mass = p.sum(2); out = p @ v
print(peak() - before)
"""


def scratch() -> dict[str, Any]:
    """Rise of peak resident memory in MiB, every variant in a fresh process."""
    rows = {}
    for name in ("attention", "attention_and_scores", "full_matrix"):
        found = subprocess.run([sys.executable, "-c", SCRATCH, name], capture_output=True, text=True, check=True)
        rows[name] = int(found.stdout) / 2**20
    return {"rise_mib": rows, "scores_over_attention_mib": rows["attention_and_scores"] - rows["attention"]}


def endless(frames: int, full_frames: int, budget: int, output: Path) -> dict[str, Any]:
    """The two streams one after the other, over scenes that follow each other; the picture goes to `output`."""
    from kvsieve import zoo
    from kvsieve.geometry.plots import growth

    model: Any = zoo.load("mini-stream3r")
    side = model.config["img_size"]
    series: dict[str, dict[str, list[float]]] = {}
    summary: dict[str, Any] = {"budget": budget}
    for name, count, policy in (
        (f"evict3r, {budget} tokens per layer", frames, get_policy("evict3r", budget=budget)),
        ("nothing evicted", full_frames, None),
    ):
        session = StreamSession(model, policy=policy, predictions="last")
        row: dict[str, list[float]] = {"bytes": [], "seconds": [], "rss": []}
        scene: Any = None
        for i in range(count):
            if i % 50 == 0:
                scene = render_sequence(10_000_000 + i // 50, 50, (side, side)).images
            start = time.perf_counter()
            session.forward_stream(scene[i % 50][None])
            row["seconds"].append(time.perf_counter() - start)
            report = session.report()
            row["bytes"].append(report["bytes_held"] + report["camera"]["bytes_held"])
            row["rss"].append(rss())
            if i % 100 == 99:
                held, resident = row["bytes"][-1] / 1e6, row["rss"][-1] / 1e6
                print(f"{name}: frame {i + 1}, cache {held:.2f} MB, process {resident:.0f} MB", flush=True)
        series[name] = row
        late, early = statistics.median(row["seconds"][-200:]), statistics.median(row["seconds"][100:300])
        warm = 300
        summary[name] = {
            "frames": count,
            "bytes_last": row["bytes"][-1],
            "bytes_values_after_warm_up": len(set(row["bytes"][warm:])),
            "rss_last_over_warm": row["rss"][-1] / row["rss"][min(warm, count - 1)],
            "seconds_last_200_over_100_to_300": late / early,
        }
    picture = growth({name: {key: row[key] for key in ("bytes", "seconds")} for name, row in series.items()})
    (output / "growth.png").write_bytes(picture)
    return summary


def main() -> None:
    """Run the sections that were asked for and write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=["overhead", "scratch", "endless"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/geometry"))
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--full-frames", type=int, default=500)
    parser.add_argument("--budget", type=int, default=1024)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "kvsieve": kvsieve.__version__, "command": "python " + " ".join(sys.argv),
    }  # fmt: skip
    for section in arguments.sections:
        if section == "overhead":
            found: Any = [overhead(name) for name in SIZES]
        elif section == "scratch":
            found = scratch()
        elif section == "endless":
            found = endless(arguments.frames, arguments.full_frames, arguments.budget, arguments.output)
        else:
            parser.error(f"unknown section {section!r}")
        results[section] = {"run": about, "results": found}
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results[section], indent=2))


if __name__ == "__main__":
    main()
