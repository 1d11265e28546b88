"""Trains the small STream3R from scratch on rendered rooms, to the exported folder.

    python training/mini_stream3r/run.py --work runs/mini_stream3r --export src/kvsieve/zoo/mini_stream3r

A second call with the same `--work` goes on where the first one stopped, with the same scenes as without the stop.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from export import export
from measure import held_out
from network import build
from settings import SIZES, TOY, TOY_SIZES, Recipe
from trainer import Trainer

STEPS = 3550


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--export", type=Path, help="folder for the finished model")
    parser.add_argument("--steps", type=int, help=f"length of the whole run ({STEPS})")
    parser.add_argument("--stop", type=int, help="stop after this step, as if interrupted")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that render ahead; 0: render in between")
    parser.add_argument("--toy", action="store_true", help="a tiny model and few steps, to test the recipe")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    recipe, sizes = (TOY, TOY_SIZES) if options.toy else (Recipe(STEPS), SIZES)
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    trainer = Trainer(build(sizes, options.seed), recipe, options.work, options.seed)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters", flush=True)
    if (options.work / "latest.pt").exists():
        trainer.resume(options.work / "latest.pt")
        print(f"resumed at step {trainer.step}", flush=True)
    scenes, frames = (1, 3) if options.toy else (8, 12)
    every = 1 if options.toy else 20
    trainer.run(lambda model: held_out(model, scenes, frames), options.stop, options.workers, every)
    if options.export:
        difference = export(trainer.model, options.export)
        print(f"exported to {options.export}; largest difference in log depth {difference:.4f}", flush=True)


if __name__ == "__main__":
    main()
