"""`kvsieve stream` as typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from typer.testing import CliRunner

import kvsieve
from kvsieve.cli import app
from kvsieve.text import Stretch, TokenStream

QUICK = ("stream", "--budget", "64", "--chunk", "32", "--every", "128")
WORDS = "The tide went out, and the boat lay on the sand. The gulls came back. " * 12


def _run(*words, **more):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1"}, **more)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "tide.txt"
    file.write_text(WORDS)
    return file


def test_reads_past_the_trained_length_and_stays_sane(tmp_path):
    file = tmp_path / "rows.jsonl"
    done = _run("stream", "--budget", "256", "--chunk", "64", "--tokens", "4224", "--output", file)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert re.search(
        r"4,096 tokens \(2\.0 x trained\) \| [\d,]+/s \| perplexity [\d.]+ \| lap 2 [\d.]+, first [\d.]+ \| 256 held, "
        r"1\.00 MiB \| reach 320 of 2,048 \| process [\d.,]+ [MG]iB",
        lines[7],
    )
    assert lines[9].startswith("4,224 tokens in ")
    assert lines[9].endswith("; the model was trained for 2,048")
    first, again = map(float, re.search(r"the same text ([\d.]+) in lap 1, ([\d.]+) in lap 2", lines[10]).groups())
    assert again == pytest.approx(first, rel=0.05)
    assert lines[11] == "cache 1.00 MiB, 256 tokens per head; everything would take 16.50 MiB"
    rows = _rows(file)
    assert [row["tokens"] for row in rows] == [*range(512, 4097, 512), 4224]
    assert [row["lap"] for row in rows] == [1] * 4 + [2] * 3 + [3] * 2  # a lap and its beginning are 2,048
    assert all(row["held"] == 256 and row["bytes_held"] == rows[1]["bytes_held"] for row in rows[1:])
    assert rows[-1]["bytes_full"] == 4224 * 4096
    assert all(row["reach"] <= 320 and row["trained"] == 2048 and row["device"] is None for row in rows)


def test_original_positions_reach_farther_and_the_full_cache_grows(tmp_path, text):
    for flags, reach, held in (
        (("--positions", "original"), 256, 64),
        (("--policy", "full"), 256, 256),
        (("--budget", "0.5"), 160, 128),
        (("--policy", "h2o", "--budget", "40KiB", "--option", "h2o.window_size=4"), 40, 9),
    ):
        file = tmp_path / f"{held}.jsonl"
        done = _run(*QUICK, "--text", text, "--tokens", "256", *flags, "--output", file)
        assert done.exit_code == 0, done.output
        row = _rows(file)[-1]
        assert (row["tokens"], row["held"]) == (256, held)
        assert row["reach"] == pytest.approx(reach, abs=32)


def test_a_file_is_read_over_and_over_and_standard_input_once(text, tmp_path):
    file = tmp_path / "rows.jsonl"
    done = _run(*QUICK, "--text", text, "--tokens", "700", "--output", file)
    assert "in lap 2" in done.output
    assert _rows(file)[-1]["lap"] == 3
    done = _run(*QUICK, "--text", "-", "--output", file, input=WORDS)
    assert done.exit_code == 0
    assert "earlier rows moved to" in done.output
    rows = _rows(file)
    assert 200 < rows[-1]["tokens"] < 300
    assert "lap" not in rows[-1]
    assert "beyond" not in done.output


def test_writes_on(text, tmp_path):
    file = tmp_path / "rows.jsonl"
    done = _run(*QUICK, "--write", "--text", text, "--tokens", "330", "--output", file, "--every", "64")
    assert done.exit_code == 0, done.output
    rows = _rows(file)
    assert rows[-1]["tokens"] == 330
    assert rows[0]["text"].startswith("The tide went out")
    assert rows[-1]["text"].strip()
    assert "... " in done.output
    again = _run(
        *QUICK, "--write", "--text", text, "--tokens", "330", "--every", "64", "--output", tmp_path / "b.jsonl"
    )
    assert again.exit_code == 0
    assert [row["text"] for row in _rows(tmp_path / "b.jsonl")] == [row["text"] for row in rows]
    short = _run(*QUICK, "--write", "--tokens", "20")
    assert short.output.startswith("20 tokens")


def test_ctrl_c_ends_with_a_summary(monkeypatch, text):
    feed, passes = TokenStream.feed, []

    def interrupted(self, ids):
        passes.append(ids)
        if len(passes) > 6:
            raise KeyboardInterrupt
        return feed(self, ids)

    monkeypatch.setattr(TokenStream, "feed", interrupted)
    done = _run(*QUICK, "--text", text)
    assert done.exit_code == 0
    assert "128 tokens in" in done.output
    done = _run(*QUICK, "--text", text)
    assert (done.exit_code, done.output) == (0, "stopped before the first stretch was measured\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "0"], "--tokens must be 1 or more, not 0"),
        (["--chunk", "0"], "--chunk-size must be 1 or more, not 0"),
        (["--every", "-3"], "--every must be 1 or more, not -3"),
        (["--policy", "snapvk"], "did you mean 'snapkv'?"),
        (["--policy", "h2o,tova"], "names one method"),
        (["--budget", "64,128"], "one amount"),
        (["--budget", "2"], "smallest legal budget is 4"),
        (["--budget", "100B"], "smallest legal budget is"),
        (["--positions", "contiguous"], 'is not "slot" or "original"'),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--text", "-"], "standard input is empty"),
        (["--policy", "full"], "until the memory is full; say where to stop with --tokens"),
        (["--budget", "0.5"], "until the memory is full; say where to stop with --tokens"),
        (["--write", "--temperature", "-1"], "temperature must be 0 or more"),
        (["--model", "mini-stream3r"], "not a language model"),
    ],
)
def test_refusals_are_one_line_on_stderr_with_exit_code_2(flags, message):
    done = _run("stream", *flags)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [("--tokens", "1"), ("--tokens", "5", "--every", "1", "--chunk", "1")])
def test_stretches_of_one_token(flags, text):
    done = _run("stream", "--budget", "64", "--text", text, *flags)
    assert done.exit_code == 0, done.output
    assert "perplexity nan" in done.output.splitlines()[0]  # nothing predicts the first token


@pytest.mark.parametrize(
    "flags",
    [
        ("--option", "streaming_llm.when=request"),
        ("--option", "streaming_llm.when=prefill", "--chunk", "1"),
        ("--option", "streaming_llm.when=prefill", "--write"),
    ],
)
def test_what_would_grow_for_ever_needs_an_end(flags, text):
    done = _run(*QUICK, "--text", text, *flags)
    assert done.exit_code == 2
    assert "--tokens" in done.stderr


def test_standard_input_is_utf8_in_any_locale():
    done = subprocess.run(
        [sys.executable, "-c", "from kvsieve.cli import app; app()", *QUICK, "--text", "-", "--tokens", "50"],
        input=b"hello \xff world\n", capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"standard input: not UTF-8 text" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_lowest_temperature(mini_lm):
    stream = TokenStream(mini_lm[0], kvsieve.get_policy("streaming_llm", budget=64))
    list(stream.read(range(5, 25), chunk=20))
    cold = next(stream.write(count=3, temperature=1e-45)).ids
    other = TokenStream(mini_lm[0], kvsieve.get_policy("streaming_llm", budget=64))
    list(other.read(range(5, 25), chunk=20))
    assert torch.equal(cold, next(other.write(count=3, temperature=0.0)).ids)


def test_an_empty_text_and_a_folder_are_refused(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for file, message in ((empty, "at least 2 are needed"), (binary, "not UTF-8"), (tmp_path, "cannot be read")):
        done = _run("stream", "--text", file)
        assert done.exit_code == 2
        assert message in done.stderr


# ---- the library part


@pytest.fixture(scope="module")
def mini_lm():
    return kvsieve.zoo.load("mini-lm")


def test_losses_are_those_of_the_chunked_reading(mini_lm):
    from kvsieve.text import encode, perplexity

    model, tokenizer = mini_lm
    ids, policy = encode(tokenizer, WORDS, max_length=60), kvsieve.get_policy("streaming_llm", budget=16)
    for chunk in (1, 7):
        stretches = list(TokenStream(model, policy).read(ids.tolist(), chunk=chunk, every=20))
        mode = "token" if chunk == 1 else "chunked"
        want = perplexity(model, ids, policy, chunk_size=chunk, positions="slot", mode=mode)
        found = [float(x) for one in stretches for x in one.losses]
        assert found == pytest.approx(want.nll.tolist(), rel=1e-4, abs=1e-4)
        assert [int(x) for one in stretches for x in one.ids] == ids.tolist()
        assert stretches[-1].tokens == len(ids)
        assert all(isinstance(one, Stretch) and one.fed >= 20 for one in stretches[:-1])


def test_a_stream_can_be_left_and_gone_on_with(mini_lm):
    import torch

    model, _ = mini_lm
    one = TokenStream(model, kvsieve.get_policy("streaming_llm", budget=16), seed=3)
    assert one.feed(torch.tensor([5])).shape == (0,)
    assert one.feed(torch.tensor([6, 7])).shape == (2,)
    written = next(one.write(temperature=0.0, every=4))
    assert (written.fed, one.tokens) == (4, 7)
    assert torch.is_grad_enabled()
    assert [stretch.tokens for stretch in islice(one.read([1, 2, 3], every=2), 2)] == [9, 10]


def test_a_stream_rewinds_its_positions(mini_lm, monkeypatch):
    from kvsieve.text import encode

    model, tokenizer = mini_lm
    ids, policy = encode(tokenizer, WORDS, max_length=200).tolist(), kvsieve.get_policy("h2o", budget=48)
    plain, rewound = TokenStream(model, policy), TokenStream(model, policy)
    (want,) = plain.read(ids, chunk=8, every=200)
    monkeypatch.setattr("kvsieve.text.streaming._REWIND", 90)
    (got,) = rewound.read(ids, chunk=8, every=200)
    assert got.losses.tolist() == pytest.approx(want.losses.tolist(), abs=1e-3)
    assert (plain.cache.next_position, rewound.cache.next_position) == (200, 56)  # it began anew at 96, 144 and 192
    assert got.reach == want.reach == 56


def test_what_a_stream_refuses(mini_lm):
    import torch

    model, _ = mini_lm
    policy = kvsieve.get_policy("streaming_llm", budget=16)
    stream = TokenStream(model, policy)
    for wrong in (torch.tensor([[1]]), torch.tensor([], dtype=torch.long), torch.tensor([4096]), torch.tensor([-1])):
        with pytest.raises(kvsieve.errors.DataError):
            stream.feed(wrong)
    with pytest.raises(kvsieve.errors.DataError, match="nothing to write on from"):
        stream.write()
    with pytest.raises(kvsieve.errors.PolicyError, match="chunk must be 1 or more"):
        stream.read([1], chunk=0)
    with pytest.raises(kvsieve.errors.PolicyError, match="contiguous"):
        TokenStream(model, policy, positions="contiguous")
    model.train()
    try:
        with pytest.raises(kvsieve.errors.UnsupportedOperationError, match=r"model\.eval"):
            TokenStream(model, policy)
    finally:
        model.eval()
