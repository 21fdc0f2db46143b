# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.dual_attention import dual_attention, dual_attention_filter, key_tokens


def draw(batch=3, heads=2, text=5, tokens=20, seed=0):
    rows = torch.randn(batch, heads, text, tokens, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)
    return dual_attention(rows)


def test_sum_and_maximum_over_the_text_of_the_mean_over_heads():
    rows = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    total, peak = dual_attention(rows)
    torch.testing.assert_close(total, rows.mean(1).sum(1))
    torch.testing.assert_close(peak, rows.mean(1).max(1).values)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 2))
    for actual, expected in zip(dual_attention(padded), (total, peak), strict=True):
        torch.testing.assert_close(actual, expected)
    for empty in dual_attention(rows[:, :, :0]):
        assert torch.equal(empty, torch.zeros(2, 5))


def test_a_token_goes_that_falls_short_of_both_thresholds():
    total, peak = torch.tensor([[1.0, 1.0, 4.0, 4.0]]), torch.tensor([[0.1, 0.5, 0.1, 0.5]])
    thresholds = dict(global_threshold=0.2, individual_threshold=0.3)
    assert dual_attention_filter(total, peak, **thresholds).tolist() == [[False, True, True, True]]
    spared = torch.tensor([[True, False, False, False]])
    assert dual_attention_filter(total, peak, **thresholds, spared=spared).all()
    # Padding does not count and is not kept.
    valid = torch.tensor([[True, True, False, False]])
    assert dual_attention_filter(total, peak, **thresholds, valid=valid).tolist() == [[True, True, False, False]]


@given(st.integers(0, 10_000), st.floats(0.001, 0.2), st.floats(0.001, 0.5))
@settings(max_examples=60, deadline=None)
def test_a_budget_scales_both_thresholds_together(seed, share, individual):
    total, peak = draw(seed=seed)
    thresholds = dict(global_threshold=share, individual_threshold=individual)
    kept = dual_attention_filter(total, peak, **thresholds)
    assert torch.equal(dual_attention_filter(total, peak, **thresholds, budget=kept.sum(1)), kept)
    fewer = dual_attention_filter(total, peak, **thresholds, budget=kept.sum(1) // 2)
    assert (kept | ~fewer).all() and fewer.sum(1).tolist() == (kept.sum(1) // 2).tolist()
    scaled = dict(global_threshold=3 * share, individual_threshold=3 * individual)
    assert torch.equal(dual_attention_filter(total, peak, **scaled, budget=kept.sum(1) // 2), fewer)


@pytest.mark.parametrize("k", [0, 2, 4, 11, 17, 25])
def test_budgets_are_met_and_spared_tokens_come_first(k):
    total, peak = draw()
    valid = torch.arange(20) < torch.tensor([20, 17, 3])[:, None]
    spared = torch.zeros_like(valid)
    spared[:, ::5] = True
    kept = dual_attention_filter(total, peak, valid=valid, spared=spared, budget=torch.full((3,), k))
    assert kept.sum(1).tolist() == [min(k, 20), min(k, 17), min(k, 3)] and not (kept & ~valid).any()
    alive = spared & valid
    assert (kept & alive).sum(1).tolist() == [min(k, count) for count in alive.sum(1).tolist()]


def test_attention_of_zero_keeps_what_it_cannot_tell_apart():
    nothing = torch.zeros(1, 6)
    assert dual_attention_filter(nothing, nothing).all()
    kept = dual_attention_filter(nothing, nothing, budget=torch.tensor([2]))
    assert kept.tolist() == [[True, True, False, False, False, False]]
    with pytest.raises(ValueError, match="above 0"):
        dual_attention_filter(nothing, nothing, individual_threshold=0.0, budget=torch.tensor([2]))


def test_key_tokens_are_the_share_the_cls_token_looks_at_most():
    rows = torch.rand(2, 3, 30, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(30) < torch.tensor([30, 13])[:, None]
    marked = key_tokens(rows, valid)
    assert marked.sum(1).tolist() == [3, 2] and not (marked & ~valid).any()
    mean = rows.mean(1).masked_fill(~valid, -1)
    for image in range(2):
        assert mean[image, marked[image]].min() >= mean[image, ~marked[image]].max()
    assert torch.equal(key_tokens(rows[1:, :, :13]), marked[1:, :13])
