"""A stream of tokens without an end through a cache that stays as large as it is, measured stretch by stretch.

Nothing is kept of what was read but the cache, so a stream may run for as long as one likes.

Shapes: `T` tokens of one forward pass.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import hf
from ..cache import SieveCache
from ..errors import DataError, PolicyError, UnsupportedOperationError
from ..ledger import POSITION
from ..policy import Policy
from .likelihood import _losses

__all__ = ["Stretch", "TokenStream", "resident_bytes", "trained_length"]

_REWIND = 2**18
"""Position at which slot positions begin anew. Models compute angles in float32, which there lie 1/32 apart."""


@dataclass(frozen=True)
class Stretch:
    """Some tokens of a stream, and the state of its cache after them.

    Attributes:
        tokens: tokens fed since the stream began.
        fed: tokens of this stretch.
        seconds: wall time of this stretch.
        losses: `[fed]` float64, negative log-likelihoods of its tokens, on the CPU; one less where it begins with the
            first token of the stream, which nothing predicts.
        held: tokens held per head, on average over layers and heads.
        bytes_held, bytes_full: keys and values held, spare room included; the same if nothing had been evicted.
        reach: how far the rotations of the queries and keys that met lay apart at most in this stretch, plus one: the
            length that the model had to cope with.
        trained: the length that the model was trained for; None if its configuration does not say.
        resident: bytes of the process in memory; None where the system does not tell.
        device: bytes allocated on the GPU; None on a CPU.
        ids: `[fed]` int64, the tokens themselves.
    """

    tokens: int
    fed: int
    seconds: float
    losses: Tensor
    held: float
    bytes_held: int
    bytes_full: int
    reach: int
    trained: int | None
    resident: int | None
    device: int | None
    ids: Tensor

    @property
    def perplexity(self) -> float:
        """Of this stretch; NaN without a prediction."""
        return math.exp(self.losses.mean())

    @property
    def tokens_per_second(self) -> float:
        """Of this stretch."""
        return self.fed / self.seconds


class TokenStream:
    """One sequence that goes on and on: tokens are read or written, in any order, through one `SieveCache`.

    Args:
        model: a causal language model in evaluation mode.
        policy: what to keep. With a budget of tokens or bytes the cache stays as large as it is; a share of what was
            seen, or the full cache, grows.
        positions: `"slot"`: gaps are closed, so that no key lies farther from a query than the cache is long;
            `"original"`: keys keep their distance, which soon is longer than the model was trained for.
        seed: of what is written.

    Raises:
        UnsupportedOperationError: the model is in training mode.
        PolicyError, UnsupportedModelError: see `SieveCache`.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, positions: str = "slot", seed: int = 0) -> None:
        if model.training:
            raise UnsupportedOperationError("a stream is for inference: call model.eval() first")
        if positions not in ("slot", "original"):
            raise PolicyError(f'positions={positions!r} is not "slot" or "original"')
        self.model, self.trained = model, trained_length(model)
        self.cache = SieveCache(model, policy, positions=positions)
        self.tokens = 0
        whole = len(self.cache.managed) == len(self.cache.layers)
        as_they_came = policy.scorer.wants_rope or policy.scorer.compares_keys
        self._rewinds = positions == "slot" and whole and not as_they_came
        self._vocabulary = hf.text_config(model).vocab_size
        self._last: Tensor | None = None
        self._generator = torch.Generator(model.device).manual_seed(seed)

    def feed(self, ids: Tensor) -> Tensor:
        """One forward pass.

        Args:
            ids: `[T]` int64 tokens that come next.

        Returns:
            Their negative log-likelihoods, `[T]` float64 on the model's device; the first token of the stream, which
            nothing predicts, has none: `[T - 1]`.

        Raises:
            DataError: no token, or ids that are not in the vocabulary.
        """
        ids = ids.long()
        if ids.dim() != 1 or not ids.numel():
            raise DataError(f"a stream is fed one or more tokens at a time, shape [T], not {list(ids.shape)}")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocabulary:
            raise DataError(
                f"token ids must lie in [0, {self._vocabulary}); these are {int(ids.min())} to {int(ids.max())}"
            )
        ids = ids.to(self.model.device)
        with torch.no_grad():  # not around a `yield`: it would be left switched on for the caller
            if self._rewinds and self.cache.next_position >= _REWIND:
                self.cache.rewind()
            start = self.cache.next_position
            places = torch.arange(start, start + ids.numel(), device=ids.device)
            logits: Tensor = self.model(
                input_ids=ids[None], position_ids=places[None], past_key_values=self.cache, use_cache=True
            ).logits[0]
            before = logits[:-1] if self._last is None else torch.cat([self._last, logits[:-1]])
            targets = ids[1:] if self._last is None else ids
            found = _losses(before, targets) if targets.numel() else logits.new_empty(0, dtype=torch.float64)
        self._last, self.tokens = logits[-1:].clone(), self.tokens + ids.numel()
        return found

    def read(self, tokens: Iterable[int], chunk: int = 1, every: int = 256) -> Iterator[Stretch]:
        """Read tokens, without an end if they have none, and measure every stretch of them.

        Args:
            tokens: token ids, taken as they are needed.
            chunk: tokens per forward pass; a pass sees all of them beside what is held.
            every: tokens of a stretch, made up of whole passes.

        Raises:
            PolicyError: `chunk` or `every` below 1.
            DataError: ids that are not in the vocabulary.
        """
        _check(chunk=chunk, every=every)
        source = iter(tokens)

        def passes() -> Iterator[Tensor]:
            while piece := list(itertools.islice(source, chunk)):
                yield torch.tensor(piece, dtype=torch.long)

        return self._stretches(passes(), every)

    def write(self, count: int | None = None, temperature: float = 1.0, every: int = 256) -> Iterator[Stretch]:
        """Write on from what was read: every token is drawn from the model's own distribution and fed back. Its
        likelihoods are those at temperature 1.

        Args:
            count: tokens to write; by default there is no end.
            temperature: 0 takes the likeliest token.
            every: tokens of a stretch.

        Raises:
            PolicyError: `every` below 1, or a negative temperature.
            DataError: nothing was read before.
        """
        _check(every=every)
        if not temperature >= 0.0:
            raise PolicyError(f"temperature must be 0 or more, not {temperature}")
        if self._last is None:
            raise DataError("there is nothing to write on from: read at least one token first")

        def passes() -> Iterator[Tensor]:
            for _ in itertools.count() if count is None else range(count):
                yield self._drawn(temperature)

        return self._stretches(passes(), every)

    def _drawn(self, temperature: float) -> Tensor:
        """`[1]` int64, the next token."""
        assert self._last is not None
        logits = self._last[0].float()
        if temperature == 0.0:
            return logits.argmax()[None]
        logits = (logits - logits.max()).double() / temperature  # no overflow, however low the temperature
        return torch.multinomial(logits.softmax(-1), 1, generator=self._generator)

    def _stretches(self, passes: Iterator[Tensor], every: int) -> Iterator[Stretch]:
        began, fed, reach = time.perf_counter(), 0, 0
        losses: list[Tensor] = []
        pieces: list[Tensor] = []
        for piece in passes:
            before = self._span()
            losses.append(self.feed(piece))
            pieces.append(piece.cpu())
            fed, reach = fed + piece.numel(), max(reach, before + piece.numel())
            if fed >= every:
                yield self._stretch(losses, pieces, fed, time.perf_counter() - began, reach)
                began, fed, reach = time.perf_counter(), 0, 0
                losses, pieces = [], []
        if fed:
            yield self._stretch(losses, pieces, fed, time.perf_counter() - began, reach)

    def _stretch(self, losses: list[Tensor], pieces: list[Tensor], fed: int, seconds: float, reach: int) -> Stretch:
        report = self.cache.report()
        counts = [count for rows in report["tokens_held"].values() for row in rows for count in row]
        device = self.model.device
        return Stretch(
            tokens=self.tokens,
            fed=fed,
            seconds=seconds,
            losses=torch.cat(losses).cpu(),
            held=sum(counts) / len(counts),
            bytes_held=report["bytes_held"],
            bytes_full=report["bytes_full"],
            reach=reach,
            trained=self.trained,
            resident=resident_bytes(),
            device=torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
            ids=torch.cat(pieces),
        )

    def _span(self) -> int:
        """How far the oldest key held lies behind the next token, as keys are rotated when they are read."""
        cores = [layer.core for layer in self.cache.managed]
        if not self.tokens:
            return 0
        if self.cache.positions == "slot":
            return max(core.store.longest for core in cores)
        oldest = min(int(core.store.read(POSITION).masked_fill(~core.store.live, core.seen).min()) for core in cores)
        return self.tokens - oldest


def trained_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model was trained for, as its configuration says."""
    found = getattr(hf.text_config(model), "max_position_embeddings", None)
    return int(found) if found else None


def resident_bytes() -> int | None:
    """Bytes of this process in memory; None where the system has no `/proc`."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return None


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise PolicyError(f"{name} must be 1 or more, not {value}")
