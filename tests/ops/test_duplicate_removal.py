# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops import duplicate_removal
from vtprune.ops.duplicate_removal import important_and_distinct


def draw(groups, n, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(groups, n, generator=generator), torch.randn(groups, n, dim, generator=generator)


def by_lists(scores, features, k, ratio, step):
    """The algorithm on Python lists, for one group without padding."""
    n = len(scores)
    k = min(k, n)
    order = sorted(range(n), key=lambda i: (-scores[i].item(), i))
    important = int(k * ratio)
    kept, rest, wanted = order[:important], order[important:], k - important
    directions = torch.nn.functional.normalize(features, dim=-1)
    similarity = (directions @ directions.T).tolist()
    while wanted and len(rest) > wanted:
        going = min(step, len(rest) - wanted, len(rest) // 2)
        even, odd = rest[0::2], rest[1::2]
        even.sort(key=lambda i: -max(similarity[i][j] for j in odd))
        rest = even[going:] + odd
    return sorted(kept + (rest if wanted else []))


@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 45)), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.3, 0.5, 0.58, 0.75, 1.0]),
    st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_each_group_is_thinned_as_alone(seed, sizes, ratio, step):
    lengths, budget = (torch.tensor(column) for column in zip(*sizes, strict=True))
    width = int(lengths.max())
    scores, features = draw(len(sizes), width, 8, seed)
    valid = torch.arange(width) < lengths[:, None]
    keep = important_and_distinct(scores, features, valid, valid.sum(1), budget, important_ratio=ratio, step=step)
    assert torch.equal(keep.sum(1), torch.minimum(budget, lengths))
    for group, (length, k) in enumerate(sizes):
        expected = by_lists(scores[group, :length], features[group, :length], k, ratio, step)
        assert keep[group].nonzero()[:, 0].tolist() == expected


def test_one_of_each_pair_of_duplicates_goes():
    scores, features = draw(1, 8, 16, 0)
    scores = torch.arange(8.0).flip(0)[None]
    features[0, 1::2] = features[0, 0::2]
    everything = torch.ones(1, 8, dtype=torch.bool)
    keep = important_and_distinct(
        scores, features, everything, torch.tensor([8]), torch.tensor([4]), important_ratio=0.0
    )
    assert keep[0].nonzero()[:, 0].tolist() == [1, 3, 5, 7]


def test_of_equal_tokens_the_first_ones_are_important():
    keep = important_and_distinct(
        torch.ones(1, 6),
        torch.ones(1, 6, 2),
        torch.ones(1, 6, dtype=torch.bool),
        torch.tensor([6]),
        torch.tensor([3]),
        important_ratio=1.0,
    )
    assert keep[0].tolist() == [True] * 3 + [False] * 3


def test_what_is_in_padding_does_not_matter_and_nan_elsewhere_is_refused():
    scores, features = draw(2, 12, 4, 1)
    valid = torch.arange(12) < torch.tensor([[12], [9]])
    budget = torch.tensor([5, 4])
    expected = important_and_distinct(scores, features, valid, valid.sum(1), budget)
    scores[1, 9:], features[1, 9:] = torch.inf, torch.nan
    assert torch.equal(important_and_distinct(scores, features, valid, valid.sum(1), budget), expected)
    features[0, 3, 1] = torch.nan
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        important_and_distinct(scores, features, valid, valid.sum(1), budget)


def test_few_neighbours_are_enough_or_all_are_looked_at(monkeypatch):
    """Of clusters of tokens that are alike, each knows too few others: this is noticed."""
    scores, features = draw(2, 60, 8, 3)
    features[:, 20:] = features[:, :1]
    valid = torch.arange(60) < torch.tensor([[60], [52]])
    given = scores, features, valid, valid.sum(1), torch.tensor([11, 9])
    monkeypatch.setattr(duplicate_removal, "_NEIGHBOURS", 60)
    expected = important_and_distinct(*given)
    for count in (1, 3, 8):
        monkeypatch.setattr(duplicate_removal, "_NEIGHBOURS", count)
        assert torch.equal(important_and_distinct(*given), expected)
