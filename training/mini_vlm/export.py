"""Writes a trained model as float16 weights with tokenizer and picture settings; checks that the copy says the same.

python training/mini_vlm/export.py runs/mini_vlm/latest.pt src/kvsieve/zoo/mini_vlm
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from kvsieve.dialogue.assembly import REQUEST, SIDE
from kvsieve.dialogue.vlm import VisionLanguageModel
from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from clips import batch
from network import build, tokenizer
from settings import Recipe, Sizes

TOLERANCE = 0.5


@torch.no_grad()
def export(model: SmolVLMForConditionalGeneration, words: PreTrainedTokenizerFast, folder: Path) -> float:
    """Write the model's folder; returns the largest difference of a logit on training clips.

    Raises:
        RuntimeError: the exported model differs from the trained one by more than rounding does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    edge = {"longest_edge": SIDE}
    pictures = SmolVLMImageProcessorPil(do_image_splitting=False, size=edge, max_image_size=edge)
    half = SmolVLMForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.config.summary_prompt = REQUEST
    half.half().save_pretrained(folder)
    words.save_pretrained(folder)
    pictures.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    copy = VisionLanguageModel.load(folder).model
    data = batch(words, Recipe(), 0, 0, Recipe().clips[0], 0)
    assert data.frames is not None
    pixels = torch.from_numpy(data.frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    rows = torch.split(pixels, (data.ids == model.config.image_token_id).sum(1).tolist())
    first = {"input_ids": data.ids[:1], "pixel_values": rows[0][None]}
    model.eval()
    difference = (model(**first).logits - copy(**first).logits).abs().max().item()
    if difference > TOLERANCE:
        raise RuntimeError(f"the exported model differs from the trained one: {difference:.3f} in a logit")
    return difference


if __name__ == "__main__":
    trained = build(Sizes(), tokenizer(), 0)
    trained.load_state_dict(torch.load(sys.argv[1], weights_only=True)["model"])
    print(f"largest difference of a logit {export(trained, tokenizer(), Path(sys.argv[2])):.4f}")
