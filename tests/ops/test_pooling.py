# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import BudgetError
from vtprune.ops.pooling import pool_grid


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=100, deadline=None)
def test_exactly_k_rectangles_of_which_each_mean_stands_at_its_centre(rows, columns, data):
    k = data.draw(st.integers(1, rows * columns))
    features = torch.randn(rows * columns, 3, generator=torch.Generator().manual_seed(k))
    keep, pooled, sources = pool_grid(features, (rows, columns), k)
    assert keep.sum() == k and sorted(set(sources.tolist())) == keep.nonzero()[:, 0].tolist()
    place = torch.stack(
        (torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns), dim=1
    ).float()
    for representative in keep.nonzero()[:, 0].tolist():
        cell = (sources == representative).nonzero()[:, 0]
        top, left = place[cell].amin(0).tolist()
        bottom, right = place[cell].amax(0).tolist()
        assert len(cell) == (bottom - top + 1) * (right - left + 1)
        torch.testing.assert_close(pooled[representative], features[cell].mean(0))
        distance = (place[cell] - place[cell].mean(0)).norm(dim=1)
        assert (place[representative] - place[cell].mean(0)).norm() == distance.min()
    assert torch.equal(pooled[~keep], features[~keep])


@pytest.mark.parametrize(
    "grid, k, cell", [((24, 24), 64, 9), ((24, 24), 144, 4), ((24, 24), 36, 16), ((12, 24), 32, 9)]
)
def test_a_fitting_budget_gives_the_regular_pooling(grid, k, cell):
    rows, columns = grid
    features = torch.randn(rows * columns, 2, generator=torch.Generator().manual_seed(0))
    keep, pooled, sources = pool_grid(features, grid, k)
    assert set(sources.bincount(minlength=rows * columns)[keep].tolist()) == {cell}
    side = int(cell**0.5)
    image = features.T.view(1, 2, rows, columns)
    expected = torch.nn.functional.avg_pool2d(image, side).flatten(2)[0].T
    torch.testing.assert_close(pooled[keep], expected)


def test_all_tokens_are_themselves_and_none_is_none():
    features = torch.randn(12, 4)
    keep, pooled, sources = pool_grid(features, (3, 4), 12)
    assert keep.all() and torch.equal(pooled, features) and sources.tolist() == list(range(12))
    keep, pooled, sources = pool_grid(features, (3, 4), 0)
    assert not keep.any() and torch.equal(pooled, features) and set(sources.tolist()) == {-1}


def test_means_of_low_precision_are_taken_in_float32():
    features = torch.full((64, 1), 300.0, dtype=torch.float16)
    assert pool_grid(features, (8, 8), 1)[1].dtype == torch.float16
    assert pool_grid(features * 200, (8, 8), 1)[1].isfinite().all()


@pytest.mark.parametrize("k", [-1, 13])
def test_an_impossible_budget_is_refused(k):
    with pytest.raises(BudgetError):
        pool_grid(torch.randn(12, 4), (3, 4), k)
    with pytest.raises(ValueError, match="3 x 5"):
        pool_grid(torch.randn(12, 4), (3, 5), 2)
