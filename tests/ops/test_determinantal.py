# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops import token_pairs
from vtprune.ops.determinantal import (
    conditional_diversity,
    conditional_diversity_order,
    mean_similarity,
    scaled_relevance,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(features):
    return torch.ones(features.shape[:2], dtype=torch.bool)


@given(st.integers(0, 10_000), st.lists(st.tuples(st.integers(0, 16), st.integers(0, 18)), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_every_step_makes_the_determinant_largest(seed, sizes):
    lengths, budget = (torch.tensor(column) for column in zip(*sizes, strict=True))
    width = int(lengths.max())
    features = draw(len(sizes), width, 24, seed=seed)
    relevance = draw(len(sizes), width, seed=seed + 1).sigmoid()
    valid = torch.arange(width) < lengths[:, None]
    keep = conditional_diversity(features, relevance, valid, budget)
    assert torch.equal(keep.sum(1), torch.minimum(budget, lengths))
    assert not (keep & ~valid).any()
    order = conditional_diversity_order(features, relevance, valid, width)
    directions = torch.nn.functional.normalize(features.double(), dim=-1)
    kernel = (directions @ directions.mT) * relevance[:, :, None] * relevance[:, None]
    for group, (length, k) in enumerate(sizes):
        chosen = order[group, :length].tolist()
        assert sorted(chosen) == list(range(length))
        assert sorted(chosen[:k]) == keep[group].nonzero()[:, 0].tolist()
        for step in range(length):
            left = [i for i in range(length) if i not in chosen[:step]]
            subsets = torch.tensor([chosen[:step] + [i] for i in left])
            volumes = torch.logdet(kernel[group][subsets[:, :, None], subsets[:, None, :]])
            assert volumes[left.index(chosen[step])] == pytest.approx(volumes.max().item(), abs=1e-3)


def test_equal_directions_are_chosen_by_relevance_and_equal_relevance_by_direction():
    features = torch.eye(6)[None]
    relevance = torch.tensor([[0.2, 0.9, 0.5, 0.1, 0.7, 0.3]])
    assert conditional_diversity_order(features, relevance, everything(features), 6).tolist() == [[1, 4, 2, 5, 0, 3]]
    features = torch.eye(3)[torch.tensor([0, 0, 1, 1, 2, 2])][None]
    order = conditional_diversity_order(features, torch.ones(1, 6), everything(features), 3)
    assert order.tolist() == [[0, 2, 4]]


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_more_tokens_than_dimensions(dim):
    """When the rank is exhausted, tokens come by relevance; no token comes twice, and there is no NaN."""
    features = draw(2, 40, dim)
    relevance = draw(2, 40, seed=1).sigmoid()
    order = conditional_diversity_order(features, relevance, everything(features), 40)
    for group in range(2):
        assert sorted(order[group].tolist()) == list(range(40))
        rest = relevance[group, order[group, dim:]]
        assert (rest.diff() <= 0).all()


def test_duplicates_come_after_everything_new_however_relevant_they_are():
    features = draw(1, 10, 32)
    features = torch.cat((features, features[:, :3]), dim=1)
    relevance = torch.full((1, 13), 1e-4)
    relevance[0, [0, 1, 2, 10, 11, 12]] = 1.0
    order = conditional_diversity_order(features, relevance, everything(features), 13)[0].tolist()
    assert {i % 10 for i in order[:10]} == set(range(10))
    assert all(i in (0, 1, 2, 10, 11, 12) for i in order[10:])


def test_zero_vectors_come_last_and_nan_is_refused():
    features = draw(1, 8, 16)
    features[0, 2] = 0
    order = conditional_diversity_order(features, torch.ones(1, 8), everything(features), 8)[0].tolist()
    assert order[-1] == 2 and sorted(order) == list(range(8))
    padded = everything(features)
    padded[0, 7] = False
    features[0, 7] = torch.nan
    assert conditional_diversity(features, torch.ones(1, 8), padded, torch.tensor([3])).sum() == 3
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        conditional_diversity(features, torch.ones(1, 8), everything(features), torch.tensor([3]))


def test_relevance_is_scaled_in_each_group_or_in_all():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 9.0, 100.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    alone = torch.tensor([[5e-7, 1, 0.5], [2.5e-7, 1, 0]])
    torch.testing.assert_close(scaled_relevance(scores, valid), alone, rtol=1e-5, atol=1e-6)
    together = torch.tensor([[1.25e-7, 0.25, 0.125], [0.5, 1, 0]])
    torch.testing.assert_close(scaled_relevance(scores, valid, together=True), together, rtol=1e-5, atol=1e-6)
    assert (scaled_relevance(scores, valid) > 0).equal(valid)
    same = scaled_relevance(torch.full((2, 3), 0.4), valid)
    assert same.equal(valid.float())
    assert scaled_relevance(scores[:, :0], valid[:, :0]).shape == (2, 0)


def test_mean_similarity_is_the_mean_of_cosines_and_zero_without_text():
    features, texts = draw(2, 5, 8), [draw(3, 8, seed=1), torch.empty(0, 8)]
    expected = torch.cosine_similarity(features[0, :, None], texts[0][None], dim=-1).mean(1)
    similarity = mean_similarity(features, texts)
    torch.testing.assert_close(similarity[0], expected)
    assert not similarity[1].any()


@pytest.mark.parametrize("block", [4, 512])
def test_the_same_without_a_table_and_in_blocks(monkeypatch, block):
    features, relevance = draw(2, 60, 32), draw(2, 60, seed=1).sigmoid()
    valid, budget = torch.arange(60) < torch.tensor([[60], [41]]), torch.tensor([25, 30])
    expected = conditional_diversity(features, relevance, valid, budget)
    monkeypatch.setattr(token_pairs, "_BLOCK", block)
    assert torch.equal(conditional_diversity(features, relevance, valid, budget), expected)
    monkeypatch.setattr(token_pairs, "_TABLE_ELEMENTS", 0)
    assert torch.equal(conditional_diversity(features, relevance, valid, budget), expected)
