"""kvpress, in an environment and a process of its own, asked one question at a time."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from . import models, resident
from .timing import Clock

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".venv-peer"


class PeerError(RuntimeError):
    """The peer could not answer, or answered with an error."""


class PeerGoneError(PeerError):
    """Its process has ended."""


class Peer:
    """One worker for timing, and a fresh one per question for memory.

    Attributes:
        reason: why there is no peer; empty if there is one.
        versions: what the worker says it runs.
    """

    def __init__(self, folder: Path = FOLDER, *, clock: Clock | None = None, threads: int = 1) -> None:
        self.python, self.clock, self.threads = folder / "bin" / "python", clock or Clock(), threads
        self.reason, self.versions = "", {}
        self._folder = tempfile.TemporaryDirectory(prefix="kvsieve-peer-")
        self._worker: subprocess.Popen[str] | None = None
        self._saved: dict[str, str] = {}
        if not (folder / ".installed").is_file():
            self.reason = f"no peer environment in {folder.name}: run sh benchmarks/engine/make_peer_env.sh"
            return
        try:
            self.versions = self._start()
        except PeerError as error:
            self.reason = str(error)

    def __bool__(self) -> bool:
        return not self.reason

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One reply of the lasting worker; one that died is replaced at the next question.

        Raises:
            PeerError: there is no peer, it died, or it reports an error.
        """
        if self.reason:
            raise PeerError(self.reason)
        if self._worker is None:
            self._start()
        assert self._worker is not None
        try:
            return _exchange(self._worker, {"do": do, **request})
        except PeerGoneError:
            _end(self._worker)
            self._worker = None
            raise

    def alone(self, do: str, **request: Any) -> dict[str, Any]:
        """One reply of a fresh process, which then ends; for memory."""
        if self.reason:
            raise PeerError(self.reason)
        worker = self._launch(resident.ENVIRONMENT)
        try:
            _exchange(worker, {"do": "hello", "threads": self.threads, "clock": self.clock.kind})
            return _exchange(worker, {"do": do, **request})
        finally:
            _end(worker)

    def set(self, threads: int, clock: Clock) -> None:
        """Change threads and clock of the lasting worker."""
        self.threads, self.clock = threads, clock
        if self:
            self.ask("threads", threads=threads, clock=clock.kind)

    def model(self, size: models.Size, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
        """What a request says of the model; its weights are written once."""
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        name = f"{size}-{dtype}"
        return {"size": asdict(size), "dtype": str(dtype).removeprefix("torch."), "weights": self.file(name, weights)}

    def file(self, name: str, tensors: dict[str, Tensor]) -> str:
        """Path of a safetensors file with these tensors, written the first time the name comes up."""
        if name not in self._saved:
            path = Path(self._folder.name) / f"{len(self._saved)}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            self._saved[name] = str(path)
        return self._saved[name]

    def has(self, name: str) -> bool:
        """Whether `file` has written this."""
        return name in self._saved

    def close(self) -> None:
        """End the worker and remove the files."""
        if self._worker is not None:
            _end(self._worker)
            self._worker = None
        self._folder.cleanup()

    def _start(self) -> dict[str, Any]:
        self._worker = self._launch({})
        try:
            return _exchange(self._worker, {"do": "hello", "threads": self.threads, "clock": self.clock.kind})
        except PeerError:
            _end(self._worker)
            self._worker = None
            raise

    def _launch(self, extra: dict[str, str]) -> subprocess.Popen[str]:
        environment = os.environ | extra | {"PYTHONPATH": str(HERE.parent)}
        return subprocess.Popen(
            [str(self.python), "-m", f"{__package__}.peer_worker"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip


def _exchange(worker: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise PeerGoneError(f"the peer's process ended with status {worker.wait()} at {request['do']!r}")
    reply: dict[str, Any] = json.loads(line)
    if "error" in reply:
        raise PeerError(str(reply["error"]))
    return reply


def _end(worker: subprocess.Popen[str]) -> None:
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # what a process that has ended did not read; closed all the same
                stream.close()
    try:
        worker.wait(timeout=10)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
