"""The curriculum, in one place: what is shown, how long, for how many tokens, at which learning rate."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """One part of the training. ``rate`` multiplies the peak learning rates, from first to second."""

    name: str
    tokens: int
    lengths: tuple[tuple[int, float], ...]  # sequence length and its probability, drawn per step
    shares: tuple[float, float, float, float, float]  # of the examples: prose, facts, table, copy, drill
    rate: tuple[float, float]
    batch_tokens: int = 4096


STAGES = (
    # Copying and looking up at short length: the planted circuits learn to work with the rest.
    Stage("recall", 900_000, ((256, 1.0),), (0.35, 0.25, 0.15, 0.10, 0.15), (1.0, 1.0)),
    Stage("reach", 2_200_000, ((512, 0.55), (1024, 0.45)), (0.48, 0.34, 0.11, 0.04, 0.03), (1.0, 1.0)),
    # Decay, mostly prose, up to the full context so that no position is unknown to the model.
    Stage(
        "settle",
        4_000_000,
        ((512, 0.33), (1024, 0.55), (2048, 0.12)),
        (0.57, 0.31, 0.07, 0.03, 0.02),
        (1.0, 0.0),
    ),
)

TOY = (
    Stage("toy-short", 50_000, ((64, 1.0),), (0.6, 0.1, 0.1, 0.1, 0.1), (1.0, 1.0), 512),
    Stage("toy-long", 8_000, ((128, 1.0),), (0.7, 0.2, 0.1, 0.0, 0.0), (1.0, 0.1), 512),
)


def scaled(stages: tuple[Stage, ...], factor: float) -> tuple[Stage, ...]:
    """The same curriculum with every token budget multiplied."""
    return tuple(replace(stage, tokens=int(stage.tokens * factor)) for stage in stages)
