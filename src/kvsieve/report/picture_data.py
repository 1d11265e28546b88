"""The numbers behind every picture of a trace: which share of the heads held what, and when."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..trace import NEVER, Trace

__all__ = [
    "answers_held",
    "bin_edges",
    "binned",
    "held_over_time",
    "layer_shares",
    "lifetimes",
    "moment",
    "question",
    "ranges",
    "steps_of",
    "title",
]


def moment(trace: Trace, seen: int | None = None) -> int:
    """Tokens read at the moment to show: `seen`; without, when the answer was asked for, or else the end.

    Raises:
        DataError: not from 1 to the number of tokens read.
    """
    at = trace.about.get("asked", trace.tokens) if seen is None else seen
    if isinstance(at, bool) or not isinstance(at, (int, np.integer)) or not 1 <= at <= trace.tokens:
        raise DataError(
            f"a trace of {trace.tokens} tokens can be shown at 1 to {trace.tokens} tokens read, not at {at!r}"
        )
    return int(at)


def ranges(trace: Trace, name: str) -> list[tuple[int, int]]:
    """`about["answers"]` or `about["evidence"]` as (first, last + 1) pairs; empty if it was not told.

    Raises:
        DataError: a range that is empty or does not lie within the tokens read.
    """
    found = []
    for one in trace.about.get(name) or ():
        first, end = (int(i) for i in one)
        if not 0 <= first < end <= trace.tokens:
            raise DataError(f"{name} of a trace must lie within its {trace.tokens} tokens, not at [{first}, {end}]")
        found.append((first, end))
    return found


def question(trace: Trace) -> int | None:
    """Position of the first token of the question, if it was told.

    Raises:
        DataError: no position of this trace.
    """
    at = trace.about.get("question")
    if at is None:
        return None
    if not 0 <= int(at) < trace.tokens:
        raise DataError(f"the question of a trace must begin within its {trace.tokens} tokens, not at {at}")
    return int(at)


def title(trace: Trace) -> str:
    """Method, budget and sample in one line, as far as they were told."""
    about = trace.about
    method = str(about.get("method", "cache"))
    budget = about.get("budget")
    if budget not in (None, "None", "") and str(budget) not in method:
        method += f" {budget}"
    return ", ".join(str(part) for part in (method, about.get("id")) if part)


def layer_shares(trace: Trace, seen: int | None = None) -> NDArray[np.float64]:
    """`[L, moment]`: the share of a layer's heads that held each token read so far."""
    at = moment(trace, seen)
    return trace.held(at)[..., :at].mean(axis=1, dtype=np.float64)


def bin_edges(tokens: int, bins: int) -> NDArray[np.int64]:
    """`[bins + 1]`: where bins of nearly equal size begin and end; never more bins than tokens.

    Raises:
        DataError: fewer than one bin.
    """
    if bins < 1:
        raise DataError(f"bins must be 1 or more, not {bins}")
    bins = min(bins, tokens)
    return np.arange(bins + 1, dtype=np.int64) * tokens // bins


def binned(values: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """`[..., S]` to `[..., bins]`: the mean of each bin, so that no token counts for more or less than another."""
    edges = bin_edges(values.shape[-1], bins)
    sums: NDArray[np.float64] = np.add.reduceat(values, edges[:-1], axis=-1)
    return sums / np.diff(edges)


def steps_of(trace: Trace) -> NDArray[np.int32]:
    """`[L, Hkv, S]`: index in `seen` of the first recorded moment without the token; `len(seen)` if held to the end."""
    table = np.searchsorted(trace.seen, np.arange(trace.tokens + 1)).astype(np.int32)
    table[NEVER] = len(trace.seen)
    steps: NDArray[np.int32] = table[trace.left]
    return steps


def lifetimes(trace: Trace, bins: int) -> NDArray[np.float64]:
    """`[bins, steps]`: the share of all heads that held the tokens of a bin after each recorded forward pass.

    Tokens that were not read yet do not count; NaN where none of a bin was.
    """
    edges, moments = bin_edges(trace.tokens, bins), len(trace.seen)
    size, heads = len(edges) - 1, trace.left.shape[0] * trace.left.shape[1]
    which = np.repeat(np.arange(size), np.diff(edges))
    cell = (which * (moments + 1) + steps_of(trace)).ravel()
    gone = np.bincount(cell, minlength=size * (moments + 1)).reshape(size, moments + 1)[:, :moments].cumsum(axis=1)
    read = np.clip(trace.seen[None, :].astype(np.int64) - edges[:-1, None], 0, np.diff(edges)[:, None])
    share = np.full((size, moments), np.nan)
    np.divide(heads * read - gone, heads * read, out=share, where=read > 0)
    return share


def held_over_time(trace: Trace, positions: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """`[steps]`: the share of all heads that held the tokens at these positions (by default all), like `lifetimes`."""
    at = np.arange(trace.tokens) if positions is None else np.sort(positions)
    heads, moments = trace.left.shape[0] * trace.left.shape[1], len(trace.seen)
    gone = np.bincount(steps_of(trace)[..., at].ravel(), minlength=moments + 1)[:moments].cumsum()
    read = heads * np.searchsorted(at, trace.seen)
    share = np.full(moments, np.nan)
    np.divide(read - gone, read, out=share, where=read > 0)
    return share


def answers_held(trace: Trace, seen: int | None = None) -> list[tuple[tuple[int, int], int, int]]:
    """For each place of the answer: its range, how many heads held all of it, and how many heads there are."""
    held = trace.held(moment(trace, seen))
    return [((a, b), int(held[..., a:b].all(axis=-1).sum()), held[..., 0].size) for a, b in ranges(trace, "answers")]
