"""How far a piece of work raises the memory of this process, measured where nothing can hide it.

Peak memory is the high-water mark of resident memory (`VmHWM`), in a process that does nothing else. The mark is put
back to the present use just before the work (by writing 5 to `/proc/self/clear_refs`), so what came before does not
count. Freed memory that the process keeps would hide allocations: `ENVIRONMENT` makes the C library take every larger
block from the system and give it back at once, and it must be in place when the process starts.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
"""For the child process. Not for timing: fresh pages cost time."""

STATUS = Path("/proc/self/status")


def held(name: str = "VmRSS") -> int:
    """Resident bytes of this process now; with `"VmHWM"` the most there ever were."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {name}: peak memory is measured on Linux only")


def trim() -> None:
    """Give back what is free."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def rise(work: Callable[[], Any]) -> dict[str, Any]:
    """Run `work` and tell by how many bytes the peak rose above what was resident before, and by how many what stays
    did. `"reset"` tells whether the mark could be put back; if not, the rise is above the old mark and may be too
    small."""
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before, reset = held(), True
    except OSError:
        before, reset = held("VmHWM"), False
    resident = held()
    result = work()
    peak = held("VmHWM") - before
    trim()
    stays = held() - resident
    del result
    return {"peak": max(peak, 0), "stays": stays, "reset": reset}
