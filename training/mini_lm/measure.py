"""Measurements of a mini-lm: perplexity on novels and on the language reference, retrieval, copying."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

import corpus
from mixture import Mixture

LossesAndGuesses = tuple[Tensor, Tensor]
Scorer = Callable[[Tensor], Tensor]  # token ids [batch, length] -> logits [batch, length, vocab]
BUCKETS = ((0, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2048))
FACTS = 6  # facts in a retrieval text; one of them is asked for


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


@torch.no_grad()
def score(scorer: Scorer, rows: NDArray[np.int64], tokens_at_once: int = 8192) -> LossesAndGuesses:
    """Loss and most likely token for everything after the first column, [rows, length - 1] each."""
    losses, guesses = [], []
    size = max(1, tokens_at_once // rows.shape[1])
    for start in range(0, len(rows), size):
        ids = torch.from_numpy(rows[start : start + size])
        logits = scorer(ids[:, :-1]).float().cpu()
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1))
        guesses.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(guesses)


def windows(texts: Mapping[str, NDArray[np.int64]], length: int, count: int, bos: int = 0) -> NDArray[np.int64]:
    """BOS and ``length`` tokens each, spread evenly over the texts (at most ``count``, without overlap)."""
    chosen = []
    total = sum(map(len, texts.values()))
    for tokens in texts.values():
        room = len(tokens) // length
        take = min(room, max(1, round(count * len(tokens) / total)))
        starts = np.linspace(0, len(tokens) - length, take).astype(int) if take > 1 else [0] * take
        chosen += [np.concatenate([[bos], tokens[s : s + length]]) for s in starts]
    return np.stack(chosen)


def novel_perplexity(scorer: Scorer, texts: Mapping[str, NDArray[np.int64]], length: int, count: int) -> float:
    return math.exp(score(scorer, windows(texts, length, count))[0].mean().item())


def position_losses(scorer: Scorer, texts: Mapping[str, NDArray[np.int64]], count: int) -> dict[str, float]:
    """Mean loss by position in windows of 2,048 tokens: it must not rise with position."""
    losses, _ = score(scorer, windows(texts, 2048, count))
    return {f"{low}-{high}": losses[:, low:high].mean().item() for low, high in BUCKETS}


def reference_perplexity(scorer: Scorer, tokenizer: Tokenizer, length: int = 1024, count: int | None = None) -> float:
    """Reference documents of at least 512 tokens, each from its start, up to ``length`` tokens."""
    total, tokens, used = 0.0, 0, 0
    for text in corpus.language_reference().values():
        ids = encode(tokenizer, text)
        if len(ids) < 512 or used == count:
            continue
        used += 1
        losses, _ = score(scorer, np.concatenate([[0], ids[:length]])[None])
        total, tokens = total + losses.sum().item(), tokens + losses.numel()
    return math.exp(total / tokens)


def copy_loss(scorer: Scorer, mixture: Mixture, span: int = 64, count: int = 16) -> float:
    """Loss on the second occurrence of a span of random words, after its first two tokens."""
    rng = np.random.default_rng(1)
    spans = rng.choice(mixture.any_words, size=(count, span))
    rows = np.concatenate([np.zeros((count, 1), dtype=np.int64), spans, spans], axis=1)
    return score(scorer, rows)[0][:, span + 2 :].mean().item()


def retrieval_rows(
    mixture: Mixture, texts: Mapping[str, NDArray[np.int64]], kind: str, length: int, count: int
) -> tuple[NDArray[np.int64], int]:
    """Held-out prose with six facts, one of them asked for at the end; and the length of the answer."""
    rng = np.random.default_rng((2, length, len(kind)))
    names = sorted(texts)
    rows, size = [], 0
    for _ in range(count):
        how = mixture.plain[int(rng.integers(len(mixture.plain)))]
        keys = rng.choice(mixture.names, size=FACTS, replace=False)
        mixture.rng = rng
        values = [mixture.number(4) if kind == "number" else mixture.value("word") for _ in keys]
        statements = [mixture.statement(how, int(k), v).ids for k, v in zip(keys, values, strict=True)]
        asked = int(rng.integers(FACTS))
        query = [*how.before, int(keys[asked]), *how.between, *values[asked]]
        size = len(values[asked])
        tokens = texts[names[int(rng.integers(len(names)))]]
        room = length - 1 - len(query) - sum(map(len, statements))
        start = int(rng.integers(len(tokens) - room))
        text = tokens[start : start + room]
        places = np.flatnonzero(mixture.is_sentence_end[text]) + 1
        if len(places) < FACTS:
            places = np.arange(1, room)
        row, done = [0], 0
        for place, statement in zip(np.sort(rng.choice(places, size=FACTS)), statements, strict=True):
            row += [*text[done:place], *statement]
            done = int(place)
        rows.append([int(i) for i in (*row, *text[done:], *query)])
    return np.array(rows, dtype=np.int64), size


def retrieval_accuracy(
    scorer: Scorer,
    mixture: Mixture,
    texts: Mapping[str, NDArray[np.int64]],
    kind: str,
    length: int,
    count: int,
) -> float:
    """Share of questions of which every answer token is the most likely one."""
    rows, size = retrieval_rows(mixture, texts, kind, length, count)
    _, guesses = score(scorer, rows)
    return (guesses[:, -size:] == torch.from_numpy(rows[:, -size:])).all(dim=1).float().mean().item()


def quick(
    scorer: Scorer,
    mixture: Mixture,
    texts: Mapping[str, NDArray[np.int64]],
    lengths: tuple[int, ...] = (256, 1024),
) -> dict[str, float]:
    """The measurements printed during training: small samples, seconds."""
    found = {f"novels_{n}": novel_perplexity(scorer, texts, n, max(6, 12288 // n)) for n in lengths}
    found["reference"] = reference_perplexity(scorer, mixture.tokenizer, 512, count=16)
    found["copy_loss"] = copy_loss(scorer, mixture, count=4)
    for kind in ("word", "number"):
        for length in lengths:
            found[f"{kind}_{length}"] = retrieval_accuracy(scorer, mixture, texts, kind, length, 16)
    return {name: round(value, 3) for name, value in found.items()}


def full(scorer: Scorer, mixture: Mixture, texts: Mapping[str, NDArray[np.int64]]) -> dict[str, object]:
    """Everything, for the model card."""
    lengths = (128, 256, 512, 1024, 2048)
    retrieval = {
        kind: {str(n): retrieval_accuracy(scorer, mixture, texts, kind, n, 96 if n < 2048 else 48) for n in lengths}
        for kind in ("word", "number")
    }
    return {
        "novel_perplexity": {str(n): novel_perplexity(scorer, texts, n, 98304 // n) for n in (256, 1024, 2048)},
        "novel_loss_by_position": position_losses(scorer, texts, 48),
        "reference_perplexity": {str(n): reference_perplexity(scorer, mixture.tokenizer, n) for n in (512, 1024)},
        "copy_loss": copy_loss(scorer, mixture),
        "retrieval_accuracy": retrieval,
    }


def bits_per_byte(tokenizer: Tokenizer, texts: Mapping[str, str], perplexity: float) -> float:
    """A perplexity per token as bits per byte of the text, which compares across tokenizers."""
    tokens = sum(len(encode(tokenizer, text)) for text in texts.values())
    return math.log2(perplexity) * tokens / sum(len(text.encode()) for text in texts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an exported mini-lm and print the result as JSON.")
    parser.add_argument("model", type=Path, help="folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--heldout", type=Path, required=True, help="archive of novels that were not trained on")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    raw = corpus.read_archive(options.heldout)
    texts = {name: encode(tokenizer, text) for name, text in raw.items()}
    nothing = np.zeros(4, dtype=np.uint16)
    listed = json.loads((options.model / "words.json").read_text())
    mixture = Mixture(tokenizer, nothing, nothing, names=listed["names"], words=listed["words"])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    result = full(lambda ids: model(ids.to(options.device), use_cache=False).logits, mixture, texts)
    at_1024 = result["novel_perplexity"]["1024"]  # type: ignore[index]
    result["novel_bits_per_byte_1024"] = bits_per_byte(tokenizer, raw, at_1024)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
