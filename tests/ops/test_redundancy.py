# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops import redundancy
from vtprune.ops.outliers import above_quartiles
from vtprune.ops.redundancy import global_and_local, information_density, repeated, similarity_to_later
from vtprune.ops.selection import top_k_mask


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-6)


@st.composite
def padded(draw_):
    groups, width = draw_(st.integers(1, 3)), draw_(st.integers(1, 14))
    seed = draw_(st.integers(0, 10_000))
    lengths = torch.tensor(draw_(st.lists(st.integers(0, width), min_size=groups, max_size=groups)))
    return draw(groups, width, 4, seed=seed), torch.arange(width) < lengths[:, None]


@given(padded(), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_equal_the_full_matrix_of_each_group_whatever_the_blocks(problem, block):
    features, valid = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redundancy, "_BLOCK_ELEMENTS", block)
        scores = similarity_to_later(features, valid)
        copies = repeated(features, valid, similarity=0.3, count=2)
    for row, length in enumerate(valid.sum(1).tolist()):
        real = features[row, :length]
        cosine = torch.nn.functional.cosine_similarity(real[:, None], real[None], dim=-1)
        later = [max([cosine[i, j].item() for j in range(i + 1, length)], default=-1) for i in range(length)]
        torch.testing.assert_close(scores[row, :length], torch.tensor(later, dtype=torch.float32))
        others = [sum(cosine[i, j] > 0.3 for j in range(length) if j != i) for i in range(length)]
        assert copies[row, :length].tolist() == [int(number) >= 2 for number in others]
    assert (scores[~valid] == -1).all() and not copies[~valid].any()


def test_the_last_of_each_repetition_stays():
    kinds = torch.arange(40) % 4
    features = torch.eye(4)[kinds] * (uniform(40, 1) + 0.1)
    scores = similarity_to_later(features[None])
    keep = top_k_mask(-scores, torch.ones(1, 40, dtype=torch.bool), torch.tensor([4]))
    assert keep.nonzero()[:, 1].tolist() == [36, 37, 38, 39]


def test_one_token_no_token_and_zero_vectors():
    assert similarity_to_later(draw(1, 1, 3)).tolist() == [[-1]]
    assert similarity_to_later(draw(2, 0, 3)).shape == repeated(draw(2, 0, 3), similarity=0, count=1).shape == (2, 0)
    assert similarity_to_later(torch.zeros(1, 3, 2)).tolist() == [[0, 0, -1]]
    assert information_density(draw(2, 0, 3)).tolist() == [0, 0]


def test_density_is_low_for_paper_and_high_for_print():
    paper, print_ = torch.ones(1, 100, 8), draw(1, 100, 8)
    half = torch.cat((paper[:, :50], print_[:, :50]), dim=1)
    assert information_density(paper) == 0
    assert information_density(print_, similarity=0.99) == 1
    assert information_density(half, similarity=0.99) == 0.5
    # Fewer copies than make a token redundant.
    assert information_density(paper[:, :8], count=8) == 1


@given(padded(), st.booleans(), st.lists(st.integers(0, 16), min_size=3, max_size=3))
@settings(max_examples=80, deadline=None)
def test_budgets_are_met_with_outliers_first(problem, noisy, budget):
    features, valid = problem
    deep, early = features[..., 0] ** 3, features[..., 1].softmax(1)
    noise = uniform(*valid.shape) if noisy else None
    budget = torch.tensor(budget[: len(valid)])
    keep = global_and_local(deep, early, torch.zeros(len(valid)), valid, budget, noise=noise)
    assert not (keep & ~valid).any()
    assert keep.sum(1).tolist() == torch.minimum(budget, valid.sum(1)).tolist()
    outliers = above_quartiles(deep, valid)
    for row in range(len(valid)):
        kept_outliers = (keep & outliers)[row].sum()
        assert kept_outliers == min(int(budget[row]), int(outliers[row].sum()))


def test_every_outlier_comes_before_any_local_token():
    deep = torch.tensor([[0.0, 0.1, 0.2, 0.1, 5.0, 9.0, 7.0, 0.0, 0.2, 0.1, 0.1, 0.2]])
    early = torch.arange(12, 0, -1).float()[None]
    valid = torch.ones(1, 12, dtype=torch.bool)
    for budget, kept in ((1, [5]), (2, [5, 6]), (3, [4, 5, 6]), (5, [0, 1, 4, 5, 6])):
        keep = global_and_local(deep, early, torch.zeros(1), valid, torch.tensor([budget]))
        assert keep.nonzero()[:, 1].tolist() == kept


@given(padded())
@settings(max_examples=50, deadline=None)
def test_without_a_budget_density_says_how_many_local_ones(problem):
    features, valid = problem
    deep, early = features[..., 0] ** 3, features[..., 1].softmax(1)
    density = information_density(features, valid, similarity=0.5, count=1)
    keep = global_and_local(deep, early, density, valid)
    outliers = above_quartiles(deep, valid)
    local = top_k_mask(early, valid, (density * valid.sum(1)).round().long())
    assert torch.equal(keep, outliers | local)


def test_draws_follow_the_attention_and_their_noise_alone():
    tokens, draws = 6, 4000
    attention = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.1, 0.0]).expand(draws, -1)
    valid, flat = torch.ones(draws, tokens, dtype=torch.bool), torch.zeros(draws, tokens)
    noise = uniform(draws, tokens)
    keep = global_and_local(flat, attention, torch.full((draws,), 1 / 6), valid, noise=noise)
    assert (keep.sum(1) == 1).all()
    torch.testing.assert_close(keep.float().mean(0), attention[0], atol=0.03, rtol=0)
    again = global_and_local(flat, attention, torch.full((draws,), 1 / 6), valid, noise=noise)
    assert torch.equal(keep, again)
