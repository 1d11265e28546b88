"""The tokenizer: byte-level BPE with single digits and with every name and word of the lists as one token."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from wordlists import LINKS, NAMES, OPENINGS, WORDS

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# English contractions; words, single digits, runs of punctuation, each after at most one space; spaces.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHUNK = 200_000
DOCUMENTATION_REPEATS = 3  # there is much less of it than of the novels


def _training_text(novels: Sequence[str], documentation: Sequence[str], list_repeats: int) -> Iterator[str]:
    for text in novels:
        for start in range(0, len(text), CHUNK):
            yield text[start : start + CHUNK]
    for _ in range(DOCUMENTATION_REPEATS):
        yield from documentation
    shuffler = random.Random(0)
    listed = [f" {word}" for word in NAMES + WORDS]
    phrases = [opening + link for opening in OPENINGS for link in LINKS]
    frame = " The code of x is y. The secret word for x is y. Remember that x has y. What is the code of x?\n- x: y\n"
    for _ in range(list_repeats):
        shuffler.shuffle(listed)
        yield "".join(listed) + " 0 1 2 3 4 5 6 7 8 9" + frame + shuffler.choice(phrases)


def train_tokenizer(novels: Sequence[str], documentation: Sequence[str], vocab: int, list_repeats: int) -> Tokenizer:
    """Learns the merges. ``list_repeats``: how often the listed words are shown, so that they stay whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(novels, documentation, list_repeats), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    split = [w for w in NAMES + WORDS if len(tokenizer.encode(f" {w}", add_special_tokens=False).ids) != 1]
    if split:
        raise ValueError(f"listed words that are not single tokens: {split}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes ``tokenizer.json`` and a ``tokenizer_config.json`` that every transformers version reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    PreTrainedTokenizerFast.from_pretrained(folder)  # fails here rather than at the user's
