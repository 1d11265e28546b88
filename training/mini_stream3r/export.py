"""Writes a trained model as float16 weights with its configuration, and checks that the copy sees the same.

python training/mini_stream3r/export.py runs/mini_stream3r/latest.pt src/kvsieve/zoo/mini_stream3r
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from kvsieve.geometry.model import STream3R
from kvsieve.geometry.scenes import HELD_OUT

from data import rendered

TOLERANCE = 0.05


@torch.no_grad()
def export(model: STream3R, folder: Path) -> float:
    """Write `model.safetensors` and `config.json`; returns the largest difference in log depth.

    Raises:
        RuntimeError: the exported model differs from the trained one by more than rounding does.
    """
    model.save_pretrained(folder, torch.float16)
    (folder / "model.safetensors").chmod(0o644)
    images = rendered([HELD_OUT], 4, model.config["img_size"])["images"]
    copy = STream3R.from_pretrained(folder)
    difference = (model.eval()(images)["depth"].log() - copy(images)["depth"].log()).abs().max().item()
    if difference > TOLERANCE:
        raise RuntimeError(f"the exported model differs from the trained one: {difference:.3f} in log depth")
    return difference


if __name__ == "__main__":
    from measure import load

    print(f"largest difference in log depth {export(load(Path(sys.argv[1])), Path(sys.argv[2])):.4f}")
