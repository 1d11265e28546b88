"""Writes a trained model as a Hugging Face folder and checks that it computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from network import MiniLM, huggingface_config, huggingface_state
from wordlists import NAMES, WORDS


def export(model: MiniLM, tokenizer_folder: Path, folder: Path) -> float:
    """Writes float16 weights, configuration, tokenizer and word lists; returns the logit difference."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = huggingface_config(model.config)
    _write(folder / "config.json", settings)
    _write(
        folder / "generation_config.json",
        {k: settings[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _write(folder / "words.json", {"names": NAMES, "words": WORDS})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, folder / name)
    save_file(huggingface_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    return largest_difference(model, folder)


@torch.no_grad()
def largest_difference(model: MiniLM, folder: Path) -> float:
    """Largest difference between the logits of ``model``, its weights rounded as in the export, and of the export,
    relative to their spread."""
    rounded = MiniLM(model.config).eval()
    rounded.load_state_dict({name: value.cpu().half().float() for name, value in model.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab, (2, min(256, model.config.context)), generator=generator)
    mine = rounded.logits(ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits
    difference = ((mine - theirs).abs().max() / mine.std()).item()
    if difference > 0.01:
        raise RuntimeError(f"the exported model differs from the trained one: {difference:.3f}")
    return difference


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
