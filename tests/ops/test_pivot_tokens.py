# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vtprune.ops.pivot_tokens import leading, unlike_pivots


def by_hand(points, pivots, chosen, candidates, k):
    """One group, on lists: each pivot takes the candidates with the lowest cosine to it, one pivot after another."""
    keep, rest = set(chosen), max(min(k, len(candidates)) - len(chosen), 0)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + (number < rest % len(pivots))
        left = [c for c in candidates if c not in keep]
        cosine = cosine_similarity(points, pivot[None], dim=-1).tolist()
        keep.update(sorted(left, key=lambda c: (cosine[c], c))[:share])
    return sorted(keep)


@st.composite
def problems(draw):
    """Directions from a small set, so that equal similarities are common; lengths do not matter."""
    groups, tokens, pivots = draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    directions = torch.randn(6, 4, generator=generator)
    points = directions[torch.randint(6, (groups, tokens), generator=generator)]
    starts = torch.randn(groups, pivots, 4, generator=generator)
    valid = torch.rand(groups, tokens, generator=generator) < 0.8
    real = torch.rand(groups, pivots, generator=generator) < 0.8
    real[:, 0] = True
    chosen = valid & (torch.rand(groups, tokens, generator=generator) < 0.2)
    budget = torch.tensor(draw(st.lists(st.integers(0, tokens + 2), min_size=groups, max_size=groups)))
    return points, starts, real, chosen, valid, torch.maximum(budget, chosen.sum(1))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_pivots_choose_in_turn(problem):
    points, pivots, real, chosen, valid, budget = problem
    keep = unlike_pivots(points, pivots, real, chosen, valid, budget)
    assert keep.sum(1).tolist() == torch.minimum(budget, valid.sum(1)).tolist()
    for g, k in enumerate(budget.tolist()):
        starts, candidates = chosen[g].nonzero()[:, 0].tolist(), valid[g].nonzero()[:, 0].tolist()
        expected = by_hand(points[g], pivots[g][real[g]], starts, candidates, k)
        assert keep[g].nonzero()[:, 0].tolist() == expected


@given(problems(), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_the_largest_lead(problem, count):
    points, _, _, _, valid, _ = problem
    norms = points.abs().sum(-1)
    index, real = leading(norms, valid, count)
    assert index.shape == real.shape == (len(norms), min(count, norms.shape[1]))
    for g in range(len(norms)):
        candidates = valid[g].nonzero()[:, 0].tolist()
        best = sorted(candidates, key=lambda token: (-norms[g, token].item(), token))[:count]
        assert index[g][real[g]].tolist() == best


def test_scaling_changes_nothing_and_a_zero_vector_is_neither_alike_nor_opposite():
    points = torch.tensor([[[2.0, 0], [0, 0], [-0.1, 0], [0, 5]]])
    pivots, real = torch.tensor([[[3.0, 0]]]), torch.ones(1, 1, dtype=torch.bool)
    none, valid = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    kept = [unlike_pivots(points, pivots, real, none, valid, torch.tensor([k]))[0].tolist() for k in (1, 2, 3)]
    assert kept == [[False, False, True, False], [False, True, True, False], [False, True, True, True]]


def test_groups_do_not_influence_each_other():
    generator = torch.Generator().manual_seed(0)
    points, pivots = torch.randn(4, 30, 8, generator=generator), torch.randn(4, 3, 8, generator=generator)
    real, valid = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 30, dtype=torch.bool)
    chosen, budget = torch.zeros_like(valid), torch.tensor([0, 7, 29, 30])
    together = unlike_pivots(points, pivots, real, chosen, valid, budget)
    for g in range(4):
        one = slice(g, g + 1)
        alone = unlike_pivots(points[one], pivots[one], real[one], chosen[one], valid[one], budget[one])
        assert torch.equal(together[one], alone)
