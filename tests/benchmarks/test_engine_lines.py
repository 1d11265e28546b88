"""Lines, targets, turns and the page of `benchmarks/engine.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from engine import lines, results, run
from engine.lines import Line, number
from engine.timing import Clock, Comparison, Spread, take_turns


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (Line("a", "b", 0.7, target=0.7), "met"),
        (Line("a", "b", 0.71, target=0.7), "missed"),
        (Line("a", "b", 0.0, target=0.0), "met"),
        (Line("a", "b", 2.1, target=2.0, at_least=True), "met"),
        (Line("a", "b", 1.9, target=2.0, at_least=True), "missed"),
        (Line("a", "b", 1.0), "-"),
        (Line("a", "b", target=2.0, reason="no GPU"), "not measured"),
        (Line("a", "b", 1.0, target=2.0, failed=True), "failed"),
        (Line("a", "b", float("nan"), target=2.0), "missed"),
    ],
)
def test_status(line: Line, status: str) -> None:
    assert line.status == status
    assert line.to_dict()["status"] == status


def test_numbers_keep_three_digits() -> None:
    assert [number(x) for x in (0.0, 0.00123, 0.1234, 1.234, 12.34, 123.4)] == [
        "0",
        "0.00123",
        "0.12",
        "1.23",
        "12.3",
        "123",
    ]
    assert number(0.5, "x") == "0.50x"
    assert number(0.5, "ms") == "0.50 ms"


def test_page_has_every_line_and_fact() -> None:
    rows = [
        Line("decode", "one | two", 0.5, low=0.4, high=0.6, target=0.7, detail="1 ms against 2 ms", peer="0.9x"),
        Line("gpu", "three", target=1.6, reason="no GPU"),
    ]
    page = results.page(rows, {"hardware": "a machine", "load average at start": "0.10 0.20 0.30"})
    assert "1 met, 0 missed, 1 not measured, 0 failed" in page
    assert "| met | one \\| two | 0.50x (0.40 to 0.60) | at most 0.70x | 1 ms against 2 ms; peer: 0.9x |" in page
    assert "| not measured | three | - | at most 1.60x | no GPU |" in page
    assert "* load average at start: 0.10 0.20 0.30" in page
    assert lines.plain(rows[0]).startswith("met ")


def test_page_takes_up_other_runs(tmp_path: Path) -> None:
    facts = {"hardware": "a machine", "command": "all but one"}
    other = Line("stream", "flat", 1.3, target=1.1)
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"run": facts | {"command": "that one"}, "lines": [other.to_dict()]}))
    page = results.page([Line("decode", "one", 0.5, target=0.7)], facts, [file])
    assert "1 met, 1 missed, 0 not measured, 0 failed" in page
    main, own = page.split("## In a run of its own")
    assert "| met | one |" in main
    assert "| missed | flat | 1.30x | at most 1.10x |" in own
    assert "* command: that one" in own
    assert "hardware" not in own  # the same machine
    assert Line.from_dict(other.to_dict()) == other


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def candidate(name: str, seconds: float) -> float:
        order.append(name)
        return seconds if len(order) > 2 else 1000.0

    found = take_turns({"a": lambda: candidate("a", 1.0), "b": lambda: candidate("b", 4.0)}, 3)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found.seconds == {"a": [1.0] * 3, "b": [4.0] * 3}
    assert found.ratio("a", "b") == Spread(0.25, 0.25, 0.25)


def test_ratio_is_taken_round_by_round() -> None:
    found = Comparison({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 3.0]})
    assert found.ratio("a", "b") == Spread(0.5, 0.5, 0.75)
    assert found.time("a") == 3.0


@pytest.mark.parametrize("kind", ["cpu", "wall"])
def test_clock_goes_forward(kind: str) -> None:
    assert Clock(kind).seconds(lambda: sum(range(100_000))) > 0


def test_groups_are_chosen_by_name() -> None:
    assert run.chosen(None) == list(run.GROUPS)
    assert run.chosen("gpu, decode") == ["gpu", "decode"]
    with pytest.raises(ValueError, match="nonsense is no group"):
        run.chosen("decode,nonsense")
    with pytest.raises(ValueError, match="nothing is no group"):
        run.chosen(",")


def test_a_failing_group_is_a_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: object) -> None:
        raise RuntimeError("it broke")

    def fine(bench: run.Bench) -> None:
        bench.add(Line("fine", "all well", 1.0, target=2.0))

    monkeypatch.setattr(run, "GROUPS", {"broken": broken, "fine": fine})
    default, asked = tmp_path / "RESULTS.md", tmp_path / "asked.md"
    words = ["--threads", "1", "--peer", str(tmp_path / "nowhere"), "--json", str(tmp_path / "out.json")]
    assert run.main([*words, "--quick"], default) == 1
    assert not default.exists()  # tiny sizes are not results
    assert run.main([*words, "--only", "fine"], default) == 0
    assert not default.exists()  # nor is a part of them
    assert run.main([*words, "--quick", "--only", "fine", "--output", str(asked)], default) == 0
    assert "tiny" in asked.read_text()
    assert run.main(words, default) == 1
    page = default.read_text()
    assert "RuntimeError: it broke" in page
    assert "| met | all well |" in page
    assert "no peer environment in nowhere" in page
    assert (tmp_path / "out.json").exists()
    assert "it broke" in capsys.readouterr().out
