# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.largest_remainder import apportion

groups = st.lists(st.tuples(st.floats(0, 1e4, allow_subnormal=False), st.integers(0, 40)), min_size=0, max_size=12)


@given(groups, st.integers(0, 500))
@settings(max_examples=200, deadline=None)
def test_the_sum_is_exact_and_nobody_overflows(groups, total):
    weights = torch.tensor([weight for weight, _ in groups], dtype=torch.float64)
    capacities = torch.tensor([capacity for _, capacity in groups], dtype=torch.long)
    counts = apportion(total, weights, capacities)
    assert counts.dtype == torch.long
    assert ((counts >= 0) & (counts <= capacities)).all()
    assert counts.sum() == min(total, capacities.sum())


@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 40)), min_size=1, max_size=10), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_within_a_token_of_filling_all_to_one_level(groups, total):
    weights = torch.tensor([weight for weight, _ in groups], dtype=torch.float64)
    capacities = torch.tensor([capacity for _, capacity in groups])
    counts = apportion(total, weights, capacities)
    low, high = 0.0, 1e5
    for _ in range(200):  # bisection of the level
        level = (low + high) / 2
        filled = torch.minimum(level * weights, capacities.double()).sum()
        low, high = (level, high) if filled < min(total, int(capacities.sum())) else (low, level)
    exact = torch.minimum(high * weights, capacities.double())
    assert ((counts - exact).abs() < 1 + 1e-6).all()


@pytest.mark.parametrize(
    "total, weights, capacities, counts",
    [
        (10, [1, 1, 1], [9, 9, 9], [4, 3, 3]),
        (10, [2, 1, 1], [9, 9, 9], [5, 3, 2]),
        (10, [8, 1, 1], [4, 9, 9], [4, 3, 3]),
        (5, [1, 0, 1], [9, 9, 9], [3, 0, 2]),
        (20, [1, 0, 1], [9, 9, 9], [9, 2, 9]),
        (4, [0, 0], [9, 9], [2, 2]),
        (7, [1, 2], [0, 3], [0, 3]),
        (3, [], [], []),
    ],
)
def test_examples(total, weights, capacities, counts):
    given = torch.tensor(weights, dtype=torch.float64), torch.tensor(capacities, dtype=torch.long)
    assert apportion(total, *given).tolist() == counts
