"""From settings to cells: the model, the texts and the policies, checked before anything is written."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import zoo
from .._identity import check_name, digest, find_device, identity_of, load_model, surrogate_fingerprint
from ..errors import BudgetError, DataError, PolicyError
from ..hf import text_config
from ..policy import Policy, get_policy
from ..scorer import SCORERS
from ..text.data import Document, python_reference, read_jsonl
from .cells import FORMAT
from .settings import BASELINE, MATCH, Settings, kind_of, resolve_methods

__all__ = ["Cell", "Method", "Plan", "Sample", "describe", "prepare"]

MATCH_TEXTS, MATCH_STEPS, MATCH_RANGE = 2, 12, (-100.0, 20.0)
"""How a threshold is matched to a ratio: texts, bisection steps, thresholds considered (log scores)."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: registered name.
        kind: `"ratio"`, `"threshold"` or `"none"`.
        options: arguments of `get_policy`, JSON-ready.
        sink, recent: first and last tokens that are protected whatever the method itself protects.
        scorer: where the surrogate lies, for methods that have one.
        fingerprint: hash of what `scorer` holds.
    """

    name: str
    kind: str
    options: dict[str, Any]
    sink: int = 0
    recent: int = 0
    scorer: str | None = None
    fingerprint: str = ""

    @property
    def label(self) -> str:
        """The name in results."""
        return BASELINE if self.name == "full" else self.name

    @property
    def asked(self) -> float | None:
        """The ratio or the threshold that was asked for."""
        return self.options.get("compression_ratio", self.options.get("threshold"))

    def policy(self, seed: int | None = None) -> Policy:
        """The policy; `seed` replaces the seed of methods that draw numbers."""
        options = dict(self.options)
        if self.scorer is not None:
            options["scorer"] = self.scorer
        if "seed" in options and seed is not None:
            options["seed"] = seed
        policy = get_policy(self.name, **options)
        guard = policy.protect
        return replace(
            policy, protect=replace(guard, sink=max(guard.sink, self.sink), recent=max(guard.recent, self.recent))
        )


@dataclass(frozen=True)
class Sample:
    """One text as token ids `[N]` and a hash of them."""

    id: str
    tokens: Tensor
    digest: str


@dataclass(frozen=True)
class Cell:
    """The unit of work: one method on one text. `key` is a hash of all that the numbers depend on."""

    key: str
    method: int
    sample: int
    seed: int


@dataclass
class Plan:
    """Everything a run needs, in memory."""

    settings: Settings
    model: Any
    methods: list[Method]
    samples: list[Sample]
    max_length: int
    identity: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def cells(self) -> Iterator[Cell]:
        """All cells, method by method."""
        for m, method in enumerate(self.methods):
            for s, sample in enumerate(self.samples):
                policy = [method.name, method.options, method.sink, method.recent, method.fingerprint]
                data = [sample.id, sample.digest, self.max_length]
                what = [self.identity, policy, data, self.settings.chunk_size, self.settings.seed]
                seed = int(digest([self.settings.seed, sample.id]), 16) % 2**31
                yield Cell(digest(what), m, s, seed)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: with the cells' rows it is all that a summary needs, without model or data."""
    settings = plan.settings
    return {
        "format": FORMAT,
        "run": {
            "command": settings.command(),
            "model": settings.model_name,
            "data": settings.data_path or f"Python {platform.python_version()} language reference (pydoc_data.topics)",
            "data_fingerprint": digest([sample.digest for sample in plan.samples]),
            "weights_fingerprint": plan.identity["weights"],
            "samples": len(plan.samples),
            "max_length": plan.max_length,
            "chunk_size": settings.chunk_size,
            "seed": settings.seed,
            "dtype": plan.identity["dtype"],
            "versions": {key: plan.identity[key] for key in ("kvsieve", "torch", "transformers")}
            | {"python": platform.python_version()},
            "hardware": {
                "device": plan.identity["device"],
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
            },
        },
        "notes": plan.notes,
        "methods": [
            {
                "method": m.label,
                "name": m.name,
                "kind": m.kind,
                "asked": m.asked,
                "options": m.options,
                "protected_sink": m.sink,
                "protected_recent": m.recent,
            }
            for m in plan.methods
        ],
        "samples": [{"id": s.id, "tokens": s.tokens.numel(), "digest": s.digest} for s in plan.samples],
        "cells": [[cell.key, cell.method, cell.sample] for cell in plan.cells()],
    }


def prepare(settings: Settings, device: str | None = None) -> Plan:
    """Load the model and the texts and check that every method can run on them; nothing is written.

    Args:
        settings: what the user asked for.
        device: instead of `settings.device`, for a worker.

    Raises:
        KvsieveError: anything that would keep the run from finishing, as far as it can be known beforehand.
    """
    check_name(settings.model_name)
    names = resolve_methods(settings.methods, settings.include_observed_attention)
    scorer = _surrogate(settings) if any(kind_of(name) == "threshold" for name in names) else None
    documents = _documents(settings)
    where = find_device(device or settings.device)
    model, tokenizer = load_model(settings.model_name, where, settings.dtype)
    notes: list[str] = []
    max_length = _clip_length(model, settings, notes)
    samples = [_sample(tokenizer, document, max_length) for document in documents]
    methods = [_method(name, settings, scorer) for name in names]
    _check_protection(settings, methods, samples)
    for method in methods:
        _check_model(model, method)
    plan = Plan(settings, model, methods, samples, max_length, identity_of(model, where), notes)
    if settings.threshold == MATCH and scorer is not None:
        _match(plan)
    _explain(plan)
    return plan


# ---- data


def _clip_length(model: Any, settings: Settings, notes: list[str]) -> int:
    """`max_length` within what the model was made for; a note says so where it had to be lowered."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    if longest is None or settings.max_length <= longest:
        return settings.max_length
    notes.append(
        f"max_length {settings.max_length} was lowered to {longest}, the longest text that {settings.model_name} was "
        "made for."
    )
    return int(longest)


def _documents(settings: Settings) -> list[Document]:
    if settings.data_path is None:
        return python_reference(max_samples=settings.max_samples)
    return read_jsonl(settings.data_path, settings.text_field, settings.max_samples)


def _sample(tokenizer: Any, document: Document, max_length: int) -> Sample:
    from ..text.likelihood import encode

    try:
        tokens = encode(tokenizer, document.text, max_length=max_length)
    except DataError as error:
        raise DataError(f"{document.id}: {error}") from None
    return Sample(document.id, tokens, digest(tokens.tolist()))


# ---- methods


def _surrogate(settings: Settings) -> str:
    if settings.kvzap_scorer_model is not None:
        return settings.kvzap_scorer_model
    if settings.model_name in zoo.list_models("text"):
        folder = zoo.path(settings.model_name) / "kvzap"
        if folder.is_dir():
            return str(folder)
    raise PolicyError(
        f"kvzap needs a surrogate made for {settings.model_name}: train one with `kvsieve train-kvzap --model "
        f"{settings.model_name}` and name it with --kvzap-scorer-model, or leave kvzap out with --methods"
    )


def _method(name: str, settings: Settings, scorer: str | None) -> Method:
    known = {f.name for f in fields(SCORERS[name])}
    kind = kind_of(name)
    given = {
        "n_sink": settings.n_sink,
        "sink_tokens": settings.n_sink,
        "n_future_positions": settings.n_future_positions,
        "use_covariance": settings.use_covariance,
        "use_vnorm": settings.use_vnorm,
        "seed": settings.seed,
    }
    options: dict[str, Any] = {key: value for key, value in given.items() if key in known}
    if kind == "threshold":
        threshold = 0.0 if settings.threshold == MATCH else float(settings.threshold)
        options |= {"threshold": threshold, "window": settings.sliding_window_size}
        assert scorer is not None
        return Method(name, kind, options, scorer=scorer, fingerprint=surrogate_fingerprint(scorer))
    if kind == "none":
        return Method(name, kind, options)
    options |= {"compression_ratio": settings.compression_ratio, "when": "every_forward"}
    return Method(name, kind, options, sink=settings.n_sink, recent=settings.protect_recent)


def _check_protection(settings: Settings, methods: list[Method], samples: list[Sample]) -> None:
    """A ratio never cuts into protection, so protecting more than every text's budget would silently void it."""
    longest = max(sample.tokens.numel() - 1 for sample in samples)
    budget = max(1, int(longest * (1 - settings.compression_ratio)))
    protected = settings.n_sink + settings.protect_recent
    if protected > budget and any(method.kind == "ratio" for method in methods):
        raise BudgetError(
            f"n_sink={settings.n_sink} and protect_recent={settings.protect_recent} protect more tokens than a "
            f"compression_ratio of {settings.compression_ratio} leaves of the longest text ({budget} of {longest}); "
            "lower them or the ratio, or use longer texts"
        )


def _check_model(model: Any, method: Method) -> None:
    from ..cache import SieveCache

    SieveCache(model, method.policy())


def _match(plan: Plan) -> None:
    """Bisect the threshold until it removes as much as the ratio asks, on the first texts. One number is fitted, to
    memory and not to quality, so measuring on the same texts is fair."""
    from ..text.likelihood import perplexity

    index = next(i for i, method in enumerate(plan.methods) if method.kind == "threshold")
    method = plan.methods[index]
    texts = plan.samples[:MATCH_TEXTS]

    def removed(threshold: float) -> float:
        policy = replace(method, options=method.options | {"threshold": threshold}).policy()
        scores = [perplexity(plan.model, sample.tokens, policy) for sample in texts]
        return 1 - sum(s.keys_held for s in scores) / sum(s.keys_seen for s in scores)

    low, high = MATCH_RANGE
    for _ in range(MATCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < plan.settings.compression_ratio else (low, middle)
    threshold = round((low + high) / 2, 2)
    plan.methods[index] = replace(method, options=method.options | {"threshold": threshold})
    plan.notes.append(
        f"kvzap: the threshold {threshold} was looked for so that it removes {plan.settings.compression_ratio:.0%} of "
        f"the first {len(texts)} texts; it removes {removed(threshold):.0%} of them."
    )


def _explain(plan: Plan) -> None:
    settings = plan.settings
    if any(m.kind == "ratio" for m in plan.methods):
        plan.notes.append(
            f"Ratio methods keep at most {1 - settings.compression_ratio:.0%} of the tokens seen, at every step of the "
            "text; what a method protects (a recent window, say) is never evicted, so short texts can keep more."
        )
        if settings.n_sink:
            plan.notes.append(
                f"No ratio method, random included, evicts the first {settings.n_sink} tokens: a stream that loses its "
                "attention sinks in its opening tokens measures little else (--n-sink 0 shows it)."
            )
        if settings.protect_recent:
            plan.notes.append(f"No ratio method evicts the last {settings.protect_recent} tokens.")
        else:
            bare = [m.label for m in plan.methods if m.kind == "ratio" and m.policy().protect.recent <= 1]
            bare = [label for label in bare if label not in ("streaming_llm", "sink_recent")]
            if bare:
                plan.notes.append(
                    f"{', '.join(bare)} protect no recent tokens, and a score of one query says little about a token "
                    "that has just come; --protect-recent 32 gives all methods a window."
                )
    if any(m.kind == "threshold" for m in plan.methods):
        plan.notes.append(
            f"kvzap keeps the last {settings.sliding_window_size} tokens and, of the older ones, those that score at "
            "least the threshold: how much that removes is up to the text."
        )
