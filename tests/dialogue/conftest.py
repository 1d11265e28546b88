"""Tiny vision-language models with random weights, and videos for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from kvsieve.dialogue.vlm import Picture, VisionLanguageModel

SIDE = 32
MARKS = ["<pad>", "<unk>", "<|im_start|>", "<end_of_utterance>", "<image>"]
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
WORDS = [
    "System:",
    "User:",
    "Assistant:",
    "Watch",
    "what",
    "next",
    "help",
    "now",
    "place",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "done",
    "go",
    "on",
]
WORDS += [
    "Task",
    "knowledge:",
    "summarize",
    "Please",
    "summarize",
    "the",
    "user's",
    "actions",
    "and",
    "track",
    "task",
    "progress.",
    "Answer",
    "step",
]


def tokenizer(silent: bool, hub: bool) -> PreTrainedTokenizerFast:
    """One token a word; with `hub` a line break is a token too, as in the models of the hub."""
    marks = [*MARKS, *(["<silent>"] if silent else [])]
    marks += ["<fake_token_around_image>", "<global-img>", *TILES] if hub else []
    words = dict.fromkeys([*marks, *(["\n"] if hub else []), *WORDS])
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Split(" ", "removed") if hub else WhitespaceSplit()
    made.add_special_tokens(marks)
    made.add_tokens([word for word in words if word.endswith(":") or word == "\n"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        clean_up_tokenization_spaces=False,
    )


def build(family: str = "smolvlm", hub: bool = False, scale: int = 2, seed: int = 0) -> VisionLanguageModel:
    """A model whose pictures are `(4 / scale)**2` tokens; weights so wide that its logits differ."""
    words = tokenizer(not hub, hub)
    torch.manual_seed(seed)
    kinds: Any = {
        "smolvlm": (
            SmolVLMConfig,
            SmolVLMVisionConfig,
            SmolVLMForConditionalGeneration,
            SmolVLMImageProcessorPil,
        ),
        "idefics3": (Idefics3Config, Idefics3VisionConfig, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    }
    config, vision, model, processor = kinds[family]
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    eyes = vision(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    made = model(
        config(
            text_config=text, vision_config=eyes, scale_factor=scale, image_token_id=4, pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() > 1 and "vision" not in name:
                weight.normal_(std=0.25)
    size = {"longest_edge": 2 * SIDE}
    pictures = processor(size=size, max_image_size={"longest_edge": SIDE})
    return VisionLanguageModel(made, words, pictures)


@pytest.fixture(scope="session")
def vlm() -> VisionLanguageModel:
    """A model with `<silent>`; a picture is 4 tokens, and nothing else stands in front of it."""
    return build()


@pytest.fixture(scope="session")
def hub() -> VisionLanguageModel:
    """A model as those of the hub are: no `<silent>`, and marks around every picture."""
    return build(hub=True)


@pytest.fixture(scope="session")
def idefics() -> VisionLanguageModel:
    """The twin of the other family."""
    return build("idefics3")


def frames(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """`[count, side, side, 3]` noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def video(
    count: int = 12,
    lines: tuple[tuple[str, float, str], ...] = (("assistant", 2.0, "place red"),),
    system: str = "Watch and help",
    name: str = "toy",
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A record; one frame a second, `lines` of `(role, seconds, text)`."""
    said = [{"from": role, "timestamp": time, "value": text} for role, time, text in lines]
    first = [{"from": "system", "value": system}] if system else []
    return {"video_id": name, "fps": 1.0, "frames": frames(count, seed=seed), "conversation": first + said, **more}


@dataclass(frozen=True)
class Fed:
    """One forward pass: token ids, pictures, position of the first token, tokens held before and after it, original
    positions of what the first head of the first layer held before it, the model's own logits `[vocabulary]`, and the
    `id` of the cache."""

    ids: list[int]
    pictures: list[Picture]
    position: int
    before: int
    after: int
    held: list[int]
    logits: Tensor
    cache: int


@contextmanager
def rule(
    vlm: VisionLanguageModel,
    speaks: Callable[[int], bool] | None = lambda frame: False,
    ends: bool = False,
    says: dict[str, str] | None = None,
    look: bool = False,
) -> Iterator[list[Fed]]:
    """Within, the model speaks after the frames that `speaks` names, counted over all passes with a picture.

    Args:
        speaks: `None` leaves it to the model.
        ends: whether its lines may end by themselves; else they go on for as long as they may.
        says: a word, and the line it says after something other than a frame that contains it.
        look: note what is held before every pass.

    Yields:
        Every forward pass, as they come.
    """
    fed: list[Fed] = []
    script: list[int] = []
    stock, end, silence = vlm.forward, vlm.format.end, vlm.format.silence
    marks = [i for word, i in vlm.tokenizer.get_vocab().items() if word[0] in "<\nSUA" and i not in (end, silence)]

    def forward(ids: list[int], pictures: list[Picture], cache: Any, position: int) -> Tensor:
        before = longest(cache)
        held = cache.kept_positions(0)[0, 0].tolist() if look and before else []
        logits = stock(ids, pictures, cache, position)
        fed.append(Fed(list(ids), pictures, position, before, longest(cache), held, logits, id(cache)))
        logits = logits.clone()
        logits[marks] = -torch.inf  # a line cannot show them
        for word, line in (says or {}).items():
            if not script and not pictures and vlm.encode(word)[0] in ids and len(ids) > 2:
                script.extend([*vlm.encode(line), end])
        if script:
            logits[:] = -50.0
            logits[script.pop(0)] = 50.0
            return logits
        if not ends:
            logits[end] = -torch.inf
        if pictures and speaks is not None:
            quiet = not speaks(sum(bool(one.pictures) for one in fed) - 1)
            logits[silence] = 50.0 if quiet else -50.0
        elif not pictures:
            logits[silence] = -torch.inf
        return logits

    vlm.forward = forward  # type: ignore[method-assign]
    try:
        yield fed
    finally:
        del vlm.forward  # type: ignore[method-assign]


def longest(cache: Any) -> int:
    """Tokens of the longest head of any layer."""
    return max(int(layer.core.store.lengths.max()) if layer.core.seen else 0 for layer in cache.managed)
