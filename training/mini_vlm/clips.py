"""Training examples: token ids, what is to be predicted and how much it weighs, frames."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from kvsieve.dialogue.assembly import PLACES, REQUEST, SYSTEM, AssemblyVideo, Task
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from settings import Clip, Recipe

IGNORED = -100


class Batch(NamedTuple):
    """`ids`, `labels` and `weights` `[rows, tokens]`; `frames` `[frames, 48, 48, 3]` uint8 in the order of the image
    tokens, or None; `placed` `[frames]`: parts in place."""

    ids: Tensor
    labels: Tensor
    weights: Tensor
    frames: np.ndarray | None
    placed: Tensor


@dataclass
class Example:
    """One sequence while it is put together. A label stands at the token it is about."""

    words: PreTrainedTokenizerFast
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)

    def add(self, text: str, weight: float = 0.0) -> None:
        """Append text; it is learned if it weighs something."""
        new = self.words(text, add_special_tokens=False).input_ids
        self.ids += new
        self.labels += new if weight else [IGNORED] * len(new)
        self.weights += [weight] * len(new)


def instructed(example: Example, task: Task) -> None:
    """The opening of a conversation."""
    example.add(f"<|im_start|>System: {SYSTEM}<end_of_utterance>\nUser: {task.instruction}<end_of_utterance>\n")


def resumed(example: Example, task: Task, done: int) -> None:
    """The opening after a summary."""
    example.add(f"<|im_start|>System: {SYSTEM} {task.summary(done)}<end_of_utterance>\n")


def summarized(example: Example, task: Task, done: int, weight: float) -> None:
    """A request for a summary, and the summary."""
    example.add(f"System: {REQUEST}<end_of_utterance>\n")
    example.add(f"Assistant: {task.summary(done)}<end_of_utterance>\n", 1.0)
    example.weights[-2] = weight  # the number of steps done, before the end of the utterance


def text_example(
    words: PreTrainedTokenizerFast, rng: random.Random, longest: int, cut: bool = False, lines: int = 10
) -> Example:
    """An instruction and lines about steps in any order: what to look up, without pictures. `cut`: of any length."""
    task = Task.draw(rng, rng.randint(4 if cut else max(2, min(6, longest - 2)), longest))
    steps, example = len(task.parts), Example(words)
    if rng.random() < 0.6:
        instructed(example, task)
    else:
        resumed(example, task, rng.randint(0, steps - 1))
    done = 0
    for _ in range(lines):
        done = steps if rng.random() < 0.12 else rng.randint(1, steps - 1)
        at = len(example.ids)
        example.add(f"Assistant: {task.line(done)}<end_of_utterance>\n", 1.0)
        example.labels[at] = example.labels[at + 2] = IGNORED  # whether to speak, and of which step, pictures decide
    if rng.random() < 0.5:
        summarized(example, task, done, 1.0)
    return example


def video_example(
    words: PreTrainedTokenizerFast, rng: random.Random, seed: int, clip: Clip, recipe: Recipe, cut: bool = False
) -> Example:
    """A clip: every frame is followed by silence or by the line that is due. `cut`: it ends at a random frame, and
    short tasks are as frequent as long ones."""
    steps = rng.randint(4, PLACES)
    if not cut:
        steps = max(steps, rng.randint(4, PLACES))  # long tasks have entries that are seldom needed
    start = rng.randint(0, steps - 1) if rng.random() < recipe.mid_task else 0
    video = AssemblyVideo(seed, steps, clip.gap, start, tail=rng.randint(2, 12))
    task, example = video.task, Example(words)
    kind = rng.random()
    known = kind >= recipe.unknown
    if not known:
        example.add(rng.choice(("<silent>", "<end_of_utterance>", f"<|im_start|>System: {SYSTEM}<end_of_utterance>")))
    elif kind < recipe.unknown + recipe.resumed:
        resumed(example, task, rng.randint(0, start) if rng.random() < recipe.stale else start)
    else:
        instructed(example, task)
    done, count = start, min(clip.frames, len(video.frames))
    if cut:
        count = rng.randint(1, count)
    wrong = rng.randrange(count) if rng.random() < recipe.mistake else None
    for index, frame in enumerate(video.frames[:count]):
        example.add("<image>")
        example.frames.append(frame)
        done = video.events.get(index, done)
        example.placed.append(done)
        line = task.line(done) if known else f"step {done} done"
        if index in video.events:
            example.add(f"Assistant: {line}<end_of_utterance>\n", 1.0)
        elif index == wrong:
            line = task.line(min(done + 1, steps)) if known else f"step {done + 1} done"
            example.add(f"Assistant: {line}<end_of_utterance>\n")
        else:
            example.add("<silent>", recipe.silence_weight)
    if known and rng.random() < (recipe.late_summary if cut else recipe.summary):
        summarized(example, task, done, recipe.progress_weight)
    return example


def collate(examples: list[Example], pad: int) -> Batch:
    """Rows padded on the right."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    labels, weights = torch.full_like(ids, IGNORED), torch.zeros(ids.shape)
    for row, example in enumerate(examples):
        count = len(example.ids)
        ids[row, :count] = torch.tensor(example.ids)
        labels[row, :count] = torch.tensor(example.labels)
        weights[row, :count] = torch.tensor(example.weights)
    frames = [frame for example in examples for frame in example.frames]
    placed = torch.tensor([count for example in examples for count in example.placed])
    return Batch(ids, labels, weights, np.stack(frames) if frames else None, placed)


def batch(
    words: PreTrainedTokenizerFast,
    recipe: Recipe,
    seed: int,
    step: int,
    clip: Clip | None,
    longest: int,
    cut: bool = False,
) -> Batch:
    """The examples of one step: of clips, or of text alone; see `video_example` for `cut`."""
    examples = []
    for row in range(recipe.text_batch if clip is None else clip.batch):
        number = (seed + 1) * 100_000_000 + step * 64 + row  # stays below the seeds held out
        rng = random.Random(number)
        examples.append(
            text_example(words, rng, longest, cut)
            if clip is None
            else video_example(words, rng, number, clip, recipe, cut)
        )
    return collate(examples, words.pad_token_id)
