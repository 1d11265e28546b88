"""Selection against its naive twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsieve.errors import ScoreError
from kvsieve.select import _lowest_slot, check_scores, lowest_slot, top_mask, top_mask_naive


@settings(max_examples=150, deadline=None)
@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    n=st.integers(1, 12),
    levels=st.integers(1, 6),
    drop_one=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_top_mask_equals_naive(b, h, n, levels, drop_one, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (b, h, n), generator=g).float()  # few levels: many ties
    positions = torch.rand(b, h, n, generator=g).argsort(-1).int()
    valid = torch.rand(b, h, n, generator=g) < 0.8
    protected = (torch.rand(b, h, n, generator=g) < 0.2) & valid
    if drop_one:
        counts = (valid.sum(-1) - 1).clamp_min(0)
    else:
        counts = torch.randint(0, n + 1, (b, h), generator=g)
    got = top_mask(scores, positions, valid, protected, counts)
    assert torch.equal(got, top_mask_naive(scores, positions, valid, protected, counts))
    assert torch.equal(got.sum(-1), torch.minimum(counts, valid.sum(-1)))
    assert not bool((got & ~valid).any())


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9)), levels=st.integers(1, 40),
    infinite=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_lowest_slot_is_the_first_of_all_open_ones(shape, levels, infinite, seed):
    """On a processor and, as written for other devices, in tensors."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, shape, generator=g).float()
    if infinite:
        scores[scores == 0] = float("-inf")
        scores[scores == levels - 1] = float("inf")
    positions = torch.rand(shape, generator=g).argsort(-1).int()
    closed = torch.rand(shape, generator=g) < 0.3
    closed[..., 0] = False
    got = lowest_slot(scores, positions, closed)
    assert torch.equal(got, _lowest_slot(scores, positions, closed))
    for b in range(shape[0]):
        for h in range(shape[1]):
            open_ = [i for i in range(shape[2]) if not closed[b, h, i]]
            want = min(open_, key=lambda i: (float(scores[b, h, i]), int(positions[b, h, i])))
            assert int(got[b, h]) == want


@pytest.mark.parametrize("n", [1, 7])
def test_ties_go_to_the_more_recent(n):
    scores = torch.zeros(1, 1, 8)
    positions = torch.tensor([[[7, 3, 5, 1, 0, 2, 6, 4]]])
    everything = torch.ones(1, 1, 8, dtype=torch.bool)
    keep = top_mask(scores, positions, everything, ~everything, torch.tensor([[n]]))
    assert sorted(positions[keep].tolist()) == list(range(8 - n, 8))


def test_nan_raises_only_where_a_token_is():
    positions = torch.zeros(1, 1, 2, dtype=torch.int32)
    valid = torch.tensor([[[True, False]]])
    assert check_scores(torch.tensor([[[1.0, float("nan")]]]), positions, valid).dtype == torch.float32
    with pytest.raises(ScoreError, match="1 of 1 scores are NaN"):
        check_scores(torch.tensor([[[float("nan"), 1.0]]]), positions, valid)
    with pytest.raises(ScoreError, match="1 of 2 scores are NaN"):
        check_scores(torch.tensor([[[float("nan"), 1.0]]]), positions)
    with pytest.raises(ScoreError, match="one score per stored token"):
        check_scores(torch.zeros(1, 1, 3), positions)
