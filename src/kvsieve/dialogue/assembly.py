"""Procedural videos of an assembly, with the dialogue that belongs to them: what mini-vlm is trained and tested on.

A task is a list of parts, known from the user's instruction alone. The picture is 48 pixels wide and high: above, a
board of ten places, filled in order; below, a tray in which loose parts lie and a hand carries the next one. A step
ends in the first frame that shows its part in place with the hand gone: a hand that holds the part over its place has
not let go yet. The line to say then names the part that comes next. The camera shakes, the light differs from video
to video and drifts, parts do not lie straight, and no place lines up with the patches of the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOURS", "HELD_OUT", "PLACES", "SHAPES", "SIDE", "SYSTEM", "AssemblyVideo", "Task"]

SIDE = 48
"""Width and height of a frame in pixels."""
PLACES = 10
"""Places on the board, and parts of the longest task."""
HELD_OUT = 1_000_000_000
"""Seeds from here on are never trained on."""
SYSTEM = "watch the assembly and name the next part"
"""What the system line says at the start of every video."""
REQUEST = "summarize progress"
"""What asks for a summary."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (160, 50, 190),
    "orange": (240, 130, 20),
    "white": (235, 235, 235),
    "cyan": (40, 210, 220),
}
SHAPES = ("circle", "square", "diamond", "cross", "bar", "ring")
_SKIN = (205, 160, 130)
_PART = 8
_MARGIN = 4
_COLUMNS, _PITCH_X, _PITCH_Y = 5, 9, 11

Part = tuple[str, str]
Frame = NDArray[np.uint8]


def _masks() -> dict[str, NDArray[np.bool_]]:
    y, x = np.mgrid[0:_PART, 0:_PART] - (_PART - 1) / 2
    far, diamond = np.hypot(y, x), np.abs(y) + np.abs(x)
    return {
        "circle": far <= 3.6,
        "square": np.maximum(np.abs(y), np.abs(x)) <= 2.6,
        "diamond": diamond <= 3.6,
        "cross": (np.minimum(np.abs(y), np.abs(x)) < 1) & (np.maximum(np.abs(y), np.abs(x)) <= 3),
        "bar": (np.abs(y) < 2) & (np.abs(x) <= 4),
        "ring": (far <= 3.8) & (far >= 1.8),
    }


_MASKS = _masks()
_SHADES = {name: np.array(colour, np.float32) for name, colour in COLOURS.items()}


@dataclass(frozen=True)
class Task:
    """Parts to place, in order, and everything that is said about them.

    Attributes:
        parts: colour and shape of each.
    """

    parts: tuple[Part, ...]

    @staticmethod
    def draw(rng: random.Random, steps: int) -> Task:
        """A task of `steps` different parts."""
        everything = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        return Task(tuple(rng.sample(everything, steps)))

    @property
    def instruction(self) -> str:
        """What the user says at the start: `"task 1 red circle 2 blue square ..."`."""
        return "task " + " ".join(f"{i} {colour} {shape}" for i, (colour, shape) in enumerate(self.parts, 1))

    def line(self, done: int) -> str:
        """What is to be said when step `done` is finished."""
        if done == len(self.parts):
            return f"step {done} done all finished"
        return f"step {done} done now place {done + 1} {' '.join(self.parts[done])}"

    def summary(self, done: int) -> str:
        """What a summary is to say after `done` steps: all that is needed to go on."""
        return f"{self.instruction} done {done}"


@dataclass(frozen=True)
class AssemblyVideo:
    """One assembly.

    Attributes:
        seed: decides everything that is not given here.
        steps: parts of the task, at most `PLACES`; drawn from 4 to `PLACES` if not given.
        gap: fewest and most frames from one step to the next.
        start: steps already done in the first frame.
        tail: frames after the last step.
        fps: frames per second.
    """

    seed: int
    steps: int | None = None
    gap: tuple[int, int] = (4, 10)
    start: int = 0
    tail: int = 3
    fps: float = 2.0

    @cached_property
    def task(self) -> Task:
        """What is assembled."""
        rng = random.Random(self.seed)
        return Task.draw(rng, self.steps or rng.randint(4, PLACES))

    @cached_property
    def events(self) -> dict[int, int]:
        """Frame in which a step ends, and how many are done then."""
        return self._filmed[1]

    @cached_property
    def frames(self) -> Frame:
        """`[frames, SIDE, SIDE, 3]` uint8."""
        return self._filmed[0]

    @cached_property
    def _filmed(self) -> tuple[Frame, dict[int, int]]:
        rng = random.Random(self.seed + 1)
        camera = _Camera(self.seed)
        shots: list[Frame] = []
        events: dict[int, int] = {}
        parts = self.task.parts
        for step in range(self.start, len(parts)):
            length = rng.randint(*self.gap)
            carried = rng.randint(1, max(1, length - 1))
            hovering = rng.randint(0, min(3, carried))
            for i in range(1, length):
                left = length - i
                hand = None
                if left <= hovering:
                    hand = _over(step, rng)
                elif left <= carried:
                    hand = (rng.uniform(0, SIDE - _PART), rng.uniform(26, 34))
                shots.append(camera.shot(parts[:step], hand, parts[step]))
            events[len(shots)] = step + 1
            shots.append(camera.shot(parts[: step + 1], None, None))
        shots += [camera.shot(parts, None, None) for _ in range(self.tail)]
        return np.stack(shots), events

    def record(self) -> dict[str, Any]:
        """The video as a record for the runner: `video_id`, `frames` (`[frames, SIDE, SIDE, 3]`), `conversation`,
        `fps`."""
        turns: list[dict[str, Any]] = [
            {"from": "system", "timestamp": 0.0, "value": SYSTEM},
            {"from": "user", "timestamp": 0.0, "value": self.task.instruction},
        ]
        for frame, done in self.events.items():
            turns.append({"from": "assistant", "timestamp": frame / self.fps, "value": self.task.line(done)})
        return {
            "video_id": f"assembly-{self.seed}",
            "dataset": "assembly",
            "frames": self.frames,
            "conversation": turns,
            "fps": self.fps,
        }


def _place(index: int) -> tuple[float, float]:
    """Left and upper edge of a part that lies straight in place `index`."""
    row, column = divmod(index, _COLUMNS)
    return 2 + column * _PITCH_X, 3 + row * _PITCH_Y


def _over(index: int, rng: random.Random) -> tuple[float, float]:
    x, y = _place(index)
    return x + rng.uniform(-2, 2), y + rng.uniform(-1, 3)


class _Camera:
    """Draws what one camera sees of one assembly."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        draw = self.rng
        self.light = float(draw.uniform(0.75, 1.15))
        self.tint = draw.uniform(0.92, 1.08, 3).astype(np.float32)
        self.ground = draw.uniform(20, 45), draw.uniform(50, 80)
        self.lying = {i: draw.uniform((-0.5, -0.5), (0.9, 1.5)) for i in range(PLACES)}
        shapes, colours = list(SHAPES), list(COLOURS)
        self.loose = [
            (draw.uniform(0, SIDE - _PART), draw.uniform(27, SIDE - _PART), colours[draw.integers(len(colours))],
             shapes[draw.integers(len(shapes))])
            for _ in range(draw.integers(0, 4))
        ]  # fmt: skip

        self._still: tuple[int, NDArray[np.float32]] | None = None

    def still(self, board: tuple[Part, ...]) -> NDArray[np.float32]:
        """What does not move between two steps, with a margin for the shaking camera."""
        if self._still is not None and self._still[0] == len(board):
            return self._still[1]
        wide = SIDE + 2 * _MARGIN
        picture = np.full((wide, wide, 3), self.ground[0], np.float32)
        picture[_MARGIN + 25 :] = self.ground[1]
        for i in range(PLACES):
            left, top = (int(v) + _MARGIN for v in _place(i))
            picture[top - 1, left : left + _PART] += 14
            picture[top - 1 : top + _PART, left] += 14
        for x, y, colour, shape in self.loose:
            _draw(picture, x, y, (colour, shape))
        for i, part in enumerate(board):
            x, y = _place(i)
            dx, dy = self.lying[i]
            _draw(picture, x + dx, y + dy, part)
        self._still = len(board), picture
        return picture

    def shot(self, board: tuple[Part, ...], hand: tuple[float, float] | None, held: Part | None) -> Frame:
        """One frame: parts on the board, and a hand that holds a part."""
        picture = self.still(board)
        if hand is not None and held is not None:
            picture = picture.copy()
            x, y = hand
            top, left = round(y) + _MARGIN, round(x) + _MARGIN
            picture[top + 4 : top + 14, left + 1 : left + 7] = _SKIN
            _draw(picture, x, y, held)
        draw = self.rng
        dx, dy = draw.integers(_MARGIN - 1, _MARGIN + 2, 2)
        picture = picture[dy : dy + SIDE, dx : dx + SIDE]
        self.light = float(np.clip(self.light + draw.normal(0, 0.01), 0.7, 1.2))
        picture = picture * (self.light * self.tint) + draw.standard_normal(picture.shape, np.float32) * 6
        return np.clip(picture, 0, 255).astype(np.uint8)


def _draw(picture: NDArray[np.float32], x: float, y: float, part: Part) -> None:
    top, left = round(y) + _MARGIN, round(x) + _MARGIN
    patch = picture[top : top + _PART, left : left + _PART]
    patch[_MASKS[part[1]][: patch.shape[0], : patch.shape[1]]] = _SHADES[part[0]]
