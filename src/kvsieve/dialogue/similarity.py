"""How alike two lines are, from 0 to 1: named functions, to which users can add their own."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from ..errors import KvsieveError, PolicyError, ScoreError

__all__ = [
    "Similarity",
    "exact",
    "get_similarity",
    "list_similarities",
    "register_similarity",
    "sentence_encoder",
    "token_f1",
    "tokens",
]

Similarity = Callable[[str, str], float]
"""Takes what was said and what was to be said, returns a number from 0, unlike, to 1, alike."""
Batched = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""The same for many pairs at once: two sequences of equal length, one number per pair."""

ENCODER = "sentence-transformers/all-mpnet-base-v2"
"""The sentence encoder of the ProAssist study (arXiv 2506.05904)."""
_TOKEN = re.compile(r"[^\W_]+")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_RANGE = 1e-6


def exact(said: str, wanted: str) -> float:
    """1.0 if the texts are the same, up to the amount of white space, else 0.0."""
    return float(said.split() == wanted.split())


def tokens(text: str) -> list[str]:
    """The words of a text, normalised.

    Unicode compatibility forms are unified (NFKC), capitals folded, apostrophes inside words dropped ("let's" becomes
    "lets"), and every run of letters and digits is a word; all else separates words. No word is left out or cut down
    to its stem. A language that writes without spaces comes out as few, long words; register another similarity there.
    """
    return _TOKEN.findall(_APOSTROPHE.sub("", unicodedata.normalize("NFKC", text).casefold()))


def token_f1(said: str, wanted: str) -> float:
    """The F1 of words: twice the number of words in common over the number of words in both.

    Words are those of `tokens`, counted as often as they occur; their order does not matter. Two texts without a
    word are alike (1.0) if they are the same up to white space.
    """
    first, second = Counter(tokens(said)), Counter(tokens(wanted))
    if not first and not second:
        return exact(said, wanted)
    return 2 * (first & second).total() / (first.total() + second.total())


class sentence_encoder:  # noqa: N801
    """The cosine of two sentence embeddings; below 0, which means unlike, it counts as 0.

    Embeddings are kept, so that a text which occurs in many pairs is encoded once. Needs the extra
    `kvsieve[sentence-encoder]`; the encoder is loaded when first used, from a local folder or the hub.

    Args:
        model: name or folder of a sentence-transformers model.
        device: where it runs; by default the library decides.
        batch_size: texts encoded at once.
    """

    def __init__(self, model: str = ENCODER, device: str | None = None, batch_size: int = 32) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self._encoder: Any = None
        self._known: dict[str, list[float]] = {}

    def __call__(self, said: Sequence[str], wanted: Sequence[str]) -> list[float]:
        """One number per pair of texts.

        Raises:
            KvsieveError: sentence-transformers is not installed.
            ScoreError: an embedding is zero or not finite.
        """
        self._encode([*said, *wanted])
        return [
            max(0.0, math.fsum(a * b for a, b in zip(self._known[one], self._known[other], strict=True)))
            for one, other in zip(said, wanted, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if not new:
            return
        if self._encoder is None:
            try:
                library = import_module("sentence_transformers")
            except ImportError:
                raise KvsieveError(
                    "similarity 'sentence_encoder' needs the package sentence-transformers: "
                    "pip install 'kvsieve[sentence-encoder]', or choose token_f1 or exact"
                ) from None
            self._encoder = library.SentenceTransformer(self.model, device=self.device)
        for text, vector in zip(
            new, self._encoder.encode(new, batch_size=self.batch_size, show_progress_bar=False), strict=True
        ):
            values = [float(value) for value in vector]
            length = math.sqrt(math.fsum(value * value for value in values))
            if not math.isfinite(length) or length == 0:
                raise ScoreError(f"{self.model} gives {text!r} an embedding of length {length}, which has no direction")
            self._known[text] = [value / length for value in values]


def _one_by_one(function: Similarity) -> Batched:
    def many(said: Sequence[str], wanted: Sequence[str]) -> list[float]:
        known: dict[tuple[str, str], float] = {}
        for pair in zip(said, wanted, strict=True):
            if pair not in known:
                known[pair] = function(*pair)
        return [known[pair] for pair in zip(said, wanted, strict=True)]

    return many


_FACTORIES: dict[str, Callable[[], Batched]] = {
    "token_f1": lambda: _one_by_one(token_f1),
    "exact": lambda: _one_by_one(exact),
    "sentence_encoder": cache(sentence_encoder),
}


def list_similarities() -> list[str]:
    """Names that `get_similarity` knows, sorted."""
    return sorted(_FACTORIES)


def register_similarity(name: str, function: Similarity | Batched, *, batched: bool = False) -> None:
    """Make a function usable by name.

    Args:
        name: not in use yet.
        function: see `Similarity`; with `batched`, it takes two sequences of equal length and returns one number per
            pair, which pays off for encoders.
        batched: which of the two it is.

    Raises:
        PolicyError: the name is in use or empty, or this is no function.
    """
    if not isinstance(name, str) or not name:
        raise PolicyError(f"a similarity needs a name, not {name!r}")
    if name in _FACTORIES:
        raise PolicyError(f"there is a similarity named {name!r} already; choose another name")
    if not callable(function):
        raise PolicyError(f"similarity {name!r} must be a function of two texts, not {function!r}")
    many: Any = function if batched else _one_by_one(function)  # type: ignore[arg-type]
    _FACTORIES[name] = lambda: many


def get_similarity(similarity: str | Similarity | sentence_encoder) -> Batched:
    """A checked function over many pairs.

    Args:
        similarity: a name of `list_similarities`, a function of two texts, or a `sentence_encoder`.

    Returns:
        A function of two sequences of texts; it raises `ScoreError` if a value is not a number in [0, 1].

    Raises:
        PolicyError: an unknown name, or no function.
    """
    if isinstance(similarity, str):
        if similarity not in _FACTORIES:
            known = ", ".join(list_similarities())
            raise PolicyError(f"there is no similarity named {similarity!r}; it must be one of {known}, or a function")
        name, many = similarity, _FACTORIES[similarity]()
    elif isinstance(similarity, sentence_encoder):
        name, many = "sentence_encoder", similarity
    elif callable(similarity):
        name, many = getattr(similarity, "__name__", "given"), _one_by_one(similarity)
    else:
        raise PolicyError(f"a similarity is a name or a function of two texts, not {similarity!r}")

    def checked(said: Sequence[str], wanted: Sequence[str]) -> list[float]:
        values = [float(value) for value in many(said, wanted)] if said else []
        if len(values) != len(said):
            raise ScoreError(f"similarity {name!r} returned {len(values)} numbers for {len(said)} pairs")
        for value, one, other in zip(values, said, wanted, strict=True):
            if not -_RANGE <= value <= 1 + _RANGE:
                raise ScoreError(f"similarity {name!r} of {one!r} and {other!r} is {value}; it must be from 0 to 1")
        return [min(1.0, max(0.0, value)) for value in values]

    return checked
