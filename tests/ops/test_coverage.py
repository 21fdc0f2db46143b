# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops import computed_covers, coverage
from vtprune.ops.coverage import coverage_matrices, coverage_order, max_coverage


def draw(n, m=5, d=16, d_v=12, seed=0, clusters=None):
    generator = torch.Generator().manual_seed(seed)
    features, encoded = torch.randn(n, d, generator=generator), torch.randn(n, d_v, generator=generator)
    if clusters is not None:
        of = torch.randint(clusters, (n,), generator=generator)
        features, encoded = features[of], encoded[of]
    return features, encoded, torch.randn(m, d, generator=generator)


def stacked(inputs, alpha=0.5):
    by_text, by_visual = coverage_matrices(*inputs)
    return torch.cat((by_text, alpha * by_visual)).double()


def stacked_parts(inputs):
    """The two matrices with their weights, as float32."""
    by_text, by_visual = coverage_matrices(*inputs)
    return by_text, 0.5 * by_visual


def dense_greedy(matrix, k):
    """Evaluates every candidate at every step, in float64; of equal gains the first index is taken."""
    covered = matrix.new_zeros(len(matrix))
    open_ = torch.ones(matrix.shape[1], dtype=torch.bool)
    order = []
    for _ in range(min(k, int(open_.sum()))):
        gains = (matrix - covered[:, None]).clamp_min(0).sum(0).masked_fill(~open_, -torch.inf)
        order.append(int(gains.argmax()))
        open_[order[-1]] = False
        covered = torch.maximum(covered, matrix[:, order[-1]])
    return order


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n, k", [(40, 13), (150, 60), (600, 90)])
def test_equals_the_dense_greedy(n, k, seed):
    inputs = draw(n, seed=seed)
    order, gains = coverage_order(*coverage_matrices(*inputs), k)
    assert order.tolist() == dense_greedy(stacked(inputs), k)
    matrix = stacked(inputs)
    value = [matrix[:, order[: i + 1]].amax(1).sum() for i in range(k)]
    torch.testing.assert_close(gains.double().cumsum(0), torch.stack(value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_are_taken_lowest_index_first(seed):
    """Tokens in clusters of equal tokens: equal gains at every step, and no gain after one token of each cluster."""
    inputs = draw(90, seed=seed, clusters=11)
    assert coverage_order(*coverage_matrices(*inputs), 30)[0].tolist() == dense_greedy(stacked(inputs), 30)


@pytest.mark.parametrize("n, k, few", [(40, 40, 256), (300, 90, 256), (300, 90, 40), (90, 30, 89)])
@pytest.mark.parametrize("clusters", [None, 11])
def test_the_search_without_reads_is_right_or_says_that_it_may_not_be(monkeypatch, n, k, few, clusters):
    """On an accelerator. With few candidates a step, or many that are equal, others may have been better."""
    monkeypatch.setattr(coverage, "_FEW", few)
    answers = []
    for seed in range(6):
        inputs = draw(n, seed=seed, clusters=clusters)
        covers = torch.cat([part.T for part in stacked_parts(inputs)], dim=1)
        (order, gains), right = coverage._greedy_of_few(covers, torch.ones(len(covers)), k)
        expected, expected_gains = coverage_order(*coverage_matrices(*inputs), k)
        answers.append(bool(right))
        if answers[-1]:
            assert torch.equal(order, expected)
            torch.testing.assert_close(gains, expected_gains, rtol=1e-5, atol=1e-9)
    assert all(answers) or few < n


@pytest.mark.parametrize("few, right", [(100, True), (1, False)])
def test_too_few_candidates_are_noticed(monkeypatch, few, right):
    monkeypatch.setattr(coverage, "_FEW", few)
    covers = torch.cat([part.T for part in stacked_parts(draw(100, seed=2))], dim=1)
    assert bool(coverage._greedy_of_few(covers, torch.ones(len(covers)), 60)[1]) == right


@pytest.mark.parametrize("seed", range(6))
def test_near_ties_below_rounding_cost_nothing(seed):
    """Clusters of width 0.001: after one token of each cluster, gains differ by less than rounding, which decides."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.randint(20, (320,), generator=generator)
    centres = torch.randn(20, 64, generator=generator)[of]
    noise = torch.randn(2, 320, 64, generator=generator) / 1000
    inputs = (centres + noise[0], centres + noise[1], torch.randn(12, 64, generator=generator))
    matrix = stacked(inputs)
    ours, dense = (matrix[:, order].amax(1).sum() for order in (max_coverage(*inputs, 60), dense_greedy(matrix, 60)))
    assert ours == pytest.approx(dense.item(), rel=1e-6)


def test_all_tokens_alike_gives_the_first_ones():
    alike = torch.ones(300, 8)
    assert max_coverage(alike, alike, alike[:3], 20).tolist() == list(range(20))


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(0, 6), st.integers(0, 45))
@settings(max_examples=60, deadline=None)
def test_is_an_ascending_set_of_the_right_size(seed, n, m, k):
    inputs = draw(n, m=m, seed=seed)
    chosen = max_coverage(*inputs, k).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == min(k, n)
    assert chosen == sorted(dense_greedy(stacked(inputs), k))


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6), st.integers(0, 45), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_candidates_may_be_fewer_than_what_is_covered(seed, n, m, k, fewer):
    candidates = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[fewer:].sort().values
    by_text, by_visual = (matrix[:, candidates] for matrix in coverage_matrices(*draw(n, m=m, seed=seed)))
    matrix = torch.cat((by_text, 0.5 * by_visual)).double()
    assert coverage_order(by_text, by_visual, k)[0].tolist() == dense_greedy(matrix, k)


def test_gains_shrink_and_coverage_grows():
    _, gains = coverage_order(*coverage_matrices(*draw(120, seed=3)), 120)
    assert (gains >= 0).all() and (gains[1:] <= gains[:-1] * (1 + 1e-6)).all()


def test_a_larger_budget_extends_a_smaller_one():
    inputs = draw(200, seed=4)
    small, large = (
        coverage_order(*coverage_matrices(*inputs), 20)[0],
        coverage_order(*coverage_matrices(*inputs), 50)[0],
    )
    assert large[:20].tolist() == small.tolist()


def test_follows_the_tokens_when_they_are_permuted():
    features, encoded, text = draw(80, seed=5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    chosen = max_coverage(features, encoded, text, 25)
    permuted = max_coverage(features[order], encoded[order], text, 25)
    assert sorted(order[permuted].tolist()) == chosen.tolist()


def test_matrix_rows_are_distributions():
    by_text, by_visual = coverage_matrices(*draw(30, m=4))
    torch.testing.assert_close(by_text.sum(1), torch.full((4,), 1 / 4))
    torch.testing.assert_close(by_visual.sum(1), torch.full((30,), 1 / 30))


def test_text_steers_the_choice_and_may_be_missing():
    features, encoded, text = draw(60, m=1, seed=6)
    wanted = 37
    assert wanted in max_coverage(features, encoded, features[wanted : wanted + 1], 1, alpha=0.0).tolist()
    assert len(max_coverage(features, encoded, text[:0], 9)) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_equal_their_float32_values(dtype):
    inputs = [x.to(dtype) for x in draw(70, seed=7)]
    assert max_coverage(*inputs, 15).tolist() == max_coverage(*(x.float() for x in inputs), 15).tolist()


def test_tensors_that_need_gradients_are_fine():
    inputs = [x.requires_grad_() for x in draw(30)]
    assert len(max_coverage(*inputs, 5)) == 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_is_refused(bad, which):
    inputs = draw(20)
    inputs[which][1, 2] = bad
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        max_coverage(*inputs, 5)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_weights_count_outside_the_gain(seed, few):
    generator = torch.Generator().manual_seed(seed)
    covers = torch.rand(120, 90, generator=generator)
    weights = torch.rand(120, generator=generator) ** 4
    weights[7] = 0
    covered, expected = torch.zeros(90), []
    for _ in range(30):
        value = (covers - covered).clamp_min(0).double().sum(1) * weights
        value[expected] = -1
        expected.append(int(value.argmax()))
        covered = torch.maximum(covered, covers[expected[-1]])
    if few:
        (order, _), right = coverage._greedy_of_few(covers, weights, 30)
        assert right
    else:
        order, gains = coverage.greedy_cover(covers, weights, 30)
        assert bool((gains.diff() <= 1e-5).all())
    assert order.tolist() == expected


@pytest.mark.parametrize("kept", [0, 90 * 40, 1 << 26])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_same_without_a_table(monkeypatch, kept, alpha):
    """Whether all rows that were computed are kept, some, or none."""
    for seed in range(4):
        inputs = draw(90, m=seed, seed=seed)
        expected = max_coverage(*inputs, 30, alpha=alpha)
        with monkeypatch.context() as patch:
            patch.setattr(coverage, "_TABLE_ELEMENTS", 0)
            patch.setattr(computed_covers, "_KEPT_ELEMENTS", kept)
            assert torch.equal(max_coverage(*inputs, 30, alpha=alpha), expected)
            with pytest.raises(VTPruneError, match="NaN"):
                max_coverage(inputs[0], inputs[1] * torch.nan, inputs[2], 30)
