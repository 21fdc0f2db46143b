# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.outliers import above_quartiles, local_outlier_factor, outlier_share


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook(values, k):
    """The definition, with all distances computed; of equally near neighbours the smaller numbers are taken."""
    values, count = values.tolist(), len(values)
    k = min(k, count - 1)
    near = [
        sorted((p for p in range(count) if p != at), key=lambda p, at=at: (abs(values[p] - values[at]), values[p]))[:k]
        for at in range(count)
    ]
    reach_of = [abs(values[near[at][-1]] - values[at]) for at in range(count)]
    density = [
        1 / (sum(max(reach_of[o], abs(values[o] - values[at])) for o in near[at]) / k + 1e-10) for at in range(count)
    ]
    return [sum(density[o] for o in near[at]) / k / density[at] for at in range(count)]


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=25), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_equals_the_definition_with_ties_and_duplicates(numbers, k):
    values = torch.tensor(numbers) * 0.25  # exact in binary, so that equal distances are equal
    torch.testing.assert_close(
        local_outlier_factor(values, k), torch.tensor(textbook(values, k), dtype=torch.float64), rtol=1e-9, atol=0
    )


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_order_and_company_do_not_matter(seed, count, k):
    values = draw(count, seed=seed)
    factors = local_outlier_factor(values, k)
    assert factors.isfinite().all() and (factors > 0).all()
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(local_outlier_factor(values[shuffle], k), factors[shuffle])
    together = torch.stack((values, draw(count, seed=seed + 1), values)).view(3, 1, count)
    assert torch.equal(local_outlier_factor(together, k)[2, 0], factors)


@given(st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=2, max_size=40), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_what_is_left_out_changes_nothing(numbers, k):
    values = torch.tensor([value for value, _ in numbers]) * 0.25
    valid = torch.tensor([real for _, real in numbers])
    factors = local_outlier_factor(values, k, valid)
    torch.testing.assert_close(factors[valid], local_outlier_factor(values[valid], k), rtol=1e-12, atol=0)
    assert (factors[~valid] == 1).all()
    assert outlier_share(values, k, 1.2, valid) == outlier_share(values[valid], k, 1.2)
    assert outlier_share(values, k, 0.5, torch.zeros_like(valid)) == 0


def test_both_tails_are_outliers_and_nothing_in_between():
    values = torch.cat((torch.linspace(0, 1, 50), torch.tensor([-5.0, 9.0])))
    assert (local_outlier_factor(values, 5) > 1.5).nonzero()[:, 0].tolist() == [50, 51]
    assert outlier_share(values, 5) == 2 / 52
    assert outlier_share(values, 5, factor=1e9) == 0


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0], [1.0] * 30])
def test_nothing_stands_out_of_nothing_or_of_the_same(values):
    assert outlier_share(torch.tensor(values), 20) == 0


def test_memory_is_linear():
    assert local_outlier_factor(draw(100_000), 10).shape == (100_000,)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_fences_are_those_of_each_group_without_its_padding(seed, groups, width):
    values = draw(groups, width, seed=seed) ** 3
    lengths = torch.randint(0, width + 1, (groups,), generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(width) < lengths[:, None]
    found = above_quartiles(values.masked_fill(~valid, 1e6), valid)
    for row, length in enumerate(lengths.tolist()):
        real = values[row, :length].numpy()
        if length:
            first, third = np.quantile(real, [0.25, 0.75])
            distance = real - (third + 1.5 * (third - first))
            clear = abs(distance) > 1e-5
            assert (found[row, :length].numpy() == (distance > 0))[clear].all()
        assert not found[row, length:].any()


def test_fences_of_equal_values_and_of_none():
    assert not above_quartiles(torch.ones(2, 9)).any()
    assert above_quartiles(torch.empty(2, 0)).shape == (2, 0)
    values = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 100]])
    assert above_quartiles(values).nonzero()[:, 1].tolist() == [7]
