"""The training loop: text alone until look-ups work, then clips; a log, checkpoints, going on after a stop."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kvsieve.dialogue.assembly import COLOURS, PLACES, SHAPES
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration

from clips import IGNORED, Batch, batch
from settings import Recipe

sys.path.append(str(Path(__file__).resolve().parents[1] / "mini_lm"))

from muon import Muon

FIRST_LEVEL = 2
PATIENCE = 25  # steps on a level before its accuracy counts


class Trainer:
    """Holds the model, its optimizer and how far it has come.

    Text steps go up in levels, the longest task they contain; pictures come after the last level.
    """

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        words: PreTrainedTokenizerFast,
        recipe: Recipe,
        folder: Path,
        seed: int,
    ) -> None:
        self.model, self.words, self.recipe, self.folder, self.seed = model.train(), words, recipe, folder, seed
        self.at = {"step": 0, "video": 0, "level": FIRST_LEVEL, "since": 0, "text_done": 0}
        self.running: dict[str, float] = {}
        blocks = {"text": model.model.text_model.layers, "vision": model.model.vision_model.encoder}
        self.muon = {name: Muon([p for p in part.parameters() if p.dim() == 2]) for name, part in blocks.items()}
        chosen = {id(p) for muon in self.muon.values() for p in muon.matrices}
        self.counter = nn.Linear(model.config.text_config.hidden_size, PLACES + 1)  # only teaches; not in the model
        nn.init.zeros_(self.counter.weight)
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.adam = torch.optim.AdamW(
            [*rest, *self.counter.parameters()], lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        token = words.convert_tokens_to_ids
        self.groups = {
            "silent": torch.tensor([token("<silent>")]),
            "speak": torch.tensor([token("Assistant:")]),
            "number": torch.tensor([token(str(i)) for i in range(PLACES + 1)]),
            "colour": torch.tensor([token(c) for c in COLOURS]),
            "shape": torch.tensor([token(s) for s in SHAPES]),
            "end": torch.tensor([token("<end_of_utterance>"), token("done")]),
        }

    def save(self) -> None:
        """Written beside and moved into place, so that a stop in between loses nothing."""
        saved = {"model": self.model.state_dict(), "adam": self.adam.state_dict(), "at": self.at}
        saved |= {"counter": self.counter.state_dict()}
        saved |= {"muon": {name: muon.state() for name, muon in self.muon.items()}, "running": self.running}
        torch.save(saved, self.folder / "latest.part")
        (self.folder / "latest.part").replace(self.folder / "latest.pt")

    def resume(self) -> None:
        saved = torch.load(self.folder / "latest.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        for name, muon in self.muon.items():
            muon.restore(saved["muon"][name])
        self.adam.load_state_dict(saved["adam"])
        self.counter.load_state_dict(saved["counter"])
        self.at, self.running = saved["at"], saved["running"]

    def loss(self, data: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted cross-entropy, the labels, and the predictions."""
        model, extra = self.model.model, torch.zeros(())
        embeddings = model.text_model.get_input_embeddings()(data.ids)
        if data.frames is not None:
            pixels = torch.from_numpy(data.frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            features = model.get_image_features(pixels[:, None], return_dict=True).pooler_output
            where = (data.ids == self.model.config.image_token_id)[..., None]
            pictures = torch.cat(list(features))
            embeddings = embeddings.masked_scatter(where, pictures)
            counted = self.counter(pictures)
            extra = self.recipe.counting * F.cross_entropy(counted, data.placed)
            self._note("counted", (counted.argmax(-1) == data.placed).float().mean().item())
        hidden = model.text_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        learned = data.labels[:, 1:] != IGNORED
        labels, weights = data.labels[:, 1:][learned], data.weights[:, 1:][learned]
        logits = self.model.lm_head(hidden[:, :-1][learned])
        each = F.cross_entropy(logits, labels, reduction="none")
        return (each * weights).sum() / weights.sum() + extra, labels, logits.detach().argmax(-1)

    def next_batch(self) -> Batch:
        """What this step trains on."""
        at, recipe = self.at, self.recipe
        rng = random.Random(self.seed * 1_000_003 + at["step"])
        clip = None
        if at["text_done"] and rng.random() >= recipe.text_share:
            early = at["video"] < recipe.steps / 2
            clip = rng.choices(recipe.clips, recipe.early if early else recipe.late)[0]
        longest = PLACES if at["text_done"] else at["level"]
        return batch(self.words, recipe, self.seed, at["step"], clip, longest, at["video"] >= recipe.steps)

    def train_step(self) -> None:
        """One update."""
        at, data = self.at, self.next_batch()
        loss, labels, predicted = self.loss(data)
        self.model.zero_grad(set_to_none=True)
        self.counter.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {at['step']}: the gradient is not finite")
        factor = self.recipe.rate_at(at["step"], at["video"])
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate * factor
        self.adam.step()
        for name, muon in self.muon.items():
            if name == "text" or data.frames is not None:
                muon.step(self.recipe.matrix_rate * factor)
        right = (predicted == labels).float()
        self._note("loss", loss.item())
        for name, tokens in self.groups.items():
            chosen = torch.isin(labels, tokens)
            if bool(chosen.any()):
                self._note(name if data.frames is not None else f"text_{name}", right[chosen].mean().item())
        at["step"] += 1
        if at["text_done"]:
            at["video"] += 1
        else:
            self._level_up()

    def _note(self, name: str, value: float) -> None:
        self.running[name] = 0.96 * self.running.get(name, value) + 0.04 * value

    def _level_up(self) -> None:
        at = self.at
        accuracy = self.running["text_colour"]  # the shape, which stands behind it, follows on a later level
        if at["step"] - at["since"] >= PATIENCE and accuracy > (0.85 if at["level"] < PLACES else 0.97):
            if at["level"] < PLACES:
                at["level"], at["since"] = at["level"] + 1, at["step"]
                self.running["text_colour"] = 0.5
            else:
                at["text_done"] = at["step"]
        if at["step"] >= self.recipe.text_limit:
            at["text_done"] = at["step"]

    def run(self, stop: int | None = None, every: int = 25, save_seconds: float = 180) -> None:
        """Train to the end of the recipe, or to step `stop`."""
        begun = saved = time.monotonic()
        first = self.at["step"]
        while self.at["video"] < self.recipe.steps + self.recipe.polish and (stop is None or self.at["step"] < stop):
            self.train_step()
            now = time.monotonic()
            if self.at["step"] % every == 0:
                pace = (now - begun) / (self.at["step"] - first)
                self.write(self.at | {"pace": round(pace, 3), "cpu_minutes": round(time.process_time() / 60, 2)}
                           | {name: round(value, 4) for name, value in self.running.items()})  # fmt: skip
            if now - saved > save_seconds:
                self.save()
                saved = now
        self.save()

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as handle:
            handle.write(text + "\n")
