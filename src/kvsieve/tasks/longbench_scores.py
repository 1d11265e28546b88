"""The score of a task from the answers to all of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import DataError, PolicyError
from .longbench import LongBenchTask
from .metrics import average
from .metrics_text import check_segmentation
from .records import Sample

__all__ = [
    "LENGTH_BUCKETS",
    "TaskScore",
    "bootstrap_interval",
    "bootstrap_of_groups",
    "length_bucket",
    "mean_of_tasks",
    "score_task",
]

LENGTH_BUCKETS = ("0-4k", "4-8k", "8k+")
"""By the length of the context as the file counts it, under the names LongBench-E has for them."""
LEAST_SAMPLES = 3
"""Samples that an interval needs."""


@dataclass(frozen=True)
class TaskScore:
    """How well a task was done.

    Attributes:
        task: its name.
        metric: what scored it.
        profile: `fixed` or `official`.
        score: mean over all samples, from 0 to 100.
        samples: how many.
        failed: those without an answer, which score 0.
        interval: ends of the 95 % interval of the mean, from a bootstrap over samples; `None` for too few.
        by_length: mean score and number of samples per bucket; the mean is `None` for none; empty if a length is
            not known.
        sample_scores: by id, from 0 to 1.
        notes: what else the numbers depend on: the segmentation of Chinese, or how code is compared.
    """

    task: str
    metric: str
    profile: str
    score: float
    samples: int
    failed: int
    interval: tuple[float, float] | None
    by_length: Mapping[str, tuple[float | None, int]]
    sample_scores: Mapping[str, float] = field(repr=False)
    notes: Mapping[str, str] = field(default_factory=dict)


def score_task(
    task: LongBenchTask,
    samples: Sequence[Sample],
    texts: Sequence[str | None],
    *,
    profile: str = "fixed",
    segment: str | None = None,
) -> TaskScore:
    """Score what was generated for the samples of a task.

    Args:
        task: the task.
        samples: its samples, at least one.
        texts: what was generated for each, in the same order; `None` for a sample that failed, which scores 0.
        profile: `"fixed"` or `"official"`.
        segment: for Chinese, see `metrics.qa_f1_zh`.

    Raises:
        DataError: no samples, another number of texts, a sample twice, or as `LongBenchTask.score` says; then the
            message begins with file and record.
        PolicyError: an unknown profile or segmentation.
        KvsieveError: jieba is wanted and not installed.
    """
    segmentation = check_segmentation(segment, profile)
    if len(samples) != len(texts):
        raise DataError(f"{task.name}: {len(samples)} samples, but {len(texts)} texts; give one per sample")
    scores: dict[str, float] = {}
    for sample, text in zip(samples, texts, strict=True):
        if sample.id in scores:
            raise DataError(f"{task.name}: the sample {sample.id} occurs twice")
        try:
            scores[sample.id] = 0.0 if text is None else task.score(text, sample, profile, segment=segment)
        except DataError as error:
            raise DataError(f"{sample.where or sample.id}: {error}") from None
    values = list(scores.values())
    notes: dict[str, str] = {}
    if task.metric.endswith("_zh") and task.metric != "retrieval_zh":
        notes["segment"] = segmentation
    if task.metric == "code_similarity":
        notes["backend"] = "difflib" if profile == "official" else "subsequence"
    return TaskScore(
        task=task.name,
        metric=task.metric,
        profile=profile,
        score=average(values, profile=profile),
        samples=len(values),
        failed=sum(text is None for text in texts),
        interval=bootstrap_interval(values),
        by_length=_by_length(samples, values, profile),
        sample_scores=scores,
        notes=notes,
    )


def mean_of_tasks(scores: Sequence[TaskScore]) -> float:
    """The mean of the scores of tasks, from 0 to 100, each task counting the same however many samples it has.

    Raises:
        DataError: no scores, a task twice, or several profiles.
    """
    if len({score.task for score in scores}) != len(scores) or len({score.profile for score in scores}) > 1:
        raise DataError("the mean is over different tasks scored with one profile")
    return average([score.score / 100 for score in scores])


def length_bucket(length: int) -> str:
    """The bucket of a length: below 4000, below 8000, or the rest."""
    return LENGTH_BUCKETS[(length >= 4000) + (length >= 8000)]


def bootstrap_interval(
    scores: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Ends of an interval of the mean, from 0 to 100.

    Samples are drawn with replacement, as many as there are, `resamples` times; the interval runs between the
    quantiles of their means that leave out `1 - confidence` in equal parts.

    Args:
        scores: of all samples, in [0, 1].
        confidence: share that the interval covers.
        resamples: draws.
        seed: the same seed gives the same interval.

    Returns:
        `None` for fewer than three samples.

    Raises:
        PolicyError: confidence not between 0 and 1, or no resamples.
    """
    return bootstrap_of_groups([scores], confidence=confidence, resamples=resamples, seed=seed)


def bootstrap_of_groups(
    groups: Sequence[Sequence[float]], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """The same for the mean of the means of several groups: samples are drawn within each.

    Returns:
        `None` if a group has fewer than three samples, or there is none.

    Raises:
        PolicyError: see `bootstrap_interval`.
    """
    if not 0 < confidence < 1:
        raise PolicyError(f"confidence must be between 0 and 1, not {confidence}")
    if resamples < 1:
        raise PolicyError(f"resamples must be 1 or more, not {resamples}")
    if not groups or min(map(len, groups)) < LEAST_SAMPLES:
        return None
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for scores in groups:
        count = len(scores)
        draws = rng.multinomial(count, [1 / count] * count, size=resamples)
        means += draws @ np.array(scores, dtype=float) * (100 / count / len(groups))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _by_length(samples: Sequence[Sample], scores: Sequence[float], profile: str) -> dict[str, tuple[float | None, int]]:
    found: dict[str, list[float]] = {bucket: [] for bucket in LENGTH_BUCKETS}
    for sample, score in zip(samples, scores, strict=True):
        if sample.length is None:
            return {}
        found[length_bucket(sample.length)].append(score)
    return {
        bucket: (average(scores, profile=profile) if scores else None, len(scores)) for bucket, scores in found.items()
    }
