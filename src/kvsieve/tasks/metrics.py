"""How good an answer is, from 0 to 1: the metrics of LongBench, as published and repaired.

Every metric takes a `profile`. `"official"` gives the numbers of the published scripts (THUDM/LongBench, `metrics.py`),
quirks included; `"fixed"`, the default, gives what the metric is meant to measure. What differs:

| metric | official | fixed |
|---|---|---|
| `qa_f1` | ASCII punctuation is deleted and its neighbours grow together, curly quotes stay; "3.5" equals "35" | words of letters and digits in any script, decimals kept; an article counts if the reference is nothing else |
| `qa_f1_zh` | jieba's words, without listed punctuation (《 is not on the list) | characters, numbers, foreign words |
| `rouge`, `rouge_zh` | sets of different words, capitals and punctuation count, "." ends sentences, equal texts below 1 | see `metrics_rouge` |
| both F1 | two texts without words: 0 | 1 if they are the same |
| `classification` | removing names inside the right name skips every other one; exact capitals | a name inside a longer name that is there does not count; capitals do not matter; the right name always counts as a class |
| `count` | share of digit runs equal to the number: "7.0" holds 7 and 0 | numbers are compared as numbers |
| `retrieval` | share of all numbers in the answer equal to the id, also those that name no paragraph | numbers that follow "Paragraph" (段落, 第…段) if there are any, else all |
| `code_similarity` | first line without `` ` ``, `#`, `//`; an empty line inside counts as that line; difflib, rounded to percent | first line with code in it; exact share of the longest common subsequence |
"""  # noqa: E501

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import DataError, PolicyError
from .metrics_rouge import rouge, rouge_zh
from .metrics_text import (
    check_profile,
    check_segmentation,
    has_letters,
    official_words,
    official_words_zh,
    segment_zh,
    words,
)

__all__ = [
    "CODE_BACKENDS",
    "METRICS",
    "average",
    "best_score",
    "classification",
    "code_similarity",
    "count",
    "qa_f1",
    "qa_f1_zh",
    "retrieval",
    "retrieval_zh",
    "rouge",
    "rouge_zh",
]

CODE_BACKENDS = ("difflib", "subsequence")
"""`difflib` is what fuzzywuzzy compares with unless python-Levenshtein is installed, which gives `subsequence`."""

_DIGITS = re.compile(r"\d+")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?")
_IDS = re.compile(
    r"\bparagraphs?[\s#:]*(\d+(?:(?:\s*,\s*|\s*,?\s+(?:and|or)\s+)(?:paragraphs?\s*)?\d+)*)", re.IGNORECASE
)
_IDS_ZH = re.compile(r"段落\s*(\d+)|第\s*(\d+)\s*个?段")
_GOLD = re.compile(r"Paragraph (\d+)")
_GOLD_ZH = re.compile(r"段落(\d+)")
_COMMENT = re.compile(
    r"//|#(?!(?:include|define|undef|ifdef|ifndef|if|elif|else|endif|pragma|error|region|endregion|using|import)\b)"
)


def qa_f1(prediction: str, reference: str, *, profile: str = "fixed") -> float:
    """F1 of the words of a short answer, order aside, in [0, 1].

    Args:
        prediction: what was answered.
        reference: a right answer.
        profile: `"fixed"` or `"official"`, see the module.

    Raises:
        PolicyError: an unknown profile.
    """
    if check_profile(profile) == "official":
        return _bag_f1(official_words(prediction), official_words(reference))
    wanted = words(reference, articles=False)
    if wanted:
        return _bag_f1(words(prediction, articles=False), wanted)
    return _bag_f1(words(prediction), words(reference)) or _same(prediction, reference)


def qa_f1_zh(prediction: str, reference: str, *, profile: str = "fixed", segment: str | None = None) -> float:
    """F1 of the words of a short answer in Chinese, order aside, in [0, 1].

    Args:
        prediction: what was answered.
        reference: a right answer.
        profile: `"fixed"` or `"official"`, see the module.
        segment: another segmentation than the profile's: `"characters"` or `"jieba"`.

    Raises:
        PolicyError: an unknown profile or segmentation.
        KvsieveError: jieba is wanted and not installed.
    """
    segment = check_segmentation(segment, profile)
    if profile == "official":
        return _bag_f1(official_words_zh(prediction, segment), official_words_zh(reference, segment))
    said, wanted = (
        [word for word in segment_zh(unicodedata.normalize("NFKC", text).casefold(), segment) if has_letters(word)]
        for text in (prediction, reference)
    )
    return _bag_f1(said, wanted) or _same(prediction, reference)


def classification(prediction: str, reference: str, *, classes: Sequence[str], profile: str = "fixed") -> float:
    """One divided by the number of classes the answer names if the right one is among them, else 0.

    A class is named where its name occurs, also inside a word: some names of TREC end in the middle of one.

    Args:
        prediction: what was answered.
        reference: the right class.
        classes: names of all classes.
        profile: `"fixed"` or `"official"`, see the module.

    Raises:
        DataError: no classes.
        PolicyError: an unknown profile.
    """
    check_profile(profile)
    if not classes:
        raise DataError(f"classification needs the names of all classes (all_classes) for the answer {reference!r}")
    if profile == "official":
        named = [name for name in classes if name in prediction]
        # The published loop shortens the list it walks along, so the name after each removed one is never looked at.
        position = 0
        while position < len(named):
            if named[position] in reference and named[position] != reference:
                named.remove(named[position])
            position += 1
        return 1.0 / len(named) if reference in named else 0.0
    right, text = _plain(reference), _plain(prediction)
    found: set[str] = set()
    for name in sorted({right, *map(_plain, classes)} - {""}, key=lambda name: (-len(name), name)):
        if name in text:
            found.add(name)
            text = text.replace(name, "\0")
    return 1.0 / len(found) if right in found else 0.0


def count(prediction: str, reference: str, *, profile: str = "fixed") -> float:
    """Share of the numbers in the answer that are the right one, in [0, 1]; no number: 0.

    Args:
        prediction: what was answered.
        reference: the right number, in digits.
        profile: `"fixed"` or `"official"`, see the module.

    Raises:
        DataError: the reference is no number.
        PolicyError: an unknown profile.
    """
    if check_profile(profile) == "official":
        return _share(_DIGITS.findall(prediction), str(reference))
    wanted = _NUMBER.fullmatch(reference.strip())
    if wanted is None:
        raise DataError(f"count needs a number in digits as reference, not {reference!r}")
    return _share([_value(number) for number in _NUMBER.findall(prediction)], _value(wanted.group()))


def retrieval(prediction: str, reference: str, *, profile: str = "fixed") -> float:
    """Share of the paragraphs named in the answer that are the right one, in [0, 1]; none named: 0.

    Args:
        prediction: what was answered.
        reference: such as `"Paragraph 12"`.
        profile: `"fixed"` or `"official"`, see the module.

    Raises:
        DataError: the reference names no paragraph.
        PolicyError: an unknown profile.
    """
    return _retrieval(prediction, reference, profile, _GOLD, _IDS)


def retrieval_zh(prediction: str, reference: str, *, profile: str = "fixed") -> float:
    """The same as `retrieval` in Chinese, where the reference is such as `"段落12"`."""
    return _retrieval(prediction, reference, profile, _GOLD_ZH, _IDS_ZH)


def code_similarity(prediction: str, reference: str, *, profile: str = "fixed", backend: str | None = None) -> float:
    """How much one line of code in the answer is like the right line, in [0, 1].

    The official profile equals `fuzz.ratio` of fuzzywuzzy 0.18 divided by 100. That package compares with `difflib`,
    or with python-Levenshtein where it is installed, and the two differ; LongBench's requirements do not name the
    latter.

    Args:
        prediction: what was generated, several lines as a rule.
        reference: the right line.
        profile: `"fixed"` or `"official"`, see the module.
        backend: one of `CODE_BACKENDS`; by default `difflib` for `official`, `subsequence` for `fixed`.

    Raises:
        PolicyError: an unknown profile or backend.
    """
    check_profile(profile)
    if backend is None:
        backend = "difflib" if profile == "official" else "subsequence"
    if backend not in CODE_BACKENDS:
        raise PolicyError(f"backend must be one of {', '.join(CODE_BACKENDS)}, not {backend!r}")
    if profile == "official":
        lines = prediction.lstrip("\n").split("\n")
        line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
        if line == reference:
            return 1.0
        return round(100 * _ratio(line, reference, backend, autojunk=True)) / 100 if line and reference else 0.0
    wanted = reference.rstrip()
    comments = _COMMENT.match(wanted.lstrip()) is not None
    line = next((line.rstrip() for line in prediction.splitlines() if _is_code(line, comments)), "")
    return 1.0 if line == wanted else _ratio(line, wanted, backend, autojunk=False)


METRICS: dict[str, Callable[..., float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_similarity": code_similarity,
}
"""The metrics by name."""
_SEGMENTED = ("qa_f1_zh", "rouge_zh")


def best_score(
    metric: str,
    prediction: str,
    references: Sequence[str],
    *,
    classes: Sequence[str] = (),
    profile: str = "fixed",
    segment: str | None = None,
) -> float:
    """The score against the reference it agrees with best, in [0, 1].

    Args:
        metric: a name in `METRICS`.
        prediction: what was answered.
        references: right answers, at least one.
        classes: names of all classes, for `classification`.
        profile: `"fixed"` or `"official"`.
        segment: for Chinese, see `qa_f1_zh`.

    Raises:
        PolicyError: an unknown metric, profile or segmentation.
        DataError: no reference, or as the metric says.
        KvsieveError: jieba is wanted and not installed.
    """
    if metric not in METRICS:
        raise PolicyError(f"there is no metric {metric!r}; it must be one of {', '.join(METRICS)}")
    check_segmentation(segment, profile)
    if isinstance(references, str) or not references:
        raise DataError(f"{metric} needs a list of at least one right answer, not {references!r}")
    more: dict[str, object] = {"classes": classes} if metric == "classification" else {}
    if metric in _SEGMENTED:
        more["segment"] = segment
    return max(METRICS[metric](prediction, reference, profile=profile, **more) for reference in references)


def average(scores: Sequence[float], *, profile: str = "fixed") -> float:
    """The mean of scores in [0, 1], from 0 to 100; the official profile rounds it to two decimals.

    Raises:
        DataError: no scores.
        PolicyError: an unknown profile.
    """
    if not scores:
        raise DataError("there is no score to take the mean of")
    if check_profile(profile) == "official":
        return round(100 * sum(scores) / len(scores), 2)
    return 100 * math.fsum(scores) / len(scores)


def _bag_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _same(prediction: str, reference: str) -> float:
    """1.0 for equal texts, so that those without a word in them can score too."""
    return float(prediction.split() == reference.split())


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _share(found: Sequence[str] | Sequence[float], wanted: str | float) -> float:
    return sum(one == wanted for one in found) / len(found) if found else 0.0


def _retrieval(prediction: str, reference: str, profile: str, gold: re.Pattern[str], ids: re.Pattern[str]) -> float:
    check_profile(profile)
    wanted = gold.search(reference)
    if wanted is None:
        example = gold.pattern.replace(r"(\d+)", "12")
        raise DataError(f"retrieval needs a reference such as {example!r}, not {reference!r}")
    if profile == "official":
        return _share(_DIGITS.findall(prediction), wanted.group(1))
    text = unicodedata.normalize("NFKC", prediction)
    named = [number for match in ids.finditer(text) for number in _DIGITS.findall(match.group())]
    return _share([float(number) for number in named or _DIGITS.findall(text)], float(wanted.group(1)))


def _is_code(line: str, comments: bool) -> bool:
    plain = line.strip()
    return bool(plain) and not plain.startswith("```") and (comments or _COMMENT.match(plain) is None)


def _ratio(first: str, second: str, backend: str, *, autojunk: bool) -> float:
    """Twice what the texts have in common, divided by their lengths together."""
    if backend == "difflib":
        return difflib.SequenceMatcher(None, first, second, autojunk=autojunk).ratio()
    total = len(first) + len(second)
    return 2 * _subsequence_length(first, second) / total if total else 1.0


def _subsequence_length(first: str, second: str) -> int:
    """Length of the longest common subsequence, with only one row of the table kept."""
    row = [0] * (len(second) + 1)
    for sign in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if sign == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
