"""How `benchmarks/engine.py` talks to the peer's process, with a stand-in for the peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import imports, models
from engine.bench import PeerPair, with_peer
from engine.peer import Peer, PeerError, PeerGoneError, _end, _exchange

STAND_IN = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "die":
        sys.exit(3)
    if request["do"] == "fail":
        reply = {"error": "ValueError: it is so"}
    elif request["do"] == "hello":
        reply = {"kvpress": "0", "threads": request["threads"]}
    elif request["do"] == "decode":
        reply = {"press": 3.0, "plain": 2.0}
    else:
        reply = request
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / ".installed").touch()
    program, python = tmp_path / "stand_in.py", tmp_path / "bin" / "python"
    program.write_text(STAND_IN)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}"\n')
    python.chmod(0o755)
    return tmp_path


def test_questions_and_answers(folder: Path) -> None:
    peer = Peer(folder, threads=2)
    assert peer
    assert peer.versions == {"kvpress": "0", "threads": 2}
    assert peer.ask("echo", number=1) == {"do": "echo", "number": 1}
    with pytest.raises(PeerError, match="ValueError: it is so"):
        peer.ask("fail")
    assert peer.alone("echo", number=2)["number"] == 2
    with pytest.raises(PeerError, match="status 3"):
        peer.ask("die")
    assert peer.ask("echo", number=3)["number"] == 3  # by another process
    peer.close()


def test_pairs_take_part_in_turns(folder: Path) -> None:
    peer = Peer(folder)
    found, words = with_peer(None, {"mine": lambda: 1.0}, PeerPair(peer, "decode"), rounds=2)
    assert found.seconds == {"mine": [1.0, 1.0], "peer": [3.0, 3.0]}
    assert words == "1.50x of its own plain run"
    found, words = with_peer(None, {"mine": lambda: 1.0}, PeerPair(peer, "fail"), rounds=2)
    assert list(found.seconds) == ["mine"]
    assert words == "not measured (ValueError: it is so)"
    peer.close()


def test_weights_are_written_once_and_tied(folder: Path) -> None:
    peer = Peer(folder)
    size = models.Size(layers=1, hidden=32, heads=2, vocabulary=11, intermediate=16)
    model = models.build(size)
    asked = peer.model(size, model, torch.float32)
    assert asked == peer.model(size, model, torch.float32)
    again = models.build(models.Size(**asked["size"]), models.DTYPES[asked["dtype"]], seed=1)
    missing = again.load_state_dict(load_file(asked["weights"]), strict=False).missing_keys
    assert missing == ["lm_head.weight"]  # which is the embedding
    ids = models.token_ids(size, 5)
    assert torch.equal(model(ids).logits, again(ids).logits)
    peer.close()
    assert not Path(asked["weights"]).exists()


def test_without_an_environment_there_is_a_reason(tmp_path: Path) -> None:
    peer = Peer(tmp_path / "nothing")
    assert not peer
    assert "make_peer_env.sh" in peer.reason
    with pytest.raises(PeerError, match="no peer environment"):
        peer.ask("hello")
    peer.close()


def test_a_worker_that_cannot_start_is_a_reason(folder: Path) -> None:
    (folder / "bin" / "python").write_text("#!/bin/sh\nexit 4\n")
    peer = Peer(folder)
    assert not peer
    assert "status 4" in peer.reason
    peer.close()


def test_a_worker_that_read_nothing_is_ended() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit(4)"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    worker.wait()  # so that the request meets a closed pipe every time
    with pytest.raises(PeerGoneError, match="status 4 at 'hello'"):
        _exchange(worker, {"do": "hello"})
    _end(worker)
    assert worker.stdin is not None
    assert worker.stdin.closed


def test_an_import_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "CHILD", "import sys; exec(sys.argv[1])")
    with pytest.raises(RuntimeError, match="no_such_module"):
        imports.once(sys.executable, "import no_such_module")
