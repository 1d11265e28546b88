"""What a stream was asked to keep, turned into policies once it is known how many tokens a frame has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..budgets import Bytes, EvictRatio, OfStream, Tokens
from ..errors import BudgetError, PolicyError
from ..ledger import Kind
from ..methods.evict3r import Evict3R
from ..methods.frame_attention import FrameAttention
from ..policy import Policy, get_policy
from ..protect import Protect
from ..shares import LayerVariance
from ..triggers import Between
from .aggregator import SPECIALS

__all__ = ["CAMERA_FRAMES", "STREAM_MODES", "StreamPlan"]

STREAM_MODES = ("causal", "window")
WINDOW = 5
"""Frames behind the newest one that a stream in window mode still sees, beside the first."""
CAMERA_FRAMES = 256
"""Frames whose camera tokens a stream keeps by default when it evicts."""


@dataclass(frozen=True)
class StreamPlan:
    """The settings of a `StreamSession`, checked as far as they can be without a frame."""

    mode: str
    num_frames: int | None = None
    use_kv_compression: bool = False
    eviction_ratio: float = 0.3
    importance_aggregation: str = "sum"
    use_layerwise_eviction: bool = False
    budget_ratio: float = 0.5
    temp: float = 0.5
    fidelity: str = "guaranteed"
    policy: Policy | None = None
    camera_policy: Policy | None = None
    special_frames: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in STREAM_MODES:
            raise PolicyError(f"a stream cannot run in mode {self.mode!r}; it must be one of {', '.join(STREAM_MODES)}")
        if self.fidelity not in ("guaranteed", "reference"):
            raise PolicyError(f'fidelity={self.fidelity!r} is not "guaranteed" or "reference"')
        for name in ("num_frames", "special_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PolicyError(f"{name} must be 1 or more, not {value}")
        for name in ("policy", "camera_policy"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Policy):
                raise PolicyError(f"{name} must be a Policy, such as get_policy('evict3r', budget=4096), not {value!r}")
        if self.policy is not None:
            self._check_policy(self.policy)
        elif self.use_layerwise_eviction:
            if self.num_frames is None:
                raise BudgetError(
                    "budget_ratio is a share of the whole stream: give num_frames, or, where the length is not known, "
                    'a budget that needs none, such as policy=get_policy("evict3r", budget=4096)'
                )
            OfStream(self.budget_ratio, self.num_frames)
            LayerVariance(self.temp)
        elif self.use_kv_compression:
            EvictRatio(self.eviction_ratio)
            FrameAttention(self.importance_aggregation)
        if self.camera_policy is not None and self.camera_policy.joint:
            raise PolicyError("camera_policy: the rounds of the camera head cannot be cut together; use another share")
        if self.fidelity == "reference" and (self.mode == "window" or not self.use_layerwise_eviction):
            raise PolicyError(
                'fidelity="reference" reproduces the published layer-wise eviction, which exists in causal mode with '
                "use_layerwise_eviction=True only"
            )

    def _check_policy(self, policy: Policy) -> None:
        if self.use_kv_compression or self.use_layerwise_eviction:
            raise PolicyError("give either policy= or one of use_kv_compression and use_layerwise_eviction")
        needs = [n for n in ("wants_hidden", "wants_rope") if getattr(policy.scorer, n)]
        if needs:
            raise PolicyError(
                f"{policy.name} reads hidden states or rotary positions of a text model and cannot run in a stream"
            )
        if self.special_frames is None and policy.protect.kinds_recent is not None:
            object.__setattr__(self, "special_frames", policy.protect.kinds_recent)

    @property
    def window(self) -> int | None:
        """Frames behind the newest one that stay in view; `None` for all."""
        return WINDOW if self.mode == "window" else None

    @property
    def evicts(self) -> bool:
        """Whether anything but age makes tokens leave."""
        return self.policy.evicts if self.policy is not None else self.use_kv_compression or self.use_layerwise_eviction

    def trunk(self, tokens: int, each: int) -> Policy:
        """The policy of the trunk's layers.

        Args:
            tokens: tokens of a frame.
            each: bytes of one token's key and value over all layers, rows and heads.

        Raises:
            BudgetError: the budget is below what is protected.
        """
        protect = Protect(kinds=(int(Kind.SPECIAL),), kinds_recent=self.special_frames, segments=(0,))
        if self.policy is not None:
            protect = replace(self.policy.protect, kinds=protect.kinds, segments=(0,), kinds_recent=self.special_frames)
            return self._bounded(replace(self.policy, protect=protect), tokens, each) if self.evicts else self.policy
        if self.use_layerwise_eviction:
            assert self.num_frames is not None
            budget = OfStream(self.budget_ratio, self.num_frames * tokens)
            policy = Policy(Evict3R(self.temp), budget, protect, share=LayerVariance(self.temp))
            if self.fidelity == "reference":
                published = LayerVariance(self.temp, as_published=True)
                return replace(policy, share=published, trigger=Between(tokens, self.num_frames * tokens))
            return self._bounded(policy, tokens, each)
        if self.use_kv_compression:
            return Policy(FrameAttention(self.importance_aggregation), EvictRatio(self.eviction_ratio), protect)
        return get_policy("full")

    def camera(self) -> Policy:
        """The policy of the camera head's layers, where a frame is one token."""
        if self.camera_policy is not None:
            return self.camera_policy
        if not self.evicts or self.window is not None or self.fidelity == "reference":
            return get_policy("full")
        return get_policy("sink_recent", sink_tokens=1, budget=CAMERA_FRAMES)

    def _bounded(self, policy: Policy, tokens: int, each: int) -> Policy:
        """With the special tokens of as many frames protected as the budget is to hold, and checked against it."""
        budget = policy.budget
        if isinstance(budget, Bytes):
            kept: float = budget.tokens(each, exact=True, room=tokens)
        elif isinstance(budget, Tokens):
            kept = budget.n
        elif isinstance(budget, OfStream):
            kept = budget.kept * budget.tokens
        else:
            return policy
        frames = policy.protect.kinds_recent
        if frames is None:
            known = (self.num_frames or 1) - 1
            frames = max(known, int(kept - tokens - policy.protect.recent) // (2 * SPECIALS), 1)
        guard = replace(policy.protect, kinds_recent=frames)
        whole, part = divmod(guard.recent, tokens)  # frames among the newest tokens, whose special tokens are there too
        apart = SPECIALS * (frames - whole) - max(0, part - (tokens - SPECIALS))
        least = tokens + guard.recent + max(0, apart)
        if int(kept) >= least:
            return replace(policy, protect=guard)
        if isinstance(budget, Bytes):
            say = f"{(least + tokens) * each} bytes"
        elif isinstance(budget, OfStream):
            say = f"budget_ratio={-(-1000 * least // budget.tokens) / 1000:g} ({least} tokens per layer)"
        else:
            say = f"{least} tokens per layer"
        specials = f"the special tokens of {frames} more ({SPECIALS} each)"
        beside = f"the {guard.recent} newest and {specials}" if guard.recent else specials
        raise BudgetError(
            f"{policy.name}: {int(kept)} tokens per layer cannot hold the first frame ({tokens} tokens) and {beside}; "
            f"the smallest legal budget here is {say}"
        )
