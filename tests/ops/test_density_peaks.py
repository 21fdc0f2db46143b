# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops.density_peaks import density_peaks, merge_clusters, scaled_distances, spread_and_separation


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 40), st.integers(0, 45), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_follows_the_formulas(n, clusters, neighbours, seed):
    points = draw(n, 6, seed=seed)
    centres, assigned = density_peaks(points, clusters, neighbours)
    assert centres.tolist() == sorted(set(centres.tolist())) and len(centres) == min(clusters, n)
    if not clusters:
        assert assigned.tolist() == [-1] * n
        return
    distances = (points.double()[:, None] - points.double()).norm(dim=-1) / 6**0.5
    nearest = distances.sort(dim=1).values[:, : min(neighbours, n, clusters if clusters > 2 else n)]
    density = (-nearest.square().mean(1)).exp()
    if len(centres) < n == density.unique().numel():
        denser = density > density[:, None]
        separation = distances.masked_fill(~denser, torch.inf).amin(1)
        score = density * torch.where(denser.any(1), separation, distances.max())
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[centres] = True
        assert score[chosen].min() >= score[~chosen].max() - 1e-5
    assert assigned[centres].tolist() == list(range(len(centres)))
    to_own = distances.gather(1, centres[assigned][:, None])[:, 0]
    torch.testing.assert_close(to_own, distances[:, centres].amin(1), atol=1e-4, rtol=1e-4)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_its_singles(batch, n, clusters, seed):
    points = draw(batch, n, 5, seed=seed)
    centres, assigned = density_peaks(points, clusters)
    merged = merge_clusters(points, centres, assigned)
    for index, alone in enumerate(points):
        own_centres, own_assigned = density_peaks(alone, clusters)
        assert own_centres.tolist() == centres[index].tolist() and own_assigned.tolist() == assigned[index].tolist()
        torch.testing.assert_close(merge_clusters(alone, own_centres, own_assigned), merged[index])


@given(st.integers(3, 30), st.integers(1, 10), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_follows_the_points_when_they_are_permuted(n, clusters, seed):
    points = draw(n, 16, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # A common offset changes no distance.
    permuted, assigned = density_peaks(points[order] + 3, clusters, 3)
    centres, _ = density_peaks(points, clusters, 3)
    assert sorted(order[permuted].tolist()) == centres.tolist()
    assert (assigned >= 0).all()


def test_well_separated_groups_get_a_centre_each():
    group = torch.arange(60) % 5
    points = 40 * draw(5, 8)[group] + 0.1 * draw(60, 8, seed=1)
    centres, assigned = density_peaks(points, 5)
    assert sorted(group[centres].tolist()) == [0, 1, 2, 3, 4]
    assert (group[centres][assigned] == group).all()


@pytest.mark.parametrize("seed", range(5))
def test_one_cluster_is_that_of_the_densest_point(seed):
    points = draw(25, 4, seed=seed)
    spread, _ = spread_and_separation(scaled_distances(points), 7)
    centres, assigned = density_peaks(points, 1)
    assert centres.tolist() == [int(spread.argmin())] and not assigned.any()
    # With one neighbour, as in the reference, all points are equally dense, and the first one is taken.
    assert density_peaks(points, 1, reference_quirks=True)[0].tolist() == [0]


def test_two_clusters_are_two_groups_whatever_pair_is_closest():
    points = torch.cat((draw(20, 4), draw(20, 4, seed=1) + 20))
    points[31] = points[30] + 1e-3
    centres, assigned = density_peaks(points, 2)
    assert (centres < 20).tolist() == [True, False] and assigned.tolist() == [0] * 20 + [1] * 20


def test_points_far_apart_keep_an_order_though_every_density_is_zero():
    points = 1e4 * draw(30, 6)
    assert density_peaks(points, 4)[0].tolist() == density_peaks(points / 1e4 * 1e3, 4)[0].tolist()


@pytest.mark.parametrize("clusters", [1, 2, 3, 7])
def test_equal_points_tie_to_the_lowest_index(clusters):
    centres, assigned = density_peaks(torch.ones(7, 3), clusters)
    assert centres.tolist() == list(range(clusters))
    assert assigned.tolist() == [*range(clusters), *[0] * (7 - clusters)]
    twice = draw(12, 5).repeat_interleave(2, dim=0)
    centres, _ = density_peaks(twice, 3)
    assert len({index // 2 for index in centres.tolist()}) == 3


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_merged_vectors_are_what_the_weights_say(n, clusters, weight, seed):
    points = draw(n, 5, seed=seed)
    centres, assigned = density_peaks(points, clusters)
    merged, mean = merge_clusters(points, centres, assigned, weight), merge_clusters(points, centres, assigned, None)
    for number, centre in enumerate(centres.tolist()):
        members = (assigned == number).nonzero()[:, 0]
        others = members[members != centre]
        expected = points[centre]
        if len(others):
            expected = weight * expected + (1 - weight) * points[others].mean(0)
        torch.testing.assert_close(merged[number], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mean[number], points[members].mean(0), atol=1e-5, rtol=1e-4)
    sizes = assigned.bincount(minlength=len(centres))[:, None]
    torch.testing.assert_close((mean * sizes).sum(0), points.sum(0), atol=1e-4, rtol=1e-4)


def test_no_clusters_and_low_precision():
    points = draw(2, 9, 4).to(torch.float16)
    none = density_peaks(points, 0)
    assert none[0].shape == (2, 0) and merge_clusters(points, *none).shape == (2, 0, 4)
    large = points * 1e4
    assert merge_clusters(large, *density_peaks(large, 2)).dtype == torch.float16
    assert merge_clusters(large, *density_peaks(large, 2)).isfinite().all()


def test_nan_is_refused():
    points = draw(5, 3)
    points[2, 1] = torch.nan
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        density_peaks(points, 2)
