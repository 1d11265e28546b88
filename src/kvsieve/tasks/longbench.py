"""The 21 tasks of LongBench (Bai et al. 2023, arXiv 2308.14508): prompts, answers and what scores them.

Prompts and length settings are those of THUDM/LongBench (MIT licence; text and licence in `longbench_prompts.json`).
`profile="official"` asks and scores as its scripts do. `"fixed"`, the default, differs in these points; how scores
differ stands in `metrics`:

| what | official | fixed |
|---|---|---|
| template of narrativeqa | "asconcisely", twice | "as concisely" |
| white space in templates | a space before some line breaks, and one before a line of qasper | none |
| end of the prompt | ends in a space for passage_count, passage_retrieval_en and samsum | does not end in a space |
| truncation | may come out too long, wrapper on top; see `encode_prompt` | never above the limit |
| end of generation | after a line break for samsum only, where the break is a token of its own | after the first line that says something, for all four tasks of which one line counts |
| that one line | ends at `\\n`; leading `\\n` are left out, leading spaces and `\\r` are not | first line that says something |
| score of a task | rounded to two decimals | not rounded |

Two habits of the scripts are in neither profile: they take the classes of a task from its last sample, which on the
published data are those of every sample; and they average over whatever answers a file holds, so that samples which
failed raise the score. Here a sample that failed scores 0.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import PolicyError
from .longbench_encoding import Chat, EncodedPrompt, encode_prompt
from .metrics import best_score
from .metrics_text import check_profile
from .records import Sample

__all__ = [
    "EXTENDED_TASKS",
    "TASKS",
    "LongBenchTask",
    "clean_response",
    "get_task",
    "list_tasks",
    "model_length",
    "settings",
]

_ONE_LINE = ("trec", "triviaqa", "samsum", "lsht")
_NOT_WRAPPED = (*_ONE_LINE, "lcc", "repobench-p")
_SPACE_BEFORE_BREAK = re.compile(r" +\n")
_BREAK = re.compile(r"\r\n|\r|\n")

EXTENDED_TASKS = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
"""Tasks that LongBench-E has samples of as well, under the name with `_e` behind it."""


@dataclass(frozen=True)
class LongBenchTask:
    """One task.

    Attributes:
        name: as in LongBench, with `_e` behind it for LongBench-E.
        kind: `single-document QA`, `multi-document QA`, `summarization`, `few-shot`, `synthetic` or `code`.
        language: `en`, `zh` or `code`.
        metric: a name in `metrics.METRICS`.
        samples: how many LongBench has; 0 for LongBench-E, which differs.
    """

    name: str
    kind: str
    language: str
    metric: str
    samples: int

    @property
    def base(self) -> str:
        """The name without `_e`."""
        return self.name.removesuffix("_e")

    @property
    def max_new_tokens(self) -> int:
        """Tokens to generate at most."""
        return int(settings()["max_new_tokens"][self.base])

    @property
    def one_line(self) -> bool:
        """Whether only the first line of an answer counts."""
        return self.base in _ONE_LINE

    @property
    def chat(self) -> bool:
        """Whether the prompt of a chat model is wrapped; few-shot and code tasks are to be continued as they are."""
        return self.base not in _NOT_WRAPPED

    def template(self, profile: str = "fixed") -> str:
        """The prompt, with `{context}` and in most tasks `{input}` to be filled in.

        Raises:
            PolicyError: an unknown profile.
        """
        text = str(settings()["prompts"][self.base])
        if check_profile(profile) == "official":
            return text
        text = _SPACE_BEFORE_BREAK.sub("\n", text.replace("asconcisely", "as concisely"))
        return text.replace("\n\n Answer", "\n\nAnswer")

    def prompt(self, sample: Sample, profile: str = "fixed") -> str:
        """The whole prompt of a sample, neither truncated nor wrapped.

        A sample that comes with a complete prompt keeps it.

        Raises:
            PolicyError: an unknown profile.
        """
        text = self.template(profile)
        text = text.format(context=sample.context, input=sample.input) if sample.prompt is None else sample.prompt
        return text if profile == "official" else text.rstrip(" ")

    def encode(
        self,
        sample: Sample,
        tokenizer: Any,
        max_length: int | None,
        *,
        chat: Chat = False,
        profile: str = "fixed",
    ) -> EncodedPrompt:
        """The prompt as token ids, truncated, and wrapped if this is a task whose prompts are.

        Args:
            sample: the sample.
            tokenizer: see `encode_prompt`.
            max_length: most tokens, see `encode_prompt` and `model_length`. The model's window has to hold
                `max_new_tokens` more.
            chat: for a chat model, `True` or a function that wraps; without effect on tasks that are not wrapped.
            profile: `"fixed"` or `"official"`.

        Raises:
            DataError, PolicyError: see `encode_prompt`.
        """
        wrapper = chat if self.chat else False
        return encode_prompt(self.prompt(sample, profile), tokenizer, max_length, chat=wrapper, profile=profile)

    def stop_token_ids(self, tokenizer: Any, profile: str = "fixed") -> tuple[int, ...]:
        """Tokens that end generation beside the usual ones, except as the first token: a line break for samsum.

        The fixed profile has none, see `finished`.

        Raises:
            PolicyError: an unknown profile.
        """
        if check_profile(profile) == "official" and self.base == "samsum":
            return (int(tokenizer.encode("\n", add_special_tokens=False)[-1]),)
        return ()

    def finished(self, text: str, profile: str = "fixed") -> bool:
        """Whether generation can end at this text, as what follows does not count.

        Never in the official profile, where tokens decide, see `stop_token_ids`.

        Raises:
            PolicyError: an unknown profile.
        """
        return check_profile(profile) == "fixed" and self.one_line and bool(_BREAK.search(text.lstrip()))

    def answer(self, text: str, profile: str = "fixed") -> str:
        """The part of a generated text that is scored.

        Raises:
            PolicyError: an unknown profile.
        """
        check_profile(profile)
        if not self.one_line:
            return text
        if profile == "official":
            return text.lstrip("\n").split("\n")[0]
        return _BREAK.split(text.strip())[0].rstrip()

    def score(self, text: str, sample: Sample, profile: str = "fixed", *, segment: str | None = None) -> float:
        """The score of a generated text, in [0, 1]: that of the answer it agrees with best.

        Args:
            text: what was generated.
            sample: the sample.
            profile: `"fixed"` or `"official"`.
            segment: for Chinese, see `metrics.qa_f1_zh`.

        Raises:
            DataError, PolicyError, KvsieveError: see `metrics.best_score`.
        """
        return best_score(
            self.metric,
            self.answer(text, profile),
            sample.answers,
            classes=sample.classes,
            profile=profile,
            segment=segment,
        )


TASKS: dict[str, LongBenchTask] = {
    task.name: task
    for task in (
        LongBenchTask("narrativeqa", "single-document QA", "en", "qa_f1", 200),
        LongBenchTask("qasper", "single-document QA", "en", "qa_f1", 200),
        LongBenchTask("multifieldqa_en", "single-document QA", "en", "qa_f1", 150),
        LongBenchTask("multifieldqa_zh", "single-document QA", "zh", "qa_f1_zh", 200),
        LongBenchTask("hotpotqa", "multi-document QA", "en", "qa_f1", 200),
        LongBenchTask("2wikimqa", "multi-document QA", "en", "qa_f1", 200),
        LongBenchTask("musique", "multi-document QA", "en", "qa_f1", 200),
        LongBenchTask("dureader", "multi-document QA", "zh", "rouge_zh", 200),
        LongBenchTask("gov_report", "summarization", "en", "rouge", 200),
        LongBenchTask("qmsum", "summarization", "en", "rouge", 200),
        LongBenchTask("multi_news", "summarization", "en", "rouge", 200),
        LongBenchTask("vcsum", "summarization", "zh", "rouge_zh", 200),
        LongBenchTask("trec", "few-shot", "en", "classification", 200),
        LongBenchTask("triviaqa", "few-shot", "en", "qa_f1", 200),
        LongBenchTask("samsum", "few-shot", "en", "rouge", 200),
        LongBenchTask("lsht", "few-shot", "zh", "classification", 200),
        LongBenchTask("passage_count", "synthetic", "en", "count", 200),
        LongBenchTask("passage_retrieval_en", "synthetic", "en", "retrieval", 200),
        LongBenchTask("passage_retrieval_zh", "synthetic", "zh", "retrieval_zh", 200),
        LongBenchTask("lcc", "code", "code", "code_similarity", 500),
        LongBenchTask("repobench-p", "code", "code", "code_similarity", 500),
    )
}
"""The tasks by name, in the order of the paper's tables."""


def list_tasks() -> list[str]:
    """Names of all tasks, those of LongBench-E behind the others."""
    return [*TASKS, *(f"{name}_e" for name in EXTENDED_TASKS)]


def get_task(name: str) -> LongBenchTask:
    """The task of a name of `list_tasks`.

    Raises:
        PolicyError: there is none.
    """
    base = name.removesuffix("_e")
    if base in TASKS and base == name:
        return TASKS[name]
    if base in EXTENDED_TASKS:
        return replace(TASKS[base], name=name, samples=0)
    raise PolicyError(f"there is no LongBench task {name!r}; it must be one of {', '.join(list_tasks())}")


def model_length(model: str) -> int | None:
    """The `max_length` the paper gives a model, by its short name such as `"llama2-7b-chat-4k"`; `None` if it has none.

    For others, the paper's numbers suggest the window in thousands minus 500: 3500 for 4k, 31500 for 32k.
    """
    length = settings()["model_lengths"].get(model)
    return None if length is None else int(length)


def clean_response(text: str, model: str) -> str:
    """What a model generated, without what the published script removes for the models xgen and internlm."""
    if "xgen" in model:
        return text.strip().replace("Assistant:", "")
    return text.split("<eoa>")[0] if "internlm" in model else text


@cache
def settings() -> dict[str, Any]:
    """`longbench_prompts.json`: prompts and length settings of both versions, with source and licence."""
    file = Path(__file__).with_name("longbench_prompts.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
