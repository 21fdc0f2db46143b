# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.token_reduction import Reduction


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def assignment(batch, tokens, rows, dropped, seed):
    """(batch, tokens) long in which every row occurs and about a share `dropped` of the other tokens is -1."""
    draws = torch.rand(batch, tokens, generator=generator(seed))
    into = torch.randint(rows, (batch, tokens), generator=generator(seed + 1)).masked_fill(draws < dropped, -1)
    into[:, :rows] = torch.arange(rows)
    return into.gather(1, draws.argsort(dim=1))


def dense(reduction):
    """(batch, rows, tokens) double: the reduction as a matrix."""
    rows = torch.arange(reduction.rows)[:, None]
    return (reduction.into[:, None] == rows) * reduction.weights[:, None].double()


reductions = given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9), st.floats(0, 0.6))


@reductions
@settings(max_examples=60, deadline=None)
def test_is_the_matrix_product(seed, batch, rows, more, dropped):
    into = assignment(batch, rows + more, rows, dropped, seed)
    values, weights = draw(batch, rows + more, 5, seed=seed), draw(batch, rows + more, seed=seed + 1)
    reduction = Reduction(into, rows, weights)
    torch.testing.assert_close(reduction.features(values), (dense(reduction) @ values.double()).float())
    ones = Reduction(into, rows, torch.ones_like(weights))
    torch.testing.assert_close(reduction.sums(values), (dense(ones) @ values.double()).float())
    assert reduction.sizes().tolist() == (into[:, None] == torch.arange(rows)[:, None]).sum(2).tolist()
    torch.testing.assert_close(reduction.sizes(weights), (dense(ones) @ weights[..., None].double())[..., 0].float())


@reductions
@settings(max_examples=60, deadline=None)
def test_weights_of_a_mean_sum_to_one_and_a_lone_token_keeps_its_bits(seed, batch, rows, more, dropped):
    into = assignment(batch, rows + more, rows, dropped, seed)
    values = draw(batch, rows + more, 5, seed=seed)
    sizes = torch.rand(batch, rows + more, generator=generator(seed)) * 100 + 1e-3
    for weights in (None, sizes):
        reduction = Reduction.mean(into, rows, weights)
        torch.testing.assert_close(dense(reduction).sum(2).float(), torch.ones(batch, rows))
        means = reduction.features(values)
        lone = reduction.sizes() == 1
        for sample, row in lone.nonzero().tolist():
            token = (into[sample] == row).nonzero().item()
            assert reduction.weights[sample, token] == 1
            assert torch.equal(means[sample, row], values[sample, token])


@reductions
@settings(max_examples=40, deadline=None)
def test_a_maximum_is_a_maximum(seed, batch, rows, more, dropped):
    into = assignment(batch, rows + more, rows, dropped, seed)
    values = draw(batch, rows + more, 5, seed=seed)
    greatest = Reduction(into, rows, torch.ones_like(values[..., 0]), pooling="max").features(values)
    for sample in range(batch):
        for row in range(rows):
            assert torch.equal(greatest[sample, row], values[sample, into[sample] == row].max(dim=0).values)


@reductions
@settings(max_examples=60, deadline=None)
def test_what_is_spread_is_reduced_to_itself(seed, batch, rows, more, dropped):
    into = assignment(batch, rows + more, rows, dropped, seed)
    weights = torch.rand(batch, rows + more, generator=generator(seed)) + 0.01
    values, residual = draw(batch, rows + more, 5, seed=seed), draw(batch, rows, 5, seed=seed + 1)
    for reduction in (
        Reduction(into, rows, weights),
        Reduction.mean(into, rows, weights),
        Reduction(into, rows, weights, pooling="max"),
    ):
        spread = reduction.spread(residual)
        torch.testing.assert_close(reduction.features(spread), residual)
        torch.testing.assert_close(
            reduction.features(values + spread), reduction.features(values) + residual, rtol=1e-4, atol=1e-5
        )
        assert not spread[into < 0].any()


def test_rows_of_weight_zero_do_not_become_nan():
    reduction = Reduction(torch.tensor([[0, 1, 1, -1]]), 2, torch.tensor([[1.0, 0, 0, 0]]))
    assert reduction.features(torch.ones(1, 4, 2)).tolist() == [[[1, 1], [0, 0]]]
    assert reduction.spread(torch.full((1, 2, 2), 3.0)).tolist() == [[[3, 3], [0, 0], [0, 0], [0, 0]]]


def test_gathered_rows_are_the_tokens():
    values = draw(2, 6, 3).bfloat16()
    places = torch.tensor([[4, 0, 5], [1, 2, 3]])
    reduction = Reduction.gather(places, 6)
    assert reduction.into.tolist() == [[1, -1, -1, -1, 0, 2], [-1, 0, 1, 2, -1, -1]]
    assert torch.equal(reduction.features(values), torch.stack([values[i, p] for i, p in enumerate(places)]))
    sizes = torch.arange(12.0).view(2, 6)
    assert reduction.sizes(sizes).tolist() == [[4, 0, 5], [7, 8, 9]]


def test_original_tokens_are_followed_through_reductions():
    first = Reduction.mean(torch.tensor([[0, 1, 1, 2, 3, -1]]), 4)
    second = Reduction.mean(torch.tensor([[1, 0, -1, 0]]), 2)
    assert first.trace().tolist() == [[0, 1, 1, 2, 3, -1]]
    assert second.trace(first.trace()).tolist() == [[1, 0, 0, -1, 0, -1]]
    assert second.sizes(first.sizes()).tolist() == [[3, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_added_in_float32(dtype):
    values = torch.full((1, 64, 2), 60_000.0, dtype=dtype)
    mean = Reduction.mean(torch.zeros(1, 64, dtype=torch.long), 1)
    assert mean.features(values).dtype == dtype and torch.equal(mean.features(values)[0, 0], values[0, 0])
    assert mean.spread(values[:, :1]).dtype == dtype
    assert mean.sums(values)[0, 0, 0] == values[0, :, 0].float().sum()


def test_nan_stays_in_its_row():
    values = draw(1, 4, 2)
    values[0, 2] = torch.nan
    means = Reduction.mean(torch.tensor([[0, 1, 1, 2]]), 3).features(values)
    assert means.isnan().any(2).tolist() == [[False, True, False]]
    dropped = Reduction.mean(torch.tensor([[0, 1, -1, 2]]), 3).features(values)
    assert not dropped.isnan().any()


def test_gradients_flow_to_the_tokens():
    values = draw(1, 3, 2).requires_grad_()
    Reduction.mean(torch.tensor([[0, 0, -1]]), 1).features(values).sum().backward()
    assert values.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5], [0, 0]]]
