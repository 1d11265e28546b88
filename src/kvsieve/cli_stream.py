"""`kvsieve stream`: a model reads or writes without end; a live line says what that costs, and whether it is sane."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_runs import Budget, Debug, Device, Dtype, Model, Options, Positions, Seed, load, make_contenders
from .errors import DataError, PolicyError

if TYPE_CHECKING:
    from torch import Tensor

    from .policy import Policy
    from .text.streaming import Stretch

__all__ = ["stream"]

_PROMPT = "The tide went out, and the little boat lay on the sand. The old man sat down beside it and mended his nets."
"""What writing begins with."""
_LAP = 4096
"""Tokens of the bundled text for a model that does not say what length it was trained for."""


def stream(
    model: Model = "mini-lm",
    policy: Annotated[str, typer.Option(help="One method; see `kvsieve methods`.")] = "streaming_llm",
    budget: Budget = None,
    option: Options = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text file to read over and over, or - for standard input, once. [default: as much of the Python "
            "language reference as the model was trained for]"
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write on from the text by sampling, once it is read.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="--write: 0 takes the likeliest token.")] = 1.0,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many. [default: at Ctrl-C]")] = None,
    chunk_size: Annotated[
        int, typer.Option("--chunk-size", "--chunk", help="Tokens per forward pass while reading.")
    ] = 16,
    every: Annotated[int, typer.Option(help="Tokens from one line to the next.")] = 512,
    positions: Positions = "slot",
    seed: Seed = 42,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[str | None, typer.Option(help="JSONL file for a row of every stretch.")] = None,
    debug: Debug = False,
) -> None:
    """Let a model read or write without an end, far past its trained length, in a cache that does not grow."""
    for name, value in (("tokens", tokens), ("chunk-size", chunk_size), ("every", every)):
        if value is not None and value < 1:
            raise PolicyError(f"--{name} must be 1 or more, not {value}")
    if not temperature >= 0.0:
        raise PolicyError(f"temperature must be 0 or more, not {temperature}")
    chosen = _policy(policy, budget or "1024", option, model, seed)
    if tokens is None and not _bounded(chosen, prompts=chunk_size > 1 and not write):
        raise PolicyError(
            f"{policy} with this budget keeps more and more of an endless stream, until the memory is full; say where "
            "to stop with --tokens, or give a budget of tokens or bytes that holds after every pass"
        )
    words = _PROMPT if write and text is None else _words(text)
    loaded, tokenizer = load(model, device, dtype)
    from .text.streaming import TokenStream, trained_length

    lap = _lap(words, text, tokenizer, trained_length(loaded)) if words is not None else []
    source: Iterable[int] = (
        chain(lap, cycle(lap[_begins(lap, tokenizer) :])) if words is not None else _typed(tokenizer)
    )
    run = TokenStream(loaded, chosen, positions=positions, seed=seed)
    if write:
        source = islice(lap or source, tokens)

        def stretches() -> Iterator[Stretch]:
            yield from run.read(source, chunk_size, every)
            if run.tokens:
                left = None if tokens is None else tokens - run.tokens
                yield from run.write(left, temperature, every)

        made = stretches()
    else:
        made = run.read(islice(source, tokens), chunk_size, every)
    view = _View(len(lap) - _begins(lap, tokenizer) if lap and not write else 0, tokenizer if write else None)
    _follow(made, view, None if output is None else Path(output))


def _policy(name: str, budget: str, option: list[str] | None, model: str, seed: int) -> Policy:
    """The one method that was asked for. A share of the tokens holds after every pass."""
    if "," in name or name.strip().lower() == "all":
        raise PolicyError(f"--policy names one method here, not {name!r}")
    found = make_contenders(name, budget, option, model)
    if len(found) > 2:
        raise PolicyError(f"--budget is one amount here, not {budget!r}")
    chosen = found[-1]
    options = {"when": "every_forward", **chosen.options} if isinstance(chosen.budget, float) else chosen.options
    return type(chosen)(chosen.label, chosen.name, chosen.budget, options).policy(seed, "stream")


def _bounded(policy: Policy, prompts: bool) -> bool:
    """Whether the cache stops growing. `prompts`: every pass has more than one token."""
    from .budgets import Bytes, Tokens
    from .triggers import AfterPrefill, EveryForward, EveryTokens, OverLength

    firing = (EveryForward, EveryTokens, OverLength, *([AfterPrefill] if prompts else []))
    return isinstance(policy.budget, (Bytes, Tokens)) and isinstance(policy.trigger, firing)


def _words(text: str | None) -> str | None:
    """What will be read over and over; None for standard input."""
    if text == "-":
        return None
    if text is None:
        from .text.data import python_reference

        try:
            return "\n\n".join(document.text for document in python_reference())
        except DataError:
            raise DataError("this Python comes without its language reference; give a text with --text") from None
    from .tasks.ruler_items import read_text

    return read_text(text)


def _lap(words: str, text: str | None, tokenizer: Any, trained: int | None) -> list[int]:
    """Token ids of the text, with the beginning-of-sequence token where the tokenizer wants one."""
    from .text import encode

    most = None if text is not None else trained or _LAP
    try:
        return encode(tokenizer, words, max_length=most).tolist()
    except DataError as error:
        raise DataError(f"{text}: {error}") from None


def _begins(lap: list[int], tokenizer: Any) -> int:
    """1 if the text begins with the beginning-of-sequence token, which comes once and not with every lap."""
    return int(tokenizer.bos_token_id is not None and lap[:1] == [tokenizer.bos_token_id])


def _typed(tokenizer: Any) -> Iterator[int]:
    """Token ids of standard input, line by line as it comes in."""
    begin, anything = tokenizer.bos_token_id, False
    try:
        for raw in sys.stdin.buffer:  # strictly: in some locales Python lets other bytes pass
            line = raw.decode("utf-8").replace("\r\n", "\n")
            if not anything and begin is not None and tokenizer("")["input_ids"][:1] == [begin]:
                yield begin
            anything = True
            yield from tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 text ({error.reason})") from None
    if not anything:
        raise DataError("standard input is empty; there is nothing to read")


class _View:
    """What is said of a stream: the line of a stretch, its row, and the closing words.

    Args:
        lap: tokens after which the text begins again; 0 where it does not.
        tokenizer: to show what is written; None for reading.
    """

    def __init__(self, lap: int, tokenizer: Any) -> None:
        self.lap, self.tokenizer = lap, tokenizer
        self.first: Stretch | None = None
        self.last: Stretch | None = None
        self.seconds, self.tail = 0.0, ""
        self.within, self.beyond = _Mean(), _Mean()
        self.laps: dict[int, _Mean] = {}
        self.opening: _Mean | None = None

    def add(self, one: Stretch) -> None:
        """Count a stretch."""
        self.first, self.last = self.first or one, one
        self.seconds += one.seconds
        begin, trained = one.tokens - one.losses.numel(), one.trained or math.inf
        cut = int(min(max(trained - begin, 0), one.losses.numel()))
        self.within.add(one.losses[:cut])
        self.beyond.add(one.losses[cut:])
        if self.tokenizer is not None:
            self.tail = (self.tail + self.tokenizer.decode(one.ids, skip_special_tokens=True))[-400:]
        if self.lap:
            self._count_laps(one, begin)

    def _count_laps(self, one: Stretch, begin: int) -> None:
        done = 0
        while done < one.losses.numel():
            index, place = divmod(begin + done - 1, self.lap)  # the first token of all is counted in no lap
            part = one.losses[done : done + self.lap - place]
            self.laps.setdefault(index + 1, _Mean()).add(part)
            done += part.numel()
        self.opening = self.opening or self.laps.get(1)
        for index in [index for index in self.laps if index < max(self.laps) - 1]:
            del self.laps[index]

    def whole_lap(self) -> tuple[int, _Mean] | None:
        """Number and mean of the last lap that is finished, if it is not the first."""
        found = [(index, mean) for index, mean in self.laps.items() if index > 1 and mean.count >= self.lap]
        return max(found, key=lambda pair: pair[0]) if found else None

    def line(self, one: Stretch) -> str:
        """The live line."""
        trained = f" ({one.tokens / one.trained:.1f} x trained)" if one.trained else ""
        parts = [
            f"{one.tokens:,} tokens{trained}",
            f"{one.tokens_per_second:,.0f}/s",
            f"perplexity {one.perplexity:.2f}",
        ]
        lap = self.whole_lap()
        if lap is not None and self.opening is not None:
            parts.append(f"lap {lap[0]} {lap[1].perplexity:.2f}, first {self.opening.perplexity:.2f}")
        parts.append(f"{one.held:,.0f} held, {_size(one.bytes_held)}")
        parts.append(f"reach {one.reach:,}" + (f" of {one.trained:,}" if one.trained else ""))
        if one.device is not None:
            parts.append(f"GPU {_size(one.device)}")
        if one.resident is not None:
            parts.append(f"process {_size(one.resident)}")
        return " | ".join(parts)

    def row(self, one: Stretch) -> dict[str, Any]:
        """The row of a stretch."""
        names = ("tokens", "fed", "seconds", "tokens_per_second", "perplexity", "held", "bytes_held", "bytes_full",
                 "reach", "trained", "resident", "device")  # fmt: skip
        row = {name: getattr(one, name) for name in names}
        if self.lap:
            row["lap"] = max(self.laps, default=1)
        if self.tokenizer is not None:
            row["text"] = self.tokenizer.decode(one.ids, skip_special_tokens=True)
        return row

    def closing(self) -> Iterator[str]:
        """What it came to."""
        one, first = self.last, self.first
        if one is None or first is None:
            yield "stopped before the first stretch was measured"
            return
        pace = one.tokens / self.seconds
        trained = f"; the model was trained for {one.trained:,}" if one.trained else ""
        yield f"{one.tokens:,} tokens in {self.seconds:,.1f} seconds, {pace:,.0f} per second{trained}"
        text = f"perplexity {self.within.perplexity:.2f}"
        if self.beyond.count:
            text += f" up to the trained length, {self.beyond.perplexity:.2f} beyond it"
        lap = self.whole_lap()
        if lap is not None and self.opening is not None:
            text += f"; the same text {self.opening.perplexity:.2f} in lap 1, {lap[1].perplexity:.2f} in lap {lap[0]}"
        yield text
        yield (
            f"cache {_size(one.bytes_held)}, {one.held:,.0f} tokens per head; everything would take "
            f"{_size(one.bytes_full)}"
        )
        if one.resident is not None and first.resident is not None:
            yield f"process {_size(first.resident)} after the first stretch, {_size(one.resident)} after the last"


class _Mean:
    """A mean over everything that was added."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, losses: Tensor) -> None:
        self.total, self.count = self.total + float(losses.sum()), self.count + losses.numel()

    @property
    def perplexity(self) -> float:
        return math.exp(self.total / self.count) if self.count else math.nan


def _follow(stretches: Iterator[Stretch], view: _View, output: Path | None) -> None:
    """Show every stretch until there is none left or Ctrl-C is pressed, then the closing words."""
    from contextlib import ExitStack

    from rich.live import Live
    from rich.text import Text

    from ._rowlog import RowLog
    from .report.terminal import make_console

    console = make_console()
    with ExitStack() as stack:
        log = stack.enter_context(RowLog(output, resume=False)) if output is not None else None
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        if log is not None and log.moved_to is not None:
            console.print(f"earlier rows moved to {log.moved_to}", markup=False)
        try:
            for one in stretches:
                view.add(one)
                if live is not None:
                    live.update(Text("\n".join(filter(None, (view.line(one), view.tail)))), refresh=True)
                else:
                    console.print(view.line(one), markup=False)
                if log is not None:
                    log.append(view.row(one))
        except KeyboardInterrupt:
            pass
    if view.tail and live is None:
        console.print(f"... {view.tail}", markup=False)
    for text in view.closing():
        console.print(text, markup=False)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
