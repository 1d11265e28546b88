"""A model that watches a video frame by frame and speaks when there is something to say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError, PolicyError
from .context import StreamContext, greedy, sampler
from .factory import ContextStrategyFactory
from .frame_output import FrameOutput, prediction_of
from .predictions import Summary
from .records import Turn, VideoRecord, parse_record
from .script import Script, frames_of, name_of, script_of
from .strategies import BaseContextStrategy, SummarizeAndDrop
from .transitions import Transitions, prompts_of
from .vlm import VisionLanguageModel, dtype_of

__all__ = ["VLMStreamRunner"]


@dataclass
class _Stream:
    """What belongs to one video while it runs."""

    record: VideoRecord
    context: StreamContext
    generator: torch.Generator
    transitions: Transitions
    script: Script
    lines: list[Turn]
    heard: bool = False
    initial: list[str] = field(default_factory=list)
    frame: int = 0
    frame_tokens: int = 0
    summaries: list[Summary] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)


class VLMStreamRunner:
    """Runs a vision-language model over videos under a context strategy.

    Every frame enters the cache. After each one the model is silent, if it gives silence at least
    `not_talk_threshold`, or speaks; with `speak="transitions"` it speaks where a step of the task begins instead.

    Args:
        model_name: a bundled model (`"mini-vlm"`), a folder, a model of the hub, or a `VisionLanguageModel`.
        eval_name: a name for the run, kept with the results.
        device: `"cpu"`, `"cuda"`.
        torch_dtype: of the weights, such as `"bfloat16"`; by default float32 on the CPU and bfloat16 elsewhere.
        max_new_tokens: most tokens of a line.
        temperature: 0 takes the most probable token; above 0 tokens are drawn.
        top_p: share of probability that tokens are drawn from.
        do_sample: False takes the most probable token whatever the temperature.
        transition_detection_prompt: what asks the model for the present step, where it has to find out itself. The
            picture comes in front of it; an `<image>` of its own is left out.
        dialogue_generation_prompt: a user's line put before the reply at a transition; `{prev_substep}` and
            `{curr_substep}` are filled in, and an `<image>` is left out, as the frame has been seen. By default there
            is none.
        fps: frames per second of videos that do not say.
        not_talk_threshold: silence from this probability on.
        speak: `"model"`: the model decides at every frame. `"transitions"`: it speaks where a step begins. The two
            prompts are for the latter.
        use_gt_substeps: take the steps from the video's annotations; else the model is asked at every frame.
        cache_dir: where downloads are kept.
        context_strategy_type: see `ContextStrategyFactory`, or a strategy.
        context_strategy_config: its options.
        max_seq_len: option of the strategy, if not among them.
        reserved_seq_len: option of the strategy, if not among them.
        use_kv_cache: False computes the initial context afresh for every frame and keeps nothing else; only for the
            strategy `none`, and an initial context without frames.
        use_knowledge: put the recipe of a record, where it has one, behind the system line.
        split_images: cut frames into tiles.
        seed: of what is drawn.

    A `VisionLanguageModel` lies on its device already, with its weights and its way of cutting frames: `device`,
    `torch_dtype`, `cache_dir` and `split_images` are left out with one, or say what it has.

    Attributes:
        vlm: the model.
        strategy: what to do when the context is full.
        context: what the model remembers of the video that was watched last.

    Raises:
        PolicyError: an option that is unknown or outside its range.
        BudgetError: options that cannot be met together.
        KvsieveError: the model or the device is not there.
        UnsupportedModelError: the model has no vision, or is of an unknown kind.
    """

    def __init__(
        self,
        model_name: str | Path | VisionLanguageModel = "mini-vlm",
        eval_name: str = "vlm_baseline",
        device: str = "cpu",
        torch_dtype: str | torch.dtype | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 0.9,
        do_sample: bool = True,
        transition_detection_prompt: str = "",
        dialogue_generation_prompt: str = "",
        fps: float | None = None,
        not_talk_threshold: float = 0.5,
        speak: str = "model",
        use_gt_substeps: bool = True,
        cache_dir: str | None = None,
        context_strategy_type: str | BaseContextStrategy = "none",
        context_strategy_config: Mapping[str, Any] | None = None,
        max_seq_len: int | None = None,
        reserved_seq_len: int | None = None,
        use_kv_cache: bool = True,
        use_knowledge: bool = False,
        split_images: bool = False,
        seed: int = 0,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or not 0 <= not_talk_threshold <= 1:
            raise PolicyError(
                "max_new_tokens must be 1 or more, temperature 0 or more, top_p in (0, 1] and not_talk_threshold in "
                f"[0, 1], not {max_new_tokens}, {temperature}, {top_p} and {not_talk_threshold}"
            )
        if speak not in ("model", "transitions"):
            raise PolicyError(f'speak={speak!r} is not "model" or "transitions"')
        self.eval_name, self.fps, self.seed = eval_name, fps, seed
        self.max_new_tokens, self.top_p = max_new_tokens, top_p
        self.temperature = temperature if do_sample else 0.0
        self.not_talk_threshold, self.speak, self.use_gt_substeps = not_talk_threshold, speak, use_gt_substeps
        self.question, self.prompt = prompts_of(
            transition_detection_prompt, dialogue_generation_prompt, speak == "transitions", use_gt_substeps
        )
        self.use_kv_cache, self.use_knowledge = use_kv_cache, use_knowledge
        options = dict(context_strategy_config or {})
        for name, value in {"max_seq_len": max_seq_len, "reserved_seq_len": reserved_seq_len}.items():
            if value is not None:
                options.setdefault(name, value)
        if isinstance(context_strategy_type, str):  # before a model is loaded, which may take long
            ContextStrategyFactory.create_strategy(context_strategy_type, **options)
        if isinstance(model_name, VisionLanguageModel):
            model_name.check_same(device, dtype_of(torch_dtype), cache_dir, split_images)
            self.vlm, self.model_name = model_name, str(model_name.model.name_or_path)
        else:
            self.vlm = VisionLanguageModel.load(model_name, device, dtype_of(torch_dtype), cache_dir, split_images)
            self.model_name = str(model_name)
        self.strategy = self._strategy(context_strategy_type, options)
        self.context: StreamContext | None = None

    def _strategy(self, kind: str | BaseContextStrategy, options: dict[str, Any]) -> BaseContextStrategy:
        if kind == SummarizeAndDrop.name and options.get("summary_prompt") is None:
            options["summary_prompt"] = self._trained_prompt
        if isinstance(kind, BaseContextStrategy) and options:
            raise PolicyError(f"{kind!r} is a strategy with its options already; leave out {', '.join(options)}")
        made = (
            kind if isinstance(kind, BaseContextStrategy) else ContextStrategyFactory.create_strategy(kind, **options)
        )
        if made.needs_cache and not self.use_kv_cache:
            raise PolicyError(f"{made.name} needs a cache; use_kv_cache=False goes with the strategy none alone")
        if not self.use_kv_cache and (made.positions == "original" or made.initial == "first_turn"):
            raise PolicyError(
                f"use_kv_cache=False counts positions from the initial context, which has no frames; it does not go "
                f"with positions={made.positions!r} and initial={made.initial!r}"
            )
        if made.reserved_seq_len < self.max_new_tokens and made.name != "full":
            raise PolicyError(
                f"reserved_seq_len={made.reserved_seq_len} has no room for a reply of max_new_tokens="
                f"{self.max_new_tokens}; raise the one or lower the other"
            )
        return made

    @property
    def _trained_prompt(self) -> str | None:
        """What the model was trained to be asked for a summary with, if it was."""
        return getattr(self.vlm.model.config, "summary_prompt", None)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what is said, as JSON values."""
        names = ["max_new_tokens", "temperature", "top_p", "not_talk_threshold", "speak", "use_gt_substeps"]
        names += ["use_kv_cache", "use_knowledge", "seed", "eval_name", "fps", "question", "prompt"]
        out: dict[str, Any] = {"model": self.model_name, "dtype": str(self.vlm.model.dtype).removeprefix("torch.")}
        out["split_images"] = self.vlm.split_images
        out |= {name: getattr(self, name) for name in names}
        return out | {"strategy": self.strategy.label, "strategy_settings": self.strategy.settings}

    # ---- running

    def run_inference_on_video(self, video: Mapping[str, Any] | VideoRecord) -> dict[str, Any]:
        """Watch one video.

        Args:
            video: `{video_id, frames, conversation, fps}`, see `parse_record`, or a record.

        Returns:
            `video_id`; `predictions`: a `FrameOutput` for every frame; `prediction`: the same for files and scores, a
            `VideoPrediction` with `numbers` on time and memory.

        Raises:
            DataError: the video cannot be used; the message says what is wrong with it.
            BudgetError: its initial context does not fit.
        """
        record = video if isinstance(video, VideoRecord) else parse_record(video, fps=self.fps)
        outputs = list(self.stream(record))  # at least one: frames without end or beginning are refused
        context = self.context
        assert context is not None
        prediction = prediction_of(record, outputs, context)
        return {"video_id": record.video_id, "predictions": outputs, "prediction": prediction}

    @torch.inference_mode()
    def stream(self, video: Mapping[str, Any] | VideoRecord) -> Iterator[FrameOutput]:
        """Watch a video and hand out every frame's output as it comes; for streams without an end. The video need not
        say what the assistant is to say.

        Raises:
            DataError: see `run_inference_on_video`.
            BudgetError: see `run_inference_on_video`.
        """
        record = video
        if not isinstance(record, VideoRecord):
            record = parse_record(record, fps=self.fps, need_references=False)
        context = self.context = StreamContext(self.vlm, self.strategy)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        steps = Transitions(record, None if self.use_gt_substeps else self.vlm, self.question)
        if self.speak == "transitions" and self.use_gt_substeps and not record.substeps:
            raise DataError(
                f"{name_of(record)}: there are no annotated steps (dst_annotations) to speak at; add them, let the "
                'model find them with use_gt_substeps=False, or let it decide with speak="model"'
            )
        script = script_of(record, self.use_knowledge)
        state = _Stream(record, context, generator, steps, script, list(script.turns))
        index = -1
        for index, frame in enumerate(frames_of(record)):
            state.frame = index
            yield self._step(state, frame)
        wanted = record.num_frames or 1
        if index + 1 < wanted:
            raise DataError(f"{name_of(record)}: the frames end after {index + 1}, there should be {wanted}")

    def _step(self, state: _Stream, frame: NDArray[np.uint8]) -> FrameOutput:
        """One frame, with the lines that come before it."""
        begun = time.perf_counter()
        context, fmt = state.context, self.vlm.format
        picture = self.vlm.picture(frame)
        shown = self.vlm.encode(fmt.before + picture.text + fmt.after)
        state.frame_tokens = len(shown)
        if state.frame and not self.use_kv_cache:
            self._afresh(state)
        elif context.closed and not self.strategy.needs_cache:
            context.forget()
        while state.lines and state.lines[0].frames_before <= state.frame:
            self._line(state, state.lines.pop(0))
        context.open()
        if not context.closed and self.strategy.initial != "first_turn" and not self._waits(state):
            context.close_initial(len(shown))
        self._make_room(state, len(shown))
        logits = context.feed(shown, (picture,))
        gen, silence = self._speak(state, logits, frame)
        if not context.closed and self.strategy.initial == "first_turn":
            context.close_initial(len(shown))
        out = FrameOutput(
            gen,
            state.script.due.get(state.frame, ""),
            state.frame,
            state.record.time_of(state.frame),
            silence,
            context.length,
            time.perf_counter() - begun,
            tuple(state.events),
            tuple(state.summaries),
        )
        state.events, state.summaries = [], []
        return out

    def _waits(self, state: _Stream) -> bool:
        """Whether the initial context goes on until the user has spoken, which is still to come."""
        if self.strategy.initial != "user_turn" or state.heard:
            return False
        end = math.inf if state.record.num_frames is None else state.record.num_frames
        return any(turn.role == "user" and turn.frames_before < end for turn in state.lines)

    def _afresh(self, state: _Stream) -> None:
        """Compute the initial context once more, in the place of everything."""
        context = state.context
        if not context.closed:
            raise DataError(
                f"{name_of(state.record)}: the initial context contains frames, which use_kv_cache=False cannot "
                "compute afresh"
            )
        context.begin()
        for text in state.initial:
            context.feed(self.vlm.encode(context.opened(text)))
        context.open()
        context.close_initial(state.frame_tokens)

    def _line(self, state: _Stream, turn: Turn) -> None:
        """Feed a line of the system or the user."""
        context = state.context
        if turn.role == "user" and self.strategy.initial == "system" and not context.closed:
            context.open()
            context.close_initial(state.frame_tokens)
        text = self.vlm.format.turn(turn.role, turn.text)
        if not context.closed:
            state.initial.append(text)
        ids = self.vlm.encode(context.opened(text))
        if self.vlm.image_token in ids:
            raise DataError(f"{name_of(state.record)}: the line {turn.text!r:.80} asks for a picture, and has none")
        self._make_room(state, len(ids))
        context.feed(ids)
        state.heard = state.heard or turn.role == "user"

    def _make_room(self, state: _Stream, incoming: int) -> None:
        context = state.context

        def say(prompt: str | None, most: int) -> str:
            return self._summary(state, prompt, most)

        told = {"system_prompt": state.script.system, "task_knowledge": state.script.knowledge}
        dropped = context.make_room(incoming, state.frame_tokens, say=say, **told)
        if dropped:
            when = {"frame_idx_in_stream": state.frame, "timestamp_in_stream": state.record.time_of(state.frame)}
            state.events.append({"kind": "compression", **when, "strategy": self.strategy.label, **context.latest})

    def _summary(self, state: _Stream, prompt: str | None, most: int) -> str:
        """Ask the model, from its cache, what has happened so far."""
        context = state.context
        request = prompt or self._trained_prompt or SummarizeAndDrop.DEFAULT_PROMPT
        ids = self.vlm.encode(self.vlm.format.turn("system", request) + "Assistant:")
        logits = context.feed(ids).clone()
        logits[self.vlm.format.silence] = -torch.inf  # an answer was asked for
        text = self.vlm.decode(context.reply(logits, most, greedy))
        when = state.record.time_of(state.frame)
        state.summaries.append(Summary(when, state.frame, text, request))
        return text

    # ---- speaking

    def _speak(self, state: _Stream, logits: Tensor, frame: NDArray[np.uint8]) -> tuple[str, float | None]:
        """What is said after a frame, and the probability of silence."""
        context, fmt, silence = state.context, self.vlm.format, None
        if self.speak == "transitions":
            quiet = not state.transitions.begins(state.frame, frame)
        else:
            silence = float(logits.softmax(-1)[fmt.silence])
            if not math.isfinite(silence):
                raise DataError(f"{name_of(state.record)}: the model's output at frame {state.frame} is not a number")
            quiet = silence >= self.not_talk_threshold
        if quiet:
            context.pending = self._silence()
            return "", silence
        if self.speak == "transitions" and self.prompt:
            logits = self._asked(state)
        logits = logits.clone()
        logits[fmt.silence] = -torch.inf
        choose = sampler(self.temperature, self.top_p, state.generator) if self.temperature else greedy
        return self.vlm.decode(context.reply(logits, self.max_new_tokens, choose)), silence

    def _asked(self, state: _Stream) -> Tensor:
        """Let the frame pass in silence, put the question of a transition, and return what the reply begins with."""
        steps, context = state.transitions, state.context
        context.pending = self._silence()
        text = self.prompt.format(prev_substep=steps.before, curr_substep=steps.step)
        ids = self.vlm.encode(self.vlm.format.turn("user", text) + "Assistant:")
        self._make_room(state, len(ids))
        return context.feed(ids)

    def _silence(self) -> list[int]:
        """What stands in the stream where nothing was said."""
        fmt = self.vlm.format
        return [fmt.silence, *(self.vlm.encode("\n") if fmt.after else [])]
