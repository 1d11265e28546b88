"""What the cache engine costs and saves, line by line, with the target of each line and whether it is met.

    python benchmarks/engine.py                              everything; writes benchmarks/RESULTS.md
    python benchmarks/engine.py --only decode,ragged         some groups; writes nothing unless --output says where
    python benchmarks/engine.py --quick                      tiny sizes, to see that it works; numbers mean nothing

The peer, kvpress, is measured beside it where `sh benchmarks/engine/make_peer_env.sh` has made its environment; without
it, and without a GPU, the lines that need one say so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def _threads_before_torch() -> None:
    """Libraries read their number of threads once, when they are loaded."""
    words = sys.argv
    for index, word in enumerate(words):
        given = word.partition("=")[2] if word.startswith("--threads=") else ""
        if word == "--threads" and index + 1 < len(words):
            given = words[index + 1]
        if given.isdigit():
            os.environ["OMP_NUM_THREADS"] = given


if __name__ == "__main__":
    _threads_before_torch()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from engine.run import main

    sys.exit(main(default_output=Path(__file__).with_name("RESULTS.md")))
