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

from clips import IGNORED, Batch, batch
from network import build, tokenizer
from settings import Recipe, Sizes

AGREEMENT = 0.999


@torch.no_grad()
def export(model: SmolVLMForConditionalGeneration, words: PreTrainedTokenizerFast, folder: Path) -> float:
    """Write the model's folder; returns the share of training tokens at which both say the same.

    Raises:
        RuntimeError: the exported model says something else than the trained one more often than rounding explains.
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
    same, total = 0, 0
    copy, trained = VisionLanguageModel.load(folder).model, model.eval()
    for step, clip in enumerate(Recipe().clips):
        said = [_said(one, batch(words, Recipe(), 0, step, clip, 0)) for one in (trained, copy)]
        same, total = same + int((said[0] == said[1]).sum()), total + said[0].numel()
    if same < AGREEMENT * total:
        raise RuntimeError(f"the exported model agrees with the trained one on {same} of {total} tokens only")
    return same / total


def _said(model: SmolVLMForConditionalGeneration, data: Batch) -> torch.Tensor:
    """The most probable token wherever one is learned."""
    assert data.frames is not None
    pixels = torch.from_numpy(data.frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    counts = (data.ids == model.config.image_token_id).sum(1).tolist()
    out = []
    for ids, labels, frames in zip(data.ids, data.labels, torch.split(pixels, counts), strict=True):
        logits = model(input_ids=ids[None], pixel_values=frames[None]).logits[0]
        out.append(logits[:-1].argmax(-1)[labels[1:] != IGNORED])
    return torch.cat(out)


if __name__ == "__main__":
    trained = build(Sizes(), tokenizer(), 0)
    trained.load_state_dict(torch.load(sys.argv[1], weights_only=True)["model"])
    print(f"share of tokens that agree {export(trained, tokenizer(), Path(sys.argv[2])):.4f}")
