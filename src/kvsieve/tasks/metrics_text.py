"""Profiles, and how texts are cut into words and sentences for scoring."""

from __future__ import annotations

import logging
import re
import string
import unicodedata
import warnings
from functools import cache
from importlib import import_module
from typing import Any

from ..errors import KvsieveError, PolicyError

__all__ = [
    "PROFILES",
    "SEGMENTATIONS",
    "check_profile",
    "check_segmentation",
    "has_letters",
    "official_words",
    "official_words_zh",
    "segment_zh",
    "sentences",
    "words",
]

PROFILES = ("fixed", "official")
"""`"official"` scores as the published scripts do, with their quirks; `"fixed"`, the default, repairs these."""
SEGMENTATIONS = ("characters", "jieba")
"""How Chinese is cut into words: our own rule, or the package the published scripts use."""

_ARTICLES = ("a", "an", "the")
_ENGLISH_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_WIDTH = "".join(chr(ord(mark) + 0xFEE0) for mark in string.punctuation if mark != ".")
_CHINESE_PUNCTUATION = (
    _FULL_WIDTH
    + "\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027\u3001\u3002\u3003"
    + "\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c"
    + "\u301d\u301e\u301f\u3030\u303e\u303f\ufe4f\uff5f\uff60\uff61\uff62\uff63\uff64"
)
"""The list of the published script; the full-width full stop and the opening \u300a are not on it."""
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)

_CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTERS = re.compile(rf"[{_CJK}]|\d+(?:[.,]\d+)*|[^\W\d_{_CJK}]+|\S")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ABBREVIATION = re.compile(r"(?<=\b[^\W\d_])\.")
_WORD = re.compile(r"\d+(?:\.\d+)+|[^\W_]+")
_SENTENCE = re.compile(r"[\n\r!?\u3002\uff01\uff1f\uff1b\u2026]+|\.+(?=\s|$)")


def check_profile(profile: str) -> str:
    """The profile itself.

    Raises:
        PolicyError: it is not one of `PROFILES`.
    """
    if profile not in PROFILES:
        raise PolicyError(f"profile must be one of {', '.join(PROFILES)}, not {profile!r}")
    return profile


def check_segmentation(segment: str | None, profile: str) -> str:
    """The segmentation of Chinese to use: the given one, or that of the profile (`jieba` for `official`).

    Raises:
        PolicyError: neither `None` nor one of `SEGMENTATIONS`, or an unknown profile.
    """
    check_profile(profile)
    if segment is None:
        return "jieba" if profile == "official" else "characters"
    if segment not in SEGMENTATIONS:
        raise PolicyError(f"segment must be one of {', '.join(SEGMENTATIONS)}, not {segment!r}")
    return segment


def official_words(text: str) -> list[str]:
    """English words as LongBench cuts them.

    Small letters; ASCII punctuation deleted, so that what it held apart grows together ("U.S.A.-based" becomes
    "usabased", "3.5" becomes "35"), while curly quotes stay; then a, an and the are left out.
    """
    return _ENGLISH_ARTICLE.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def official_words_zh(text: str, segment: str) -> list[str]:
    """Chinese words as LongBench cuts them: segments in small letters, without white space and listed punctuation."""
    plain = ("".join(piece.lower().translate(_ALL_PUNCTUATION).split()) for piece in segment_zh(text, segment))
    return [piece for piece in plain if piece]


def words(text: str, *, articles: bool = True) -> list[str]:
    """Words in any language with spaces between them.

    Unicode compatibility forms are unified (NFKC) and capitals folded. Apostrophes inside words ("it's": "its"), full
    stops after single letters ("U.S.": "us") and commas between thousands ("1,000": "1000") are deleted, a decimal
    point stays; everything else that is neither letter nor digit separates words.

    Args:
        text: any text.
        articles: keep a, an and the.
    """
    plain = _APOSTROPHE.sub("", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = _WORD.findall(_ABBREVIATION.sub("", _THOUSANDS.sub("", plain)))
    return found if articles else [word for word in found if word not in _ARTICLES]


def segment_zh(text: str, segment: str) -> list[str]:
    """Chinese text in pieces, in the order of the text.

    `"characters"`: every Chinese or Japanese character is a piece, so is every run of other letters, every number with
    its decimals, and every other mark; white space separates. `"jieba"`: the pieces of that package, white space among
    them.

    Args:
        text: any text.
        segment: one of `SEGMENTATIONS`.

    Raises:
        PolicyError: an unknown segmentation.
        KvsieveError: jieba is wanted and not installed.
    """
    check_segmentation(segment, "fixed")
    if segment == "jieba":
        return list(_jieba().cut(text, cut_all=False))
    return _CHARACTERS.findall(text)


def has_letters(word: str) -> bool:
    """Whether a word has a letter or a digit in it."""
    return any(sign.isalnum() for sign in word)


def sentences(text: str) -> list[str]:
    """Sentences: what lies between line breaks, `!`, `?`, their Chinese forms, and full stops that end a word.

    The point of "3.5" ends no sentence; that of an abbreviation does.
    """
    return [piece for piece in _SENTENCE.split(text) if has_letters(piece)]


@cache
def _jieba() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = import_module("jieba")
    except ImportError:
        raise KvsieveError(
            "the official profile cuts Chinese with the package jieba: pip install jieba, "
            "or take segment='characters' (not comparable with published numbers) or profile='fixed'"
        ) from None
    library.setLogLevel(logging.WARNING)
    return library
