# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops import token_pairs
from vtprune.ops.diversity import diversity_order as orders
from vtprune.ops.diversity import max_min_diversity as masks
from vtprune.ops.diversity import order_of_directions
from vtprune.ops.selection import first_chosen


def diversity_order(features, k):
    """One group: (tokens, dim) -> (min(k, tokens),)."""
    everything = torch.ones(1, len(features), dtype=torch.bool)
    return orders(features[None], everything, min(k, len(features)))[0]


def max_min_diversity(features, k):
    everything = torch.ones(1, len(features), dtype=torch.bool)
    return masks(features[None], everything, torch.tensor([k]))[0].nonzero()[:, 0]


def draw(n, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 35))
@settings(max_examples=60, deadline=None)
def test_every_step_takes_the_token_farthest_from_the_chosen_ones(seed, n, k):
    features = draw(n, seed=seed)
    distance = 1 - torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1).double()
    order = diversity_order(features, k).tolist()
    assert len(order) == min(k, n) == len(set(order))
    isolation = distance.fill_diagonal_(torch.inf).amin(0)
    assert isolation[order[0]] == pytest.approx(isolation.max().item(), abs=1e-5)
    for step in range(1, len(order)):
        nearest = distance[order[:step]].amin(0)
        nearest[order[:step]] = -torch.inf
        assert nearest[order[step]] == pytest.approx(nearest.max().item(), abs=1e-5)
    assert max_min_diversity(features, k).tolist() == sorted(order)


def test_one_of_each_cluster_comes_first_and_nothing_comes_twice():
    clusters = torch.arange(40) % 4
    features = draw(4)[clusters]
    assert sorted(clusters[diversity_order(features, 4)].tolist()) == [0, 1, 2, 3]
    assert max_min_diversity(features, 40).tolist() == list(range(40))


def test_length_does_not_count_but_direction_does():
    features = draw(50)
    scale = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    assert max_min_diversity(features * scale, 12).tolist() == max_min_diversity(features, 12).tolist()


@pytest.mark.parametrize("n, k, expected", [(5, 0, 0), (1, 1, 1), (0, 3, 0), (4, 9, 4)])
def test_edges(n, k, expected):
    assert len(max_min_diversity(draw(n), k)) == expected


def test_zero_vectors_are_fine_and_nan_is_refused():
    features = draw(10)
    features[3] = 0
    assert len(set(max_min_diversity(features, 10).tolist())) == 10
    features[4, 0] = torch.nan
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        max_min_diversity(features, 3)


def ragged():
    lengths = torch.tensor([9, 0, 30, 1, 22])
    valid = torch.arange(30) < lengths[:, None]
    features = draw(5 * 30, seed=3).view(5, 30, 12)
    features[2, 4] = features[2, 7]
    return features * valid[..., None], valid, torch.tensor([4, 0, 11, 5, 40])


def test_groups_are_chosen_as_if_each_were_alone():
    features, valid, budget = ragged()
    keep = masks(features, valid, budget)
    for group, length, k, kept in zip(features, valid.sum(1).tolist(), budget.tolist(), keep, strict=True):
        assert kept.nonzero()[:, 0].tolist() == max_min_diversity(group[:length], k).tolist()


@pytest.mark.parametrize("elements", [0, 1 << 26])
@pytest.mark.parametrize("block", [4, 512])
def test_the_same_without_a_table_and_in_blocks(monkeypatch, elements, block):
    expected = masks(*ragged())
    monkeypatch.setattr(token_pairs, "_TABLE_ELEMENTS", elements)
    monkeypatch.setattr(token_pairs, "_BLOCK", block)
    assert torch.equal(masks(*ragged()), expected)


def test_weighted_tokens_are_chosen_once():
    directions, everything = torch.ones(1, 4, 2) / 2**0.5, torch.ones(1, 4, dtype=torch.bool)
    order = order_of_directions(directions, everything, 3, torch.tensor([[0.1, 0.9, 0.5, 0.0]]))
    assert int(first_chosen(order, everything, torch.tensor([3])).sum()) == 3
