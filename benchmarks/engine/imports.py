"""What `import kvsieve` costs where `transformers` is loaded already; every time in a fresh interpreter."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from .bench import Bench
from .lines import Line, number
from .timing import Spread

CHILD = """
import json, os, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
import transformers.modeling_utils, transformers.masking_utils
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, began = resident(), time.process_time()
exec(sys.argv[1])
print(json.dumps({"seconds": time.process_time() - began, "bytes": resident() - before}))
"""
FIRST_USE = "from kvsieve import SieveCache, get_policy; get_policy('snapkv', budget=0.5)"


def once(python: str | Path, statement: str) -> dict[str, float]:
    """CPU seconds and resident bytes of a statement in a fresh interpreter."""
    found = subprocess.run(
        [str(python), "-c", CHILD, statement], capture_output=True, text=True, check=False, env=os.environ | OFFLINE
    )
    if found.returncode:
        raise RuntimeError(f"{statement!r} in {python}: {found.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return result


OFFLINE = {"HF_HUB_OFFLINE": "1"}


def imports(bench: Bench) -> None:
    """Import, and import with first use; the peer beside it."""
    statements: dict[str, tuple[str | Path, str]] = {
        "import kvsieve": (sys.executable, "import kvsieve"),
        "import and first policy": (sys.executable, FIRST_USE),
    }
    if bench.peer:
        statements["peer"] = (bench.peer.python, "import kvpress")
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in statements}
    for _ in range(bench.repeats):
        for name, (python, statement) in statements.items():
            rows[name].append(once(python, statement))
    for name in ("import kvsieve", "import and first policy"):
        known = name == "import kvsieve"
        for key, scale, unit, target in (("seconds", 1.0, "s", 0.1), ("bytes", 2**-20, "MiB", 5.0)):
            spread = Spread.of([scale * row[key] for row in rows[name]])
            words = f"not measured ({bench.peer.reason})"
            if bench.peer:
                words = number(scale * statistics.median(row[key] for row in rows["peer"]), unit)
            bench.add(
                Line(
                    "import", f"{name}, on top of transformers: {'CPU time' if key == 'seconds' else 'memory'}",
                    spread.median, unit, spread.low, spread.high, target=target if known else None, peer=words,
                )
            )  # fmt: skip
