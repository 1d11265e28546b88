"""The model and its tokenizer: SmolVLM's architecture, small, with a vocabulary of whole words."""

from __future__ import annotations

import torch
from kvsieve.dialogue.assembly import COLOURS, PLACES, REQUEST, SHAPES, SIDE, SYSTEM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from settings import Sizes

SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<end_of_utterance>", "<image>", "<silent>"]
ROLES = ["System:", "User:", "Assistant:"]
SPOKEN = ["task", "step", "done", "now", "place", "all", "finished"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `<silent>` is what the model says when it has nothing to say."""
    words = [*SPOKEN, *SYSTEM.split(), *REQUEST.split(), *COLOURS, *SHAPES, *(str(i) for i in range(PLACES + 1))]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *ROLES, *words]))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    made.add_tokens(ROLES)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        clean_up_tokenization_spaces=False,
    )


def build(sizes: Sizes, words: PreTrainedTokenizerFast, seed: int) -> SmolVLMForConditionalGeneration:
    """A fresh model."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=True,
    )
    vision = SmolVLMVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=sizes.vision_mlp,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=SIDE,
        patch_size=8,
    )
    config = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=SIDE // 8,  # the whole picture becomes one token
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
    )
    return SmolVLMForConditionalGeneration(config)
