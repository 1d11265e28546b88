"""Runs the whole recipe of mini-lm at toy scale: corpus, tokenizer, training, resuming, export, measuring."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "training" / "mini_lm" / "run.py"
SUBJECTS = ("The old captain", "A young widow", "My friend", "The doctor", "Nobody in the village")
VERBS = ("remembered", "forgot", "described", "admired", "looked for")
OBJECTS = ("the garden behind the house", "his first voyage", "a letter from London", "the long winter")


def _story(seed: int, sentences: int) -> str:
    """Simple sentences in paragraphs."""
    draw = random.Random(seed)
    parts = [f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}." for _ in range(sentences)]
    return "\n\n".join(" ".join(parts[i : i + 6]) for i in range(0, sentences, 6))


def _archive(path: Path, texts: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            data = text.encode()
            member = tarfile.TarInfo(f"texts/{name}.txt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _run(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_recipe_trains_resumes_and_exports(tmp_path: Path) -> None:
    novels, heldout, work, folder = (tmp_path / n for n in ("novels.tgz", "heldout.tgz", "work", "model"))
    _archive(novels, {"one": _story(1, 3000), "two": _story(2, 3000)})
    _archive(heldout, {"three": _story(3, 800)})
    arguments = ["--novels", str(novels), "--heldout", str(heldout), "--work", str(work), "--toy"]
    _run(*arguments)
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    first, last = (next(x["prose"] for x in order if "prose" in x) for order in (lines, lines[::-1]))
    assert last < first - 1.0
    assert [line["finished"] for line in lines if "finished" in line] == ["toy-short", "toy-long"]

    output = _run(*arguments, "--export", str(folder))  # all stages are done: it only resumes and exports
    assert "resumed at step" in output

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("The old captain remembered", return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.bos_token_id == model.config.bos_token_id == 0
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "The old captain remembered"
    assert model(batch["input_ids"]).logits.shape[-1] == model.config.vocab_size == len(tokenizer)
    listed = json.loads((folder / "words.json").read_text())
    for word in listed["names"] + listed["words"]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1
