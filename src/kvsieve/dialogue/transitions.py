"""Where a step of a task begins: from the annotations of a video, or from what a model sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import PolicyError
from .context import StreamContext, greedy
from .factory import PolicyStrategy
from .records import Substep, VideoRecord
from .vlm import VisionLanguageModel

__all__ = ["QUESTION", "Transitions", "prompts_of"]

QUESTION = (
    "You are watching someone carry out a task. Which step is being done? Answer with the name of the step alone."
)
"""What asks a model for the present step, unless the caller has another question."""
_ANSWER = 50
"""Most tokens of the answer."""


class Transitions:
    """The steps of one video, as they begin.

    Annotated steps begin one by one, in the order of their times: neither a gap between two of them nor two steps of
    one name hide the second, and the first one counts. A model is asked at every frame, which it sees alone; a step
    begins when its answer is another than before.

    Args:
        record: the video.
        vlm: who is asked; by default nobody, and the annotations decide.
        question: what is asked.

    Attributes:
        step: name of the present step.
        before: name of the step before it.
    """

    def __init__(self, record: VideoRecord, vlm: VisionLanguageModel | None = None, question: str = QUESTION) -> None:
        self._record, self._vlm, self._question = record, vlm, question
        rows = [row for row in record.substeps if row.kind == "SUBSTEP"] or list(record.substeps)
        self._steps: list[Substep] = sorted(rows, key=lambda row: row.start)
        self.step = self.before = "nothing"

    def begins(self, index: int, frame: NDArray[np.uint8]) -> bool:
        """Whether a step begins at frame `index`, which looks like `frame` `[height, width, 3]`."""
        name = self._given(index) if self._vlm is None else self._seen(self._vlm, frame)
        if not name:
            return False
        self.before, self.step = self.step, name
        return True

    def _given(self, index: int) -> str:
        """The step that has begun since the last frame; of several, the last."""
        now, name = self._record.time_of(index), ""
        while self._steps and self._steps[0].start <= now:
            name = self._steps.pop(0).name
        return name

    def _seen(self, vlm: VisionLanguageModel, frame: NDArray[np.uint8]) -> str:
        """The present step, if it is a new one."""
        alone, picture = StreamContext(vlm, PolicyStrategy("full")), vlm.picture(frame)
        text = alone.opened(vlm.format.turn("user", picture.text + self._question) + "Assistant:")
        name = vlm.decode(alone.reply(alone.feed(vlm.encode(text), (picture,)), _ANSWER, greedy))
        return "" if name == self.step else name


def prompts_of(question: str, prompt: str, used: bool, annotated: bool) -> tuple[str, str]:
    """The question to put and the user's line to answer, without marks of pictures.

    Args:
        question: what asks the model for the present step; empty for the usual question.
        prompt: what asks for the line at a transition; may be empty.
        used: whether steps decide when to speak.
        annotated: whether the steps are known without asking.

    Raises:
        PolicyError: one that would never be used, or braces in `prompt` that mean nothing.
    """
    if (question or prompt) and not used:
        raise PolicyError('transition_detection_prompt and dialogue_generation_prompt go with speak="transitions"')
    if question and annotated:
        raise PolicyError("transition_detection_prompt goes with use_gt_substeps=False")
    question, prompt = (text.replace("<image>", "").strip() for text in (question, prompt))
    try:
        prompt.format(prev_substep="", curr_substep="")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise PolicyError(
            f"dialogue_generation_prompt may hold {{prev_substep}} and {{curr_substep}} and no other braces: {error!r}"
        ) from None
    return question or QUESTION, prompt
