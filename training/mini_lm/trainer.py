"""The training loop: runs the stages in order, writes checkpoints and a log, resumes where it stopped."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixture import ANSWER, KINDS, Mixture
from muon import Muon
from network import MiniLM, load_checkpoint, save_checkpoint
from stages import Stage

MATRIX_RATE = 0.02
EMBEDDING_RATE = 0.03  # times the size of the embeddings at the start
GAIN_RATE = 1e-3
WARM_UP = 60  # steps
Measure = Callable[[MiniLM], dict[str, float]]


class Trainer:
    """Holds the model, its optimizers and the place reached in the curriculum."""

    def __init__(self, model: MiniLM, mixture: Mixture, folder: Path, device: str = "cpu") -> None:
        self.model, self.mixture, self.folder, self.device = model.to(device), mixture, folder, device
        matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n != "embed.weight"]
        gains = [p for p in model.parameters() if p.dim() != 2]
        self.muon = Muon(matrices)
        size = model.embed.weight.detach().square().mean().sqrt().item()
        groups = [
            {"params": [model.embed.weight], "peak": EMBEDDING_RATE * size},
            {"params": gains, "peak": GAIN_RATE},
        ]
        self.adam = torch.optim.AdamW(groups, lr=EMBEDDING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.step, self.tokens, self.stage, self.stage_tokens = 0, 0, 0, 0

    # -- checkpoints -----------------------------------------------------------------------------------

    def save(self, name: str) -> None:
        progress = {k: getattr(self, k) for k in ("step", "tokens", "stage", "stage_tokens")}
        save_checkpoint(
            self.folder / f"{name}.pt",
            self.model,
            muon=self.muon.state(),
            adam=self.adam.state_dict(),
            texts=self.mixture.state(),
            progress=progress,
        )

    def resume(self, path: Path) -> None:
        model, saved_any = load_checkpoint(path)
        saved: dict[str, Any] = dict(saved_any)
        self.model.load_state_dict(model.state_dict())
        self.muon.restore(saved["muon"])
        self.adam.load_state_dict(saved["adam"])
        self.mixture.restore(saved["texts"])
        for name, value in saved["progress"].items():
            setattr(self, name, value)

    # -- one step --------------------------------------------------------------------------------------

    def losses(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Loss of the tokens with a weight, as one row; the others skip the output matrix."""
        hidden, targets, known = self.model(ids[:, :-1]), ids[:, 1:], weights[:, 1:] > 0
        logits = torch.nn.functional.linear(hidden[known], self.model.embed.weight).float()
        return torch.nn.functional.cross_entropy(logits, targets[known], reduction="none")

    def train_step(self, stage: Stage) -> tuple[np.ndarray[Any, Any], Tensor, Tensor]:
        """One update; returns the kinds of the examples, loss per token (zero where none) and the weights."""
        draw = np.random.default_rng((self.mixture.seed, self.step, 1))
        lengths, chances = zip(*stage.lengths, strict=True)
        length = int(draw.choice(lengths, p=np.array(chances) / sum(chances)))
        kinds, ids_np, weights_np = self.mixture.batch(self.step, stage.batch_tokens // length, length, stage.shares)
        ids, weights = torch.from_numpy(ids_np).to(self.device), torch.from_numpy(weights_np).to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.startswith("cuda")):
            losses = self.losses(ids, weights)
        known = weights[:, 1:] > 0
        used = weights[:, 1:][known]
        ((losses * used).sum() / used.sum()).backward()
        done = self.stage_tokens / stage.tokens
        scale = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * min(1.0, done)
        scale *= min(1.0, (self.step + 1) / WARM_UP)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * scale
        self.adam.step()
        self.muon.step(MATRIX_RATE * scale)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += kinds.size * length
        self.stage_tokens += kinds.size * length
        table = torch.zeros_like(weights[:, 1:])
        table[known] = losses.detach()
        return kinds, table, weights[:, 1:]

    # -- the whole run ---------------------------------------------------------------------------------

    def run(
        self,
        stages: tuple[Stage, ...],
        measure: Measure,
        log: Path,
        every: int = 100_000,
        tests: int = 800_000,
    ) -> None:
        """Trains through all stages: a line every ``every`` tokens, test and checkpoint every ``tests``."""
        total = sum(stage.tokens for stage in stages)
        next_line, next_test = self.tokens + every, self.tokens + tests
        seen: dict[str, list[float]] = defaultdict(list)
        clock, clock_tokens = time.perf_counter(), self.tokens
        while self.stage < len(stages):
            stage = stages[self.stage]
            while self.stage_tokens < stage.tokens:
                kinds, losses, weights = self.train_step(stage)
                for index, kind in enumerate(KINDS):
                    rows = torch.from_numpy(kinds == index).to(losses.device)
                    chosen = weights[rows] > 0 if kind == "prose" else weights[rows] == ANSWER
                    if chosen.any():
                        seen[kind].append(losses[rows][chosen].mean().item())
                if self.tokens >= next_line:
                    rate = (self.tokens - clock_tokens) / (time.perf_counter() - clock)
                    line: dict[str, Any] = {"stage": stage.name, "step": self.step, "tokens": self.tokens}
                    line |= {
                        "tokens_per_second": round(rate),
                        "minutes_left": round((total - self.tokens) / rate / 60, 1),
                    }
                    line |= {kind: round(float(np.mean(values)), 3) for kind, values in sorted(seen.items())}
                    seen.clear()
                    next_line += every
                    if self.tokens >= next_test:
                        next_test += tests
                        self.save("latest")
                        line |= measure(self.model)
                    self.write(log, line)
                    clock, clock_tokens = time.perf_counter(), self.tokens
            self.stage, self.stage_tokens = self.stage + 1, 0
            self.save("latest")
            self.save(f"stage-{self.stage}-{stage.name}")
            self.write(log, {"finished": stage.name, "step": self.step, "tokens": self.tokens, **measure(self.model)})

    @staticmethod
    def write(log: Path, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with log.open("a") as handle:
            handle.write(text + "\n")
