"""Trains the small SmolVLM from scratch on procedural assembly videos, to the exported folder.

    python training/mini_vlm/run.py --work runs/mini_vlm --export src/kvsieve/zoo/mini_vlm

A second call with the same `--work` goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from network import build, tokenizer
from settings import TOY, TOY_SIZES, Recipe, Sizes
from trainer import Trainer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, help="folder for the finished model")
    parser.add_argument("--steps", type=int, help=f"steps with pictures ({Recipe.steps})")
    parser.add_argument("--stop", type=int, help="stop after this step, as if interrupted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="a tiny model and few steps, to test the recipe")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    recipe, sizes = (TOY, TOY_SIZES) if options.toy else (Recipe(), Sizes())
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    words = tokenizer()
    trainer = Trainer(build(sizes, words, options.seed), words, recipe, options.work, options.seed)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters", flush=True)
    if (options.work / "latest.pt").exists():
        trainer.resume()
        print(f"resumed at step {trainer.at['step']}", flush=True)
    trainer.run(options.stop, 1 if options.toy else 25)
    if options.export:
        from export import export

        agreement = export(trainer.model, words, options.export)
        print(f"exported to {options.export}; share of tokens that agree {agreement:.4f}", flush=True)


if __name__ == "__main__":
    main()
