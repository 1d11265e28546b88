"""ROUGE-L of summaries, as published for LongBench and as defined by Lin (2004, "ROUGE: A Package for Automatic
Evaluation of Summaries", section 3.2)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from .metrics_text import check_profile, check_segmentation, has_letters, segment_zh, sentences, words

__all__ = ["common_subsequence", "rouge", "rouge_zh"]

_EPSILON = 1e-8


def rouge(prediction: str, reference: str, *, profile: str = "fixed") -> float:
    """ROUGE-L F1 of a summary in a language with spaces between words, in [0, 1].

    `official` is what the package `rouge` 1.0.1 gives for `rouge-l` `f`. Sentences end at every "."; words are what
    white space separates, capitals and punctuation as they are. For each pair of sentences one longest common
    subsequence is taken, and all words of all of these are put in *one set*; precision and recall divide the size of
    that set by the number of *different* words on either side, so repetition costs nothing. The F1 has 1e-8 in its
    denominator: equal texts get a little less than 1. A text without sentences (empty, or only full stops) gets 0.
    The package recurses once per step, so a sentence of roughly a thousand words without a full stop makes it fail,
    which LongBench counts as 0; here such a sentence is scored.

    `fixed` cuts with `sentences` and `words`; a word of the reference counts as found if it is in the common
    subsequence of its own sentence with any sentence of the summary, and no word is found more often than the summary
    has it. Every occurrence counts. Texts without words score 1 if they are the same, else 0.

    Args:
        prediction: what was written.
        reference: what was to be written.
        profile: `"fixed"` or `"official"`.

    Raises:
        PolicyError: an unknown profile.
    """
    if check_profile(profile) == "official":
        return _official(prediction, reference)
    return _fixed(prediction, reference, words)


def rouge_zh(prediction: str, reference: str, *, profile: str = "fixed", segment: str | None = None) -> float:
    """ROUGE-L F1 of a summary in Chinese, in [0, 1].

    `official` cuts both texts with jieba, puts spaces between the pieces and takes the official `rouge`; as that ends
    sentences at "." only, a Chinese text is one long sentence. `fixed` takes every character, number and foreign word
    for a word and ends sentences at Chinese marks too.

    Args:
        prediction: what was written.
        reference: what was to be written.
        profile: `"fixed"` or `"official"`.
        segment: another segmentation than the profile's, see `segment_zh`.

    Raises:
        PolicyError: an unknown profile or segmentation.
        KvsieveError: jieba is wanted and not installed.
    """
    segment = check_segmentation(segment, profile)
    if profile == "official":
        return _official(" ".join(segment_zh(prediction, segment)), " ".join(segment_zh(reference, segment)))

    def pieces(text: str) -> list[str]:
        plain = unicodedata.normalize("NFKC", text).casefold()
        return [word for word in segment_zh(plain, segment) if has_letters(word)]

    return _fixed(prediction, reference, pieces)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Where in `first` the items of a longest common subsequence are, in rising order.

    Among several of equal length it is the one found by walking back from the ends and leaving out an item of
    `second` unless leaving out one of `first` keeps more.
    """
    columns = len(second) + 1
    table = [[0] * columns]
    for item in first:
        above, row = table[-1], [0] * columns
        for column, other in enumerate(second, start=1):
            if item == other:
                row[column] = above[column - 1] + 1
            else:
                left, up = row[column - 1], above[column]
                row[column] = left if left > up else up
        table.append(row)
    found: list[int] = []
    row_at, column = len(first), len(second)
    while row_at and column:
        if first[row_at - 1] == second[column - 1]:
            row_at, column = row_at - 1, column - 1
            found.append(row_at)
        elif table[row_at - 1][column] > table[row_at][column - 1]:
            row_at -= 1
        else:
            column -= 1
    return found[::-1]


def _official(prediction: str, reference: str) -> float:
    # A piece of white space between two full stops becomes one word, the empty one; the published numbers contain it.
    said, wanted = (
        [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece] for text in (prediction, reference)
    )
    if not said or not wanted:
        return 0.0
    common = {one[i] for one in wanted for other in said for i in common_subsequence(one, other)}
    recall = len(common) / len({word for one in wanted for word in one})
    precision = len(common) / len({word for one in said for word in one})
    return 2.0 * ((precision * recall) / (precision + recall + _EPSILON))


def _fixed(prediction: str, reference: str, cut: Callable[[str], list[str]]) -> float:
    said, wanted = ([found for found in map(cut, sentences(text)) if found] for text in (prediction, reference))
    if not said or not wanted:
        return float(prediction.split() == reference.split())
    left = Counter(word for one in said for word in one)
    total = left.total() + sum(len(one) for one in wanted)
    common = 0
    for one in wanted:
        for i in sorted({i for other in said for i in common_subsequence(one, other)}):
            if left[one[i]]:
                left[one[i]] -= 1
                common += 1
    return 2 * common / total
