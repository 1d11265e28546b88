"""What a policy costs in likelihood: negative log-likelihood of a text under an evicting cache.

The reference is the plainest one: feed the text through a `SieveCache` one token at a time. Faster modes give the
same numbers, because a policy's decisions are local to a layer: `one_pass` writes them as one integer per key, and
`layerwise` walks through the text inside each layer. `chunked` answers another question, what happens when the text
arrives in pieces of `chunk_size`.

Shapes: `N` tokens of the text, `H` query heads, `Hkv` key-value heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .. import hf
from ..cache import SieveCache
from ..errors import DataError, PolicyError, UnsupportedOperationError
from ..policy import Policy
from ..triggers import AfterPrefill
from ._layers import ParallelLayer, SteppedLayer
from .onepass import OnePassLayer, one_pass_reason

__all__ = ["MODES", "TextScore", "encode", "one_pass_reason", "perplexity"]

MODES = ("auto", "token", "chunked", "one_pass", "layerwise")

Progress = Callable[[int, int], None]
"""`progress(done, total)`: called as work gets done, in tokens or in layers."""

_LOSS_ROWS = 512


@dataclass(frozen=True)
class TextScore:
    """Likelihood of one text, and the cache that it took.

    All `N - 1` tokens that are followed by another one are fed; the last token of the text is only predicted.

    Attributes:
        nll: `[N - 1]` float64, negative natural log-likelihood of tokens 1 .. N-1, on the CPU.
        mode: how it was computed: `"token"`, `"chunked"`, `"one_pass"` or `"layerwise"`.
        chunk_size: tokens per forward pass that the policy saw.
        keys_seen: keys fed: `(N - 1)` x managed layers x `Hkv`.
        keys_held: keys still held after the last token fed, over managed layers and heads.
        bytes_held: bytes of those keys and their values, room for growth not counted.
        bytes_full: bytes of all keys and values fed.
        mean_visible_keys: keys that a query sees, its own included, averaged over queries, managed layers and heads.
        seconds: wall time.
    """

    nll: Tensor
    mode: str
    chunk_size: int
    keys_seen: int
    keys_held: int
    bytes_held: int
    bytes_full: int
    mean_visible_keys: float
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens predicted, `N - 1`."""
        return self.nll.numel()

    @property
    def avg_nll(self) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""
        return float(self.nll.mean())

    @property
    def perplexity(self) -> float:
        """`exp(avg_nll)`."""
        return math.exp(self.avg_nll)

    @property
    def compression_ratio(self) -> float:
        """Share of keys removed at the end of the text."""
        return 1 - self.keys_held / self.keys_seen


def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor | Sequence[int],
    policy: Policy,
    *,
    chunk_size: int = 1,
    mode: str = "auto",
    positions: str = "original",
    progress: Progress | None = None,
) -> TextScore:
    """Score one text under a policy, with a fresh cache.

    The logits at token `i` predict token `i + 1`. With `chunk_size=C` the policy sees the text `C` tokens per forward
    pass, so a query sees what survived the earlier chunks and its own chunk up to itself. Policies decide after every
    forward pass: a ratio budget should be built with `get_policy(..., when="every_forward")`, since its default
    (`"prefill"`) passes over forwards of a single token.

    Args:
        model: a causal language model in evaluation mode.
        token_ids: `[N]` or `[1, N]` int64, at least two tokens, no padding.
        policy: what to keep.
        chunk_size: tokens per forward pass; 1 is what a stream of tokens costs, `N` evicts nothing that matters.
        mode: `"auto"`: for `chunk_size=1` `"one_pass"` where that is exact for the policy (see `one_pass_reason`) and
            `"layerwise"` otherwise; `"chunked"` for larger chunks. `"token"` is the reference: a real `SieveCache`, one
            token per forward pass. All modes agree up to rounding.
        positions: `"original"` or `"slot"`, as in `SieveCache`.
        progress: called with `(done, total)`, in tokens (`"token"`, `"chunked"`) or in managed layers.

    Raises:
        DataError: fewer than two tokens, more than one row, or ids that are not in the vocabulary.
        PolicyError: an unknown mode, a mode that is not exact for this policy, or a policy that never looks at
            forward passes of one token although `chunk_size` is 1.
        UnsupportedOperationError: the model is in training mode.
    """
    ids = _checked_ids(model, token_ids)
    mode = _checked_mode(model, ids, policy, chunk_size, mode, positions)
    if model.training:
        raise UnsupportedOperationError("scoring is for inference: call model.eval() first")
    began = time.perf_counter()
    with torch.no_grad():
        cache = SieveCache(model, policy, positions=positions)
        if mode in ("token", "chunked"):
            nll, visible = _sequential(model, ids, cache, chunk_size, progress)
        else:
            nll, visible = _parallel(model, ids, cache, mode, chunk_size, progress)
    fed = nll.numel()
    heads, held, bytes_held, bytes_full = _holdings(cache, fed)
    return TextScore(
        nll=nll.cpu(),
        mode=mode,
        chunk_size=chunk_size,
        keys_seen=fed * heads,
        keys_held=held,
        bytes_held=bytes_held,
        bytes_full=bytes_full,
        mean_visible_keys=visible / (fed * heads),
        seconds=time.perf_counter() - began,
    )


def encode(tokenizer: Any, text: str, *, max_length: int | None = None, bos: str = "auto") -> Tensor:
    """Token ids of a text, `[N]` int64, for `perplexity`.

    No special token is added but the one at the beginning, and never twice.

    Args:
        tokenizer: a `transformers` tokenizer.
        text: the text.
        max_length: keep the first `max_length` tokens, the beginning-of-sequence token counted.
        bos: `"auto"`: begin with the beginning-of-sequence token if the tokenizer by itself does; `"always"`;
            `"never"`.

    Raises:
        DataError: fewer than two tokens, or `bos="always"` with a tokenizer that has no such token.
    """
    if bos not in ("auto", "always", "never"):
        raise DataError(f'bos={bos!r} is not "auto", "always" or "never"')
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be 2 or more, not {max_length}: one token is given, one is predicted")
    begin = tokenizer.bos_token_id
    if bos == "always" and begin is None:
        raise DataError('this tokenizer has no beginning-of-sequence token; use bos="never"')
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    wanted = bos == "always" or (bos == "auto" and begin is not None and tokenizer("")["input_ids"][:1] == [begin])
    if wanted and ids[:1] != [begin]:
        ids = [begin, *ids]
    ids = ids[:max_length]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; at least 2 are needed, one to give and one to predict")
    return torch.tensor(ids, dtype=torch.long)


def _checked_ids(model: PreTrainedModel, token_ids: Tensor | Sequence[int]) -> Tensor:
    """`[1, N]` on the model's device."""
    ids = torch.as_tensor(token_ids)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise DataError(
            f"token_ids must be one text, shape [N] or [1, N], not {list(ids.shape)}; score texts one after another"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"token_ids must be integers, not {ids.dtype}")
    if ids.shape[1] < 2:
        raise DataError(f"the text has {ids.shape[1]} tokens; at least 2 are needed, one to give and one to predict")
    vocabulary = hf.text_config(model).vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(f"token ids must lie in [0, {vocabulary}); this text has {int(ids.min())} to {int(ids.max())}")
    return ids.long().to(model.device)


def _checked_mode(
    model: PreTrainedModel, ids: Tensor, policy: Policy, chunk_size: int, mode: str, positions: str
) -> str:
    """The mode to run."""
    if mode not in MODES:
        raise PolicyError(f"mode={mode!r} is not one of {', '.join(MODES)}")
    if chunk_size < 1:
        raise PolicyError(f"chunk_size must be 1 or more, not {chunk_size}")
    if mode in ("token", "one_pass") and chunk_size != 1:
        raise PolicyError(f'mode="{mode}" means one token per forward pass; use mode="chunked" with {chunk_size}')
    if chunk_size == 1 and policy.evicts and isinstance(policy.trigger, AfterPrefill):
        raise PolicyError(
            f"{policy.name} looks at the cache after prefill only, and with chunk_size=1 there is none, so it would "
            'never evict; build it with get_policy(..., when="every_forward")'
        )
    parallel = _parallel_reason(model, ids.shape[1])
    if policy.joint:
        parallel = parallel or f"{policy.name} cuts all layers together, so they cannot be run one after the other"
    reason = parallel or one_pass_reason(policy, positions)
    if mode == "one_pass" and reason:
        raise PolicyError(f'{reason}; use mode="auto"')
    if mode == "layerwise" and parallel:
        raise PolicyError(f'{parallel}; use mode="auto"')
    if mode != "auto":
        return mode
    if chunk_size > 1:
        return "chunked"
    if not reason:
        return "one_pass"
    return "token" if parallel else "layerwise"


def _parallel_reason(model: PreTrainedModel, length: int) -> str | None:
    """Why this model's keys depend on how many tokens a forward pass has; `None` when they do not."""
    config = hf.text_config(model)
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for entry in (rope, *rope.values()):
        kind = entry.get("rope_type") if isinstance(entry, dict) else None
        if kind in ("dynamic", "longrope"):
            trained = entry.get("original_max_position_embeddings") or config.max_position_embeddings
            if length > trained:
                return f"the rotary embedding of this model ({kind}) changes its frequencies after {trained} tokens"
    return None


def _sequential(
    model: PreTrainedModel, ids: Tensor, cache: SieveCache, chunk_size: int, progress: Progress | None
) -> tuple[Tensor, int]:
    """Feed chunk after chunk; returns the losses and the number of visible keys over all queries."""
    total = ids.shape[1] - 1
    losses, visible = [], 0
    for s in range(0, total, chunk_size):
        e = min(s + chunk_size, total)
        held = sum(layer.core.store.tokens for layer in cache.managed)
        logits = model(input_ids=ids[:, s:e], past_key_values=cache, use_cache=True).logits[0]
        losses.append(_losses(logits, ids[0, s + 1 : e + 1]))
        heads = sum(layer.core.store.heads for layer in cache.managed)
        visible += held * (e - s) + heads * (e - s) * (e - s + 1) // 2
        if progress is not None:
            progress(e, total)
    return torch.cat(losses), visible


def _parallel(
    model: PreTrainedModel, ids: Tensor, cache: SieveCache, mode: str, chunk_size: int, progress: Progress | None
) -> tuple[Tensor, int]:
    """One forward pass whose managed layers step through the text by themselves."""
    layers: list[ParallelLayer] = []
    finished = 0

    def done() -> None:
        nonlocal finished
        finished += 1
        if progress is not None:
            progress(finished, len(layers))

    for layer in cache.managed:
        layers.append(
            OnePassLayer(layer.core, done) if mode == "one_pass" else SteppedLayer(layer.core, done, chunk_size)
        )
        cache.layers[layer.core.layer_idx] = layers[-1]
    logits = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits[0]
    return _losses(logits, ids[0, 1:]), sum(layer.visible for layer in layers)


def _holdings(cache: SieveCache, fed: int) -> tuple[int, int, int, int]:
    """Heads over all managed layers, keys held, and the bytes of keys and values held and fed."""
    layers = cache.managed
    if all(isinstance(layer, OnePassLayer) for layer in layers):
        counts = [(x.heads, x.held, x.bytes_per_token) for x in layers if isinstance(x, OnePassLayer)]
        held_bytes = sum(held * each for _, held, each in counts)
        return (
            sum(heads for heads, _, _ in counts), sum(held for _, held, _ in counts),
            held_bytes, sum(fed * heads * each for heads, _, each in counts),
        )  # fmt: skip
    report = cache.report()
    stores = [layer.core.store for layer in layers]
    held_bytes = report["bytes_held"] - report["bytes_spare"]
    return sum(s.heads for s in stores), sum(s.tokens for s in stores), held_bytes, report["bytes_full"]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`[T]` float64 cross-entropy of `[T, vocabulary]` logits, in float32 at least, a slice of rows at a time."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = zip(logits.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=True)
    return torch.cat([cross_entropy(x.to(wide), y, reduction="none").double() for x, y in rows])
