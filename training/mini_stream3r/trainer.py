"""The training loop: one update per step, a log, checkpoints, and going on where an earlier call stopped."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "mini_lm"))

from kvsieve.geometry.model import STream3R
from muon import Muon

from data import Batch, batches
from losses import losses
from network import predict
from settings import Recipe

NARROW = 8  # what has fewer rows is a list of tokens, not a matrix
LIMIT = 1.0  # on the norm of the gradient of what AdamW steps


class Trainer:
    """Holds the model, its optimizers and the number of steps done."""

    def __init__(self, model: STream3R, recipe: Recipe, folder: Path, seed: int) -> None:
        self.model, self.recipe, self.folder, self.seed, self.step = model.train(), recipe, folder, seed, 0
        named = [(n, p) for n, p in model.named_parameters() if n != "aggregator.patch_embed.mask_token"]
        heads = [p for n, p in named if not n.startswith("aggregator.")]
        trunk = [p for n, p in named if n.startswith("aggregator.")]
        self.wide = [p for p in trunk if p.dim() >= 2 and p.shape[0] >= NARROW]
        chosen = {id(p) for p in self.wide}
        vectors = [p for p in trunk if id(p) not in chosen]
        # Muon sees the kernel that reads the patches as a matrix, over the same memory
        self.muon = Muon([p.detach().flatten(1) for p in self.wide])
        groups = [{"params": vectors, "peak": recipe.vector_rate}, {"params": heads, "peak": recipe.head_rate}]
        self.adam = torch.optim.AdamW(groups, lr=recipe.head_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.others = [*vectors, *heads]
        width = model.config["embed_dim"]
        self.shift = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))  # only teaches; not part of the model
        nn.init.zeros_(self.shift[1].weight)
        self.shift_adam = torch.optim.AdamW(self.shift.parameters(), lr=recipe.head_rate, weight_decay=0.0)

    def save(self, name: str = "latest") -> None:
        """Written beside and moved into place, so that a stop in between loses nothing."""
        saved = {"model": self.model.state_dict(), "config": self.model.config, "step": self.step}
        saved |= {"muon": self.muon.state(), "adam": self.adam.state_dict()}
        saved |= {"shift": self.shift.state_dict(), "shift_adam": self.shift_adam.state_dict()}
        torch.save(saved, self.folder / f"{name}.part")
        (self.folder / f"{name}.part").replace(self.folder / f"{name}.pt")

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.muon.restore(saved["muon"])
        self.adam.load_state_dict(saved["adam"])
        self.step = saved["step"]
        self.shift.load_state_dict(saved["shift"])
        self.shift_adam.load_state_dict(saved["shift_adam"])

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update; returns the losses before it."""
        frames = batch["images"].shape[1]
        draw = np.random.default_rng((self.seed, self.step, 1))
        point_frames = torch.from_numpy(np.sort(draw.choice(frames, (frames + 1) // 2, replace=False)))
        out = predict(self.model, batch["images"], point_frames)
        out["shift"] = self.shift(out["tokens"])
        parts = losses(out, batch, point_frames, self.model.patch_size, self.recipe)
        parts["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.others, LIMIT)
        if not torch.isfinite(norm + parts["total"]):
            raise FloatingPointError(f"step {self.step}: the loss or its gradient is not finite")
        rate = self.recipe.rate_at(self.step)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * rate
        self.adam.step()
        self.shift_adam.step()
        self.shift_adam.zero_grad()
        for matrix, weight in zip(self.muon.matrices, self.wide, strict=True):
            matrix.grad = weight.grad.flatten(1)
        self.muon.step(self.recipe.matrix_rate * rate)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return {name: value.item() for name, value in parts.items()}

    def run(
        self,
        measure: Callable[[STream3R], dict[str, Any]],
        stop: int | None = None,
        workers: int = 0,
        every: int = 20,
        save_seconds: float = 180,
        measure_seconds: float = 600,
    ) -> None:
        """Train to the end of the recipe or to step `stop`; a line in the log every `every` steps."""
        seen: dict[str, list[float]] = defaultdict(list)
        begun = saved = measured = time.monotonic()
        first, end = self.step, min(self.recipe.steps, stop or self.recipe.steps)
        side = self.model.config["img_size"]
        for batch in batches(self.recipe, self.seed, side, self.step, workers):
            if self.step >= end:
                break
            for name, value in self.train_step(batch).items():
                seen[name].append(value)
            now = time.monotonic()
            if self.step % every == 0 or self.step == end:
                pace = (now - begun) / (self.step - first)
                line: dict[str, Any] = {"step": self.step, "seconds_per_step": round(pace, 3)}
                line["minutes_left"] = round((self.recipe.steps - self.step) * pace / 60, 1)
                line |= {name: round(float(np.mean(values)), 4) for name, values in seen.items()}
                seen.clear()
                self.write(line)
            if now - saved > save_seconds:
                self.save()
                saved = now
            if now - measured > measure_seconds:
                self.write({"step": self.step, "held_out": measure(self.model)})
                measured = time.monotonic()
        self.save()
        self.write({"step": self.step, "held_out": measure(self.model)})

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as handle:
            handle.write(text + "\n")
