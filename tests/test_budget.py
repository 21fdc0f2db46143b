# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune import budget
from vtprune.errors import BudgetError


def test_a_ratio_keeps_its_share_of_every_group_and_at_least_one_token():
    assert budget.group_counts(torch.tensor([576, 100, 3, 0]), torch.arange(4), 0.1, None).tolist() == [58, 10, 1, 0]


def test_a_count_is_the_same_for_every_group():
    assert budget.group_counts(torch.tensor([576, 100]), torch.arange(2), None, 64).tolist() == [64, 64]
    assert budget.group_counts(torch.tensor([64, 100]), torch.arange(2), None, 0).tolist() == [0, 0]


def test_a_count_larger_than_the_image_is_refused():
    with pytest.raises(BudgetError, match="keep_tokens=65 is larger than the image: it has 64"):
        budget.group_counts(torch.tensor([64, 100]), torch.arange(2), None, 65)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((7, 9, 12), 32, (7, 9, 12)),  # as published
        ((7, 9, 12), 40, (9, 11, 15)),
        ((7, 9, 12), 8, (1, 2, 3)),  # 1.75 and 2.25 both round to 2: the earlier one moves down
        ((7, 9, 12), 4, (1, 2, 3)),
        ((2,), 32, (2,)),
        ((2,), 8, (1,)),  # a cut needs a layer before it
        ((2, 6, 15), 64, (4, 12, 30)),
    ],
)
def test_published_layers_move_with_the_depth(layers, depth, expected):
    assert budget.rescale_layers(layers, 32, depth) == expected


def test_more_cuts_than_layers_are_refused():
    with pytest.raises(BudgetError, match="do not fit"):
        budget.rescale_layers((7, 9, 12), 32, 3)


@given(st.integers(4, 96), st.lists(st.integers(1, 31), min_size=1, max_size=3, unique=True))
def test_rescaled_layers_stay_distinct_and_inside(depth, layers):
    moved = budget.rescale_layers(sorted(layers), 32, depth)
    assert list(moved) == sorted(set(moved)) and moved[0] >= 1 and moved[-1] < depth


def test_the_ratio_of_transprunes_published_schedule():
    # 576 tokens for 7 layers, 504 for 2, 360 for 3, 72 for 20: 236.25 on average
    assert budget.schedule_ratio((7, 9, 12), (0.875, 0.625, 0.125), 32) == pytest.approx(236.25 / 576)


@given(st.floats(0.219, 1.0), st.integers(24, 3000))
def test_scaled_schedules_meet_the_budget(ratio, entering):
    cuts, shares = (7, 9, 12), (0.875, 0.625, 0.125)
    counts = budget.schedule_counts("transprune", cuts, shares, 32, entering, ratio)
    spent = 7 * entering + 2 * counts[0] + 3 * counts[1] + 20 * counts[2]
    # The last count is rounded: half a token over its 20 layers.
    assert abs(spent - ratio * entering * 32) <= 10 + 1e-6
    assert entering >= counts[0] >= counts[1] >= counts[2] >= 0


def test_a_budget_under_the_floor_names_it():
    with pytest.raises(BudgetError, match=r"layer 7 of 32.*under 21\.9%.*before the LLM") as error:
        budget.check_floor("transprune", (7, 9, 12), 32, 0.2)
    assert error.value.floor == pytest.approx(7 / 32)
    budget.check_floor("transprune", (7, 9, 12), 32, 7 / 32)
