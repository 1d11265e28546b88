"""The command line of `benchmarks/engine.py`: which groups, how often, and where the results go."""

from __future__ import annotations

import argparse
import gc
import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from . import compiled, decode, evict, gpu, holds, imports, likelihood, peer, prefill, results, stream
from .bench import Bench, clock_for
from .lines import Line, tally

GROUPS: dict[str, Callable[[Bench], None]] = {
    "decode": decode.plain,
    "removed": decode.removed,
    "ragged": decode.ragged,
    "every_step": decode.every_step,
    "long": decode.long,
    "compile": compiled.compiled,
    "prefill": prefill.prefill,
    "evict": evict.evict,
    "perplexity": likelihood.likelihood,
    "bytes": holds.bytes_held,
    "leak": holds.leak,
    "import": imports.imports,
    "stream": stream.stream,
    "gpu": gpu.gpu,
}
STREAM, QUICK_STREAM = 20_000, 400
LONG_STREAM, QUICK_LONG_STREAM = 1_000_000, 6_400


def parser() -> argparse.ArgumentParser:
    """Everything that can be asked for."""
    made = argparse.ArgumentParser(prog="engine.py", description="Measure the cache engine against its targets.")
    made.add_argument("--only", metavar="NAME[,NAME]", help=f"groups to run: {', '.join(GROUPS)}")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    made.add_argument("--repeats", type=int, help="rounds per comparison (9; 2 with --quick)")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch (all cores)")
    made.add_argument(
        "--clock", choices=("auto", "cpu", "wall"), default="auto", help="auto: processor time with one thread"
    )
    made.add_argument("--stream-tokens", type=int, help=f"tokens of the stream of single tokens ({STREAM})")
    made.add_argument("--long-stream-tokens", type=int, help=f"tokens of the stream in chunks ({LONG_STREAM})")
    made.add_argument("--stream-method", default="h2o", help="their method (h2o)")
    made.add_argument("--stream-positions", default="original", choices=("original", "slot"))
    made.add_argument("--peer", type=Path, default=peer.FOLDER, help="folder of the peer's environment (.venv-peer)")
    made.add_argument("--output", type=Path, help="Markdown page to write; by default only for a full run")
    made.add_argument("--json", type=Path, help="JSON file to write, after every group")
    made.add_argument(
        "--also", type=Path, nargs="+", default=(), help="JSON files of runs of other groups, to stand on the page too"
    )
    return made


def chosen(only: str | None) -> list[str]:
    """Names of the groups to run.

    Raises:
        ValueError: a name that is no group.
    """
    names = list(GROUPS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in GROUPS]
    if unknown or not names:
        raise ValueError(f"--only {only}: {', '.join(unknown) or 'nothing'} is no group; there are {', '.join(GROUPS)}")
    return names


def run_group(bench: Bench, name: str) -> None:
    """Run one group; an error becomes a line that says so."""
    try:
        GROUPS[name](bench)
    except Exception as error:
        traceback.print_exc()
        bench.add(Line(name, f"group {name}", reason=f"{type(error).__name__}: {error}", failed=True))
    gc.collect()


def main(words: Sequence[str] | None = None, default_output: Path | None = None) -> int:
    """Measure, print, write. Returns 1 if a group could not be run to its end, else 0, whatever targets are missed."""
    options = parser()
    given = options.parse_args(words)
    try:
        names = chosen(given.only)
    except ValueError as error:
        options.error(str(error))
    if given.threads < 1 or (given.repeats is not None and given.repeats < 1):
        options.error("--threads and --repeats must be 1 or more")
    load = os.getloadavg()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    beside = peer.Peer(given.peer, clock=clock_for(given.threads, given.clock), threads=given.threads)
    bench = Bench(
        quick=given.quick,
        repeats=given.repeats or (2 if given.quick else 9),
        threads=given.threads,
        timed_by=given.clock,
        peer=beside,
        stream=given.stream_tokens or (QUICK_STREAM if given.quick else STREAM),
        long_stream=given.long_stream_tokens or (QUICK_LONG_STREAM if given.quick else LONG_STREAM),
        stream_method=given.stream_method,
        stream_positions=given.stream_positions,
    )
    facts = results.about(bench, load, results.command_line())
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    try:
        for name in names:
            run_group(bench, name)
            if given.json is not None:
                found = {"run": facts, "lines": [line.to_dict() for line in bench.lines]}
                given.json.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        beside.close()
    whole = given.only is None and not given.quick
    output = given.output or (default_output if whole else None)
    if output is not None:
        output.write_text(results.page(bench.lines, facts, given.also))
        print(f"written: {output}")
    print(("tiny sizes, numbers mean nothing: " if given.quick else "") + tally(bench.lines))
    return int(any(line.failed for line in bench.lines))
