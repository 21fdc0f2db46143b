# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from vtprune.ops.principal_groups import component_counts, loadings, mean_likeness, without_likes
from vtprune.ops.token_pairs import directions_of


def spectrum(tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(tokens, dim) features whose components are far apart in strength."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(tokens, 6, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(dim, 6, generator=generator)).Q
    return left * torch.tensor([30.0, 20.0, 13.0, 9.0, 6.0, 4.0]) @ right.T


@pytest.mark.parametrize(("tokens", "dim"), [(20, 64), (64, 20)])
def test_loadings_are_those_of_the_whole_decomposition(tokens, dim):
    features = spectrum(tokens, dim)
    padded = torch.cat((features, torch.full((3, dim), 7.0)))
    other = torch.randn(tokens + 3, dim, generator=torch.Generator().manual_seed(3))
    both = loadings(torch.stack((padded, other)), torch.tensor([tokens, tokens + 3]), torch.tensor([4, 6]))
    found = both[0, :, :4]
    assert not both[0, :, 4:].any()
    assert torch.equal(found[:tokens], loadings(features[None], torch.tensor([tokens]), torch.tensor([4]))[0])
    table = features.double().sigmoid().T
    expected = torch.linalg.svd(table - table.mean(0), full_matrices=False).Vh[:4].T.abs()
    torch.testing.assert_close(found[:tokens].double(), expected, rtol=1e-3, atol=1e-4)
    assert not found[tokens:].any()


def test_mean_likeness_is_that_of_all_pairs():
    features = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(1))
    directions = directions_of(features, torch.ones(1, 7, dtype=torch.bool))
    table = directions[0] @ directions[0].T
    expected = (table.sum() - table.trace()) / (7 * 6)
    torch.testing.assert_close(mean_likeness(directions, torch.tensor([7]))[0], expected)
    assert mean_likeness(directions[:, :1], torch.tensor([1])).item() == 0


@given(seed=st.integers(0, 999), threshold=st.floats(-0.5, 1))
def test_likes_are_suppressed_one_by_one(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(1, 14, 3, generator=generator), dim=2)
    scores = torch.rand(1, 14, generator=generator)
    belong = torch.randint(4, (1, 14), generator=generator)
    valid = (torch.arange(14) < 12)[None]
    rank, sizes, left = without_likes(directions, scores, belong, valid, torch.tensor([threshold]), 4)
    for component in range(4):
        members = [i for i in range(12) if belong[0, i] == component]
        members.sort(key=lambda i: -scores[0, i].item())
        stays: list[int] = []
        for i in members:
            if not any((directions[0, i] * directions[0, j]).sum() > threshold for j in stays):
                stays.append(i)
        expected = stays + [i for i in members if i not in stays]
        assert sizes[0, component] == len(members) and left[0, component] == len(stays)
        assert [rank[0, i].item() for i in expected] == list(range(len(expected)))


@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_counts_meet_the_budget(data, sizes):
    left = [data.draw(st.integers(min(1, size), size)) for size in sizes]
    k = data.draw(st.integers(0, sum(sizes)))
    counts = component_counts(sizes, left, k, k + 1)
    assert sum(counts) == k
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_bad_numbers_are_refused():
    with pytest.raises(vtprune.VTPruneError, match="NaN"):
        loadings(torch.full((1, 3, 2), torch.nan), torch.tensor([3]), torch.tensor([1]))
