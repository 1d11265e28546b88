"""Prompts as token ids: middle truncation and the wrapper of a chat model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, PolicyError
from .metrics_text import check_profile

__all__ = ["Chat", "EncodedPrompt", "encode_prompt", "in_chat"]

Chat = bool | Callable[[str], str]
"""Whether to wrap the prompt with the tokenizer's chat template, or a function that wraps it."""

_BROKEN = "\ufffd"
"""What decoding puts in place of a character that was cut in two."""
_LONGEST = 4
"""Bytes of a character at most, each of which may be a token."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt for a model.

    Attributes:
        ids: token ids, special tokens included.
        text: what they were made from: truncated and wrapped.
        tokens: how many tokens the prompt had before it was truncated and wrapped, special tokens included.
        truncated: whether something was left out.
        wrapped: whether it is in the wrapper of a chat.
    """

    ids: tuple[int, ...] = field(repr=False)
    text: str = field(repr=False)
    tokens: int
    truncated: bool
    wrapped: bool


def encode_prompt(
    prompt: str,
    tokenizer: Any,
    max_length: int | None,
    *,
    chat: Chat = False,
    profile: str = "fixed",
    version: int = 1,
) -> EncodedPrompt:
    """Cut the middle out of a prompt that is too long, wrap it, and encode it.

    `official`: a prompt of more than `max_length` tokens is decoded, without special tokens, from its first and last
    tokens, then wrapped, then encoded again. Version 1 takes `int(max_length / 2)` tokens from either end and decodes
    both ends on their own, so an odd `max_length` loses one token, and a `max_length` of 1 keeps the whole prompt;
    version 2 takes `max_length // 2` and the rest and decodes them in one go. What comes out may be longer than
    `max_length`: encoding again may give other tokens, and the wrapper comes on top.

    `fixed`: the same with both ends as long as they can be so that the *result*, wrapper and special tokens included,
    has no more than `max_length` tokens; the first end has one token more if the number is odd. A character that was
    cut in two at the seam is left out, so a few tokens fewer may come out.

    In both, a wrapped text that begins with the tokenizer's `bos_token` is encoded without adding special tokens, as
    it would begin with two of them otherwise.

    Args:
        prompt: the whole prompt.
        tokenizer: of transformers, or what behaves alike: `tokenizer(text, add_special_tokens=...)["input_ids"]` and
            `decode(ids, skip_special_tokens=..., clean_up_tokenization_spaces=...)`.
        max_length: most tokens of the prompt, what is generated not included; `None` for no limit.
        chat: see `Chat`.
        profile: `"fixed"` or `"official"`.
        version: of LongBench, 1 or 2; makes a difference for `official` only.

    Raises:
        DataError: `max_length` leaves no room for the prompt beside the wrapper.
        PolicyError: an unknown profile or version, a `max_length` below 1, or a tokenizer without a chat template.
    """
    check_profile(profile)
    if version not in (1, 2):
        raise PolicyError(f"version must be 1 or 2, not {version!r}")
    if max_length is not None and max_length < 1:
        raise PolicyError(f"max_length must be 1 or more, not {max_length}")
    ids = _encode(tokenizer, prompt, special=True)
    if max_length is None or profile == "official":
        text = prompt if max_length is None else _official(prompt, ids, tokenizer, max_length, version)
        wrapped = _wrap(text, tokenizer, chat)
        return _result(_encode_wrapped(tokenizer, wrapped, chat), wrapped, ids, chat, text != prompt)

    text = prompt
    plain = _encode(tokenizer, prompt, special=False)
    keep = len(plain)
    while True:
        wrapped = _wrap(text, tokenizer, chat)
        out = _encode_wrapped(tokenizer, wrapped, chat)
        if len(out) <= max_length:
            return _result(out, wrapped, ids, chat, text != prompt)
        keep -= len(out) - max_length
        if keep < 2:
            raise DataError(
                f"max_length={max_length} leaves no room for the prompt beside the chat wrapper and special tokens; "
                f"give a larger one"
            )
        text = _ends(prompt, plain, tokenizer, keep)


def _official(prompt: str, ids: Sequence[int], tokenizer: Any, max_length: int, version: int) -> str:
    if len(ids) <= max_length:
        return prompt
    if version == 2:
        # The minus sign belongs to max_length, so the division rounds away from zero: the last half is the longer one.
        kept = [*ids[: max_length // 2], *ids[-max_length // 2 :]]
        return str(tokenizer.decode(kept, skip_special_tokens=True))
    half = int(max_length / 2)
    first, last = (tokenizer.decode(list(part), skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return f"{first}{last}"


def _ends(prompt: str, ids: Sequence[int], tokenizer: Any, keep: int) -> str:
    first, last = list(ids[: (keep + 1) // 2]), list(ids[len(ids) - keep // 2 :])
    whole = _BROKEN in prompt
    return _edge(tokenizer, first, -1, whole) + _edge(tokenizer, last, 0, whole)


def _edge(tokenizer: Any, ids: list[int], side: int, whole: bool) -> str:
    """The text of one end, less the tokens of a character that was cut in two at the seam.

    Tokenizers that fall back to bytes decode a whole run of bytes as broken if its last character is, so dropping
    what is broken from the text would drop the run.
    """
    text = ""
    for _ in range(_LONGEST):
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if whole or not text or text[side] != _BROKEN:
            return text
        del ids[side]
    return text.rstrip(_BROKEN) if side else text.lstrip(_BROKEN)


def _wrap(text: str, tokenizer: Any, chat: Chat) -> str:
    if callable(chat):
        return chat(text)
    if not chat:
        return text
    if not getattr(tokenizer, "chat_template", None):
        raise PolicyError("the tokenizer has no chat template; give chat=False, or a function that wraps a prompt")
    return in_chat(tokenizer, text)


def in_chat(tokenizer: Any, text: str) -> str:
    """The text as a user's turn, and the opening of the answer. Models that think aloud are asked not to: they are
    given too few tokens for it."""
    turn = [{"role": "user", "content": text}]
    silent = {"enable_thinking": False} if hasattr(tokenizer, "is_fast") else {}
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **silent))


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    quiet = {"verbose": False} if hasattr(tokenizer, "is_fast") else {}  # of transformers: no word on long texts
    return list(tokenizer(text, add_special_tokens=special, **quiet)["input_ids"])


def _encode_wrapped(tokenizer: Any, text: str, chat: Chat) -> list[int]:
    bos = getattr(tokenizer, "bos_token", None)
    return _encode(tokenizer, text, special=not (chat and bos and text.startswith(bos)))


def _result(out: Sequence[int], text: str, ids: Sequence[int], chat: Chat, truncated: bool) -> EncodedPrompt:
    return EncodedPrompt(tuple(out), text, tokens=len(ids), truncated=truncated, wrapped=bool(chat))
