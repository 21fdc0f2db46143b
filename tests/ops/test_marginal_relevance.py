# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from vtprune.ops.marginal_relevance import marginal_relevance


def plainly(features, relevance, k, trade):
    """The rule, a candidate at a time, in double precision."""
    directions = torch.nn.functional.normalize(features.double(), dim=-1)
    scaled = (relevance.double() - relevance.min()) / max(float(relevance.max() - relevance.min()), 1e-300)
    chosen: list[int] = []
    while len(chosen) < min(k, len(features)):
        best, value = -1, -torch.inf
        for i in range(len(features)):
            if i not in chosen:
                likeness = max((float(directions[i] @ directions[j]) for j in chosen), default=0.0)
                gain = trade * float(scaled[i]) - (1 - trade) * likeness
                if gain > value + 1e-12:
                    best, value = i, gain
        chosen.append(best)
    return sorted(chosen)


@given(seed=st.integers(0, 999), trade=st.sampled_from([0.0, 0.3, 0.5, 1.0]), k=st.integers(0, 9))
def test_the_rule(seed, trade, k):
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 6)
    features = torch.randn(2, 9, 4, generator=generator)
    relevance = torch.rand(2, 9, generator=generator)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    keep = marginal_relevance(features, relevance, valid, torch.tensor([k, k]), trade)
    for group, length in enumerate(lengths):
        expected = plainly(features[group, :length], relevance[group, :length], k, trade)
        assert keep[group].nonzero()[:, 0].tolist() == expected


def test_the_ends_are_relevance_alone_and_being_unlike_alone():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.2]]])
    relevance = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    valid, two = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    assert marginal_relevance(features, relevance, valid, two, 1.0).nonzero()[:, 1].tolist() == [0, 1]
    assert marginal_relevance(features, relevance, valid, two, 0.0).nonzero()[:, 1].tolist() == [0, 3]


def test_duplicates_are_kept_once_each_and_bad_numbers_refused():
    features, valid = torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    assert int(marginal_relevance(features, torch.ones(1, 3), valid, torch.tensor([3]), 0.5).sum()) == 3
    with pytest.raises(vtprune.VTPruneError, match="NaN"):
        marginal_relevance(features, torch.tensor([[1.0, torch.nan, 1.0]]), valid, torch.tensor([2]), 0.5)
