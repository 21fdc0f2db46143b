# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.selection import best_per_part, evenly_among, top_k_mask


@st.composite
def problems(draw):
    """Few distinct scores, so equal scores are common. One is -inf, which must not count as invalid."""
    groups, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    cells = groups * tokens
    values = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0])
    scores = draw(st.lists(values, min_size=cells, max_size=cells))
    valid = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    budget = draw(st.lists(st.integers(0, tokens + 2), min_size=groups, max_size=groups))
    return torch.tensor(scores).view(groups, tokens), torch.tensor(valid).view(groups, tokens), torch.tensor(budget)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_equals_sorting_each_group_by_score_then_index(problem):
    scores, valid, budget = problem
    mask = top_k_mask(scores, valid, budget)
    for g, k in enumerate(budget.tolist()):
        candidates = valid[g].nonzero()[:, 0].tolist()
        best = sorted(candidates, key=lambda token: (-scores[g, token].item(), token))[:k]
        assert mask[g].nonzero()[:, 0].tolist() == sorted(best)


def test_groups_do_not_influence_each_other():
    scores = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    valid, budget = torch.ones_like(scores, dtype=torch.bool), torch.tensor([0, 1, 7, 30, 12])
    together = top_k_mask(scores, valid, budget)
    alone = [top_k_mask(scores[g : g + 1], valid[g : g + 1], budget[g : g + 1])[0] for g in range(5)]
    assert torch.equal(together, torch.stack(alone))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_the_best_of_every_part(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (len(parts),), generator=generator).float()
    counts = torch.randint(0, 5, (6,), generator=generator)
    keep = best_per_part(scores, torch.tensor(parts), counts)
    for part, count in enumerate(counts.tolist()):
        own = [token for token in range(len(parts)) if parts[token] == part]
        best = sorted(own, key=lambda token: (-scores[token].item(), token))[:count]
        assert [token for token in own if keep[token]] == sorted(best)


@given(data=st.data())
def test_evenly(data):
    flags = data.draw(st.lists(st.booleans(), min_size=1, max_size=40))
    k = data.draw(st.integers(0, 45))
    others = torch.tensor([flags])
    marked = evenly_among(others, torch.tensor([k]))
    assert int(marked.sum()) == min(k, sum(flags)) and not (marked & ~others).any()
    ranks = (others.cumsum(1) - 1)[marked]
    steps = ranks.diff()
    assert not len(steps) or int(steps.max() - steps.min()) <= 1
