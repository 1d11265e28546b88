"""Where and how a run was made, and the page that is written about it."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import kvsieve

from .bench import Bench
from .lines import Line, table, tally

TINY = "tiny (--quick): lengths and budgets divided by 8, M with 2 layers. The numbers show that it runs, nothing else"
METHOD = """\
Models are Llamas with random weights: S has 4 layers of width 256 with 4 heads, M 8 layers of width 512 with 8 heads;
both have 2 key-value heads of width 64 and a vocabulary of 4,096. Random weights cost what trained ones do.

* A ratio is the median over rounds in which the candidates take turns within one process (the peer's in a process of
  its own, asked in the same turns); quartiles stand in brackets. The first round does not count.
* Time is what the line `time` above says. With one thread it is processor time, which a busy machine disturbs little.
* Long caches are filled with random keys and values, the same for all candidates.
* Peak memory is the rise of the high-water mark of resident memory over what is loaded, in a fresh process for every
  case, with an allocator that gives freed blocks back at once.
* The peer is kvpress in an environment of its own (`benchmarks/engine/make_peer_env.sh`), on the same weights and
  inputs. Its numbers in the last column are ratios to the plain run in its own process.
"""


def about(bench: Bench, load: Sequence[float], command: str) -> dict[str, Any]:
    """Hardware, versions, settings. `load`: the load averages at the start."""
    return {
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvsieve": kvsieve.__version__,
        "peer": ", ".join(f"{name} {version}" for name, version in bench.peer.versions.items())
        or f"not measured: {bench.peer.reason}",
        "command": command,
        "threads": bench.threads,
        "time": {"cpu": "processor time", "wall": "wall time"}[bench.clock.kind],
        "rounds": bench.repeats,
        "load average at start": " ".join(f"{value:.2f}" for value in load),
        "sizes": TINY if bench.quick else "full",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def hardware() -> str:
    """Processor, cores, memory, GPU."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [
            line.split(":", 1)[1] for line in information.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0].strip() if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    features = torch.backends.cpu.get_cpu_capability()
    return f"{processor}, {os.cpu_count()} cores, {features}, {memory:.0f} GiB, {device}"


def page(lines: Sequence[Line], facts: dict[str, Any], others: Sequence[Path] = ()) -> str:
    """The Markdown page. `others`: what other runs have written with `--json`, each in a section of its own."""
    everything, parts = list(lines), [table(lines)]
    for file in others:
        other = json.loads(file.read_text())
        own = [Line.from_dict(row) for row in other["lines"]]
        differing = {name: value for name, value in other["run"].items() if facts.get(name) != value}
        everything += own
        parts.append(f"## In a run of its own\n\n{_listed(differing)}\n\n{table(own)}")
    head = f"# The engine, measured\n\n{tally(everything)}.\n\n{_listed(facts)}\n\n{METHOD}\n"
    return head + "\n\n".join(parts) + "\n"


def _listed(facts: dict[str, Any]) -> str:
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


def command_line() -> str:
    """The command as it was typed, without the interpreter's folder."""
    return " ".join([Path(sys.executable).name, *sys.argv])
