"""Trains mini-lm from the text archive to the exported folder.

    python training/mini_lm/run.py --novels data/text_train.tar.xz --heldout data/text_heldout.tar.gz \
        --work runs/mini_lm --export src/kvsieve/zoo/mini_lm

A second call with the same ``--work`` goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import corpus
import measure
from bpe import save_tokenizer, train_tokenizer
from export import export
from mixture import Mixture
from network import MiniLM, ModelConfig
from planting import plant_lookup
from stages import STAGES, TOY, scaled
from trainer import Trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True, help="archive of .txt files to train on")
    parser.add_argument("--heldout", type=Path, required=True, help="archive of .txt files to test on")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and the log")
    parser.add_argument("--export", type=Path, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every token budget")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="a tiny model and curriculum, to test the recipe")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, config: ModelConfig) -> None:
    """Tokenizer and token arrays in the work folder, made once."""
    if (options.work / "corpus.json").exists():
        return
    novels = corpus.read_archive(options.novels)
    heldout = corpus.read_archive(options.heldout)
    if set(novels) & set(heldout):
        raise ValueError(f"held-out texts among the training texts: {sorted(set(novels) & set(heldout))}")
    documentation, removed = corpus.library_documentation(200 if options.toy else None)
    repeats = 300 if options.toy else 3000
    tokenizer = train_tokenizer(list(novels.values()), documentation, config.vocab, repeats)
    save_tokenizer(tokenizer, options.work / "tokenizer", config.context)
    end = tokenizer.token_to_id("<|eos|>")
    counts: dict[str, object] = {
        "novels": len(novels),
        "docstrings": len(documentation),
        "paragraphs_removed": removed,
    }
    for name, texts in (("novels", list(novels.values())), ("documentation", documentation)):
        encoded = [[*item.ids, end] for item in tokenizer.encode_batch(texts, add_special_tokens=False)]
        tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])
        np.save(options.work / f"{name}.npy", tokens)
        counts |= {f"{name}_characters": sum(map(len, texts)), f"{name}_tokens": len(tokens)}
    (options.work / "corpus.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts), flush=True)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = (
        ModelConfig(layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, mlp=128) if options.toy else ModelConfig()
    )
    prepare(options, config)
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer" / "tokenizer.json"))
    heldout = {name: measure.encode(tokenizer, text) for name, text in corpus.read_archive(options.heldout).items()}
    streams = [np.load(options.work / f"{name}.npy", mmap_mode="r") for name in ("novels", "documentation")]
    mixture = Mixture(tokenizer, streams[0], streams[1], seed=options.seed)
    testing = Mixture(tokenizer, streams[0], streams[1])
    network = MiniLM(config)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
    if not options.toy:
        plant_lookup(network)
    trainer = Trainer(network, mixture, options.work, options.device)
    if (options.work / "latest.pt").exists():
        trainer.resume(options.work / "latest.pt")
        print(f"resumed at step {trainer.step}, {trainer.tokens:,} tokens", flush=True)

    def test(model: MiniLM) -> dict[str, float]:
        lengths = (128,) if options.toy else (256, 1024)
        return measure.quick(lambda ids: model.logits(ids.to(options.device)), testing, heldout, lengths)

    stages = TOY if options.toy else scaled(STAGES, options.scale)
    every, tests = (4_000, 10**9) if options.toy else (50_000, 400_000)
    trainer.run(stages, test, options.work / "log.jsonl", int(every * options.scale), int(tests * options.scale))
    if options.export:
        difference = export(trainer.model, options.work / "tokenizer", options.export)
        print(f"exported to {options.export}; largest relative logit difference {difference:.4f}", flush=True)


if __name__ == "__main__":
    main()
