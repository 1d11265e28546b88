"""The assignment is the best there is, and a perfect answer counts as one."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsieve.dialogue import Utterance, Window, assign, get_window, match
from kvsieve.dialogue.matching import UNIFORM, WINDOWS
from kvsieve.errors import DataError, PolicyError, ScoreError

Costs = list[dict[int, int]]


def price(costs: Costs, rejection: float, pairs: list[tuple[int, int]]) -> float:
    return sum(costs[row][column] for row, column in pairs) + rejection * (len(costs) - len(pairs))


def best(costs: Costs, rejection: float) -> float:
    """Every row tries every column, and none."""
    columns = sorted({column for row in costs for column in row})
    choices = [*columns, *[None] * len(costs)]
    out = math.inf
    for chosen in itertools.permutations(choices, len(costs)):
        total = 0.0
        for row, column in zip(costs, chosen, strict=True):
            total += rejection if column is None else row.get(column, math.inf)
        out = min(out, total)
    return out


@st.composite
def cost_tables(draw: st.DrawFn) -> Costs:
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    cost = st.one_of(st.none(), st.integers(-4, 9))
    table = [[draw(cost) for _ in range(columns)] for _ in range(rows)]
    return [{column: one for column, one in enumerate(row) if one is not None} for row in table]


@given(cost_tables(), st.integers(-2, 12))
@settings(max_examples=150, deadline=None)
def test_assignment_equals_brute_force(costs: Costs, rejection: int) -> None:
    pairs = assign(costs, rejection)
    assert pairs == sorted(pairs)
    assert len({column for _, column in pairs}) == len({row for row, _ in pairs}) == len(pairs)
    assert all(costs[row][column] <= rejection for row, column in pairs)
    assert price(costs, rejection, pairs) == best(costs, rejection)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (6, 6)])
def test_dense_tables_of_floats_equal_brute_force(shape: tuple[int, int]) -> None:
    rows, columns = shape
    draw = random.Random(rows * 10 + columns)
    for _ in range(5):
        table = [[draw.random() for _ in range(columns)] for _ in range(rows)]
        pairs = assign(table, 100.0)
        assert len(pairs) == min(shape)
        if rows <= columns:
            least = min(
                sum(table[row][column] for row, column in enumerate(chosen))
                for chosen in itertools.permutations(range(columns), rows)
            )
        else:
            least = min(
                sum(table[row][column] for column, row in enumerate(chosen))
                for chosen in itertools.permutations(range(rows), columns)
            )
        assert sum(table[row][column] for row, column in pairs) == pytest.approx(least, abs=1e-12)


def test_a_cost_of_zero_is_a_pair() -> None:
    assert assign([[0, 5], [5, 0]], 1) == [(0, 0), (1, 1)]
    assert assign([[0.0]], 0.0) == [(0, 0)]
    assert assign([], 1) == []
    assert assign([{}, {}], 1) == []


def test_a_rejected_row_leaves_the_others_free() -> None:
    assert assign([[9, 9], [9, 1]], 3) == [(1, 1)]
    assert assign([[1], [0]], 3) == [(1, 0)]


@pytest.mark.parametrize("table", [[[math.inf]], [[math.nan]], [{-1: 1.0}]])
def test_costs_that_cannot_be_added(table: list[list[float]]) -> None:
    with pytest.raises(DataError, match="row 0"):
        assign(table, 1.0)


def test_a_whole_hour_of_babble_takes_no_time() -> None:
    spoken = [Utterance(i / 2, "step") for i in range(4000)]
    references = [Utterance(5.0 * i, "step") for i in range(400)]
    matching = match(spoken, references)
    assert len(matching.pairs) == 400
    assert all(pair.delta == 0 for pair in matching.pairs)


def lines(*told: tuple[float, str]) -> list[Utterance]:
    return [Utterance(time, text) for time, text in told]


RECIPE = lines((1.0, "Take the red wheel."), (4.0, "Now the axle."), (5.0, "Screw it in."), (9.0, "All done."))


def earlier_count(spoken: list[Utterance], references: list[Utterance], frames: int) -> tuple[int, int, int]:
    """Matched, missed, redundant as the earlier system counts them: its table of costs, frames against frames, keeps
    only the entries that are not zero, so the best pair of all has no entry. One frame a second; enough for lines whose
    only allowed reference is the one they repeat."""
    said, wanted = ({round(one.time): one.text for one in some} for some in (spoken, references))
    table = {
        (i, j): 0.3 * (abs(i - j) / 2) ** 1.5 + (said[i] != wanted.get(j))
        for i in said
        for j in range(frames)
        if abs(i - j) <= 2
    }
    kept = {pair: cost for pair, cost in table.items() if cost != 0}
    rows = sorted(said)
    pairs = assign([{j: cost for (i, j), cost in kept.items() if i == row} for row in rows], 1e6)
    hits = [(rows[row], j) for row, j in pairs if said[rows[row]] == wanted.get(j)]
    return len(hits), len(wanted) - len(hits), len(said) - len(hits)


def test_a_perfect_answer_was_counted_as_missed_and_redundant() -> None:
    references = lines((3.0, "one"), (9.0, "two"), (15.0, "three"))
    assert earlier_count(references, references, 20) == (0, 3, 3)
    late = [Utterance(one.time + 1, one.text) for one in references]
    assert earlier_count(late, references, 20) == (3, 0, 0), "only an answer that is not quite perfect was seen"
    for spoken in (references, late):
        matching = match(spoken, references, window=Window(-2, 2))
        assert (len(matching.pairs), matching.missed, matching.redundant) == (3, (), ())


def test_everything_said_right_is_paired_with_itself() -> None:
    matching = match(RECIPE, RECIPE, similarity="exact")
    assert [(pair.spoken, pair.reference, pair.delta, pair.similarity) for pair in matching.pairs] == [
        (i, i, 0.0, 1.0) for i in range(4)
    ]
    assert matching.missed == matching.redundant == ()


def test_pairs_are_many_before_they_are_close() -> None:
    references = lines((0.0, "a"), (2.0, "a"))
    spoken = lines((2.0, "a"), (4.0, "a"))
    assert [(pair.spoken, pair.reference) for pair in match(spoken, references, window=Window(-2, 2)).pairs] == [
        (0, 0),
        (1, 1),
    ]
    closest = match(spoken, references, window=Window(-2, 2), rejection=0.2)
    assert [(pair.spoken, pair.reference) for pair in closest.pairs] == [(0, 1)]


def test_window_sides() -> None:
    reference = lines((10.0, "x"))
    window = Window(-2.0, 4.0)
    for time, found in ((5.9, 0), (6.0, 1), (10.0, 1), (12.0, 1), (12.1, 0)):
        matching = match(lines((time, "x")), reference, window=window)
        assert len(matching.pairs) == found, time
        if found:
            assert matching.pairs[0].delta == time - 10.0
    assert len(match(reference, reference, window=Window(0, 0)).pairs) == 1


def test_threshold_decides_what_agrees() -> None:
    said, wanted = lines((1.0, "take the red wheel")), lines((1.0, "take the blue wheel"))
    assert len(match(said, wanted, threshold=0.75).pairs) == 1
    assert match(said, wanted, threshold=0.76).pairs == ()
    assert len(match(said, wanted, similarity="exact", threshold=0.0).pairs) == 1


def test_the_closest_text_wins_among_equals() -> None:
    spoken = lines((1.0, "wheel red"), (1.0, "the red wheel"), (1.0, "red"))
    matching = match(spoken, lines((1.0, "the red wheel")))
    assert [pair.spoken for pair in matching.pairs] == [1]
    assert matching.redundant == (2, 0), "in the order of time, then text"


def test_wrong_settings() -> None:
    for arguments in ({"threshold": -0.1}, {"threshold": 1.5}, {"rejection": -1.0}, {"rejection": math.nan}):
        with pytest.raises(PolicyError):
            match(RECIPE, RECIPE, **arguments)
    with pytest.raises(PolicyError, match="no similarity named 'bleu'"):
        match(RECIPE, RECIPE, similarity="bleu")
    with pytest.raises(ScoreError, match=r"is 2\.0; it must be from 0 to 1"):
        match(RECIPE, RECIPE, similarity=lambda said, wanted: 2.0)


def test_windows_by_name_number_and_data_set() -> None:
    assert get_window() == get_window("auto", "my own") == get_window("uniform") == UNIFORM
    assert get_window("auto", "Assembly101") == WINDOWS["assembly101"] == Window(-2, 4)
    assert get_window("wtag", "assembly101") == Window(-3, 6)
    assert get_window(15) == Window(-15, 15)
    assert get_window([-1, 2.5]) == Window(-1, 2.5)
    assert get_window(Window(-1, 0)) == Window(-1, 0)
    for bad in ("kitchen", -1, (1, 2), (1, 2, 3), None, math.inf):
        with pytest.raises(PolicyError):
            get_window(bad)  # type: ignore[arg-type]
