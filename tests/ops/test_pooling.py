# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import BudgetError
from vtprune.ops.pooling import adaptive_pool, pool_grid, progressive_counts


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


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(1, 14), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_adaptive_cells_are_torch_s_and_partition_the_grid(rows, columns, down, across, images):
    features = torch.randn(images, rows * columns, 3, generator=torch.Generator().manual_seed(rows))
    merged = adaptive_pool(features, (rows, columns), (down, across))
    down, across = min(down, rows), min(across, columns)
    assert merged.features.shape == (images, down * across, 3)
    places, sources = merged.places[0].tolist(), merged.sources[0].tolist()
    assert places == sorted(set(places)) == sorted(set(sources))
    assert all(sources[place] == place for place in places)
    for cell, place in enumerate(places):
        top, left = cell // across * rows // down, cell % across * columns // across
        bottom, right = -(-(cell // across + 1) * rows // down), -(-(cell % across + 1) * columns // across)
        window = [row * columns + column for row in range(top, bottom) for column in range(left, right)]
        torch.testing.assert_close(merged.features[:, cell], features[:, window].mean(1))
        assert {token for token, source in enumerate(sources) if source == place} <= set(window)


def test_a_cell_stands_at_its_centre():
    features = torch.randn(1, 36, 2)
    assert adaptive_pool(features, (6, 6), (2, 2)).places.tolist() == [[7, 10, 25, 28]]
    assert adaptive_pool(features, (6, 6), (3, 1)).places.tolist() == [[2, 14, 26]]


def test_a_grid_pooled_to_itself_is_itself_and_to_one_cell_its_mean():
    features = torch.randn(2, 12, 5)
    assert torch.equal(adaptive_pool(features, (3, 4), (3, 4)).features, features)
    torch.testing.assert_close(adaptive_pool(features, (3, 4), (1, 1)).features, features.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="3 x 5"):
        adaptive_pool(features, (3, 5), (1, 1))
    large = torch.full((1, 64, 1), 60000.0, dtype=torch.float16)
    assert torch.equal(adaptive_pool(large, (8, 8), (2, 2)).features, large[:, :4])


@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 8), st.floats(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_progressive_budgets_are_exact(frames, tokens, group, ratio, data):
    k = data.draw(st.integers(0, frames * tokens))
    counts = progressive_counts(frames, tokens, k, group=group, ratio=ratio)
    assert counts.sum() == k and (counts <= tokens).all()
    leads = torch.arange(frames) % group == 0
    others = counts[~leads]
    assert counts[leads].max() - counts[leads].min() <= 1
    if len(others):
        assert others.max() - others.min() <= 1 and counts[leads].min() >= others.max() - 1


def test_four_to_one_over_groups_of_four():
    assert progressive_counts(8, 196, 7 * 49 * 2, group=4, ratio=4).tolist() == [196, 49, 49, 49] * 2
