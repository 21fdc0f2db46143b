# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.inner_llm_merging import absorb_dropped


def draw(n, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.rand(n, generator=generator)


def one_by_one(hidden, weights, k, runs):
    """The definition: kept tokens absorb the others one after another."""
    best = sorted(range(len(hidden)), key=lambda i: (-weights[i].item(), i))[:k]
    directions = torch.nn.functional.normalize(hidden, dim=-1)
    merged, sources = hidden.clone(), [i if i in best else -1 for i in range(len(hidden))]
    for i in sorted(set(range(len(hidden))) - set(best)):
        candidates = [j for j in best if runs[j] == runs[i]]
        if candidates:
            target = candidates[int((directions[candidates] @ directions[i]).argmax())]
            merged[target] = (merged[target] + merged[i]) / 2
            sources[i] = target
    return sorted(best), merged, sources


@given(st.integers(0, 40), st.integers(0, 45), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_equals_the_definition(n, k, run_count, seed):
    hidden, weights = draw(n, seed=seed)
    runs = torch.arange(n) * run_count // max(n, 1)
    before = hidden.clone()
    keep, merged, sources = absorb_dropped(hidden, weights, k, runs=runs)
    best, expected, into = one_by_one(hidden, weights, k, runs.tolist())
    assert torch.equal(hidden, before)
    assert keep.nonzero()[:, 0].tolist() == best and sources.tolist() == into
    torch.testing.assert_close(merged, expected)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_merging_is_an_average(n, k, seed):
    hidden, weights = draw(n, seed=seed)
    constant = torch.cat((hidden, torch.ones(n, 1)), dim=1)
    keep, merged, _ = absorb_dropped(constant, weights, k)
    assert keep.sum() == min(k, n)
    torch.testing.assert_close(merged[:, -1], torch.ones(n))
    assert (merged[keep].amax(0) <= constant.amax(0)).all() and (merged[keep].amin(0) >= constant.amin(0)).all()


def test_later_tokens_count_more():
    hidden = torch.tensor([[1.0, 0.0]]) * torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    _, merged, sources = absorb_dropped(hidden, torch.tensor([0.0, 9.0, 0.0, 0.0]), 1)
    assert merged[1, 0] == 2 / 8 + 1 / 8 + 4 / 4 + 8 / 2 and sources.tolist() == [1] * 4


def test_nothing_of_a_later_image_reaches_an_earlier_one():
    hidden, weights = draw(20)
    runs = (torch.arange(20) >= 12).long()
    keep, merged, _ = absorb_dropped(hidden, weights, 8, runs=runs)
    changed = hidden.clone()
    changed[12:] = draw(8, seed=1)[0]
    again, other, _ = absorb_dropped(changed, weights, 8, runs=runs)
    assert torch.equal(again, keep) and torch.equal(merged[:12], other[:12])


@pytest.mark.parametrize("elements", [1, 40])
def test_blocks_change_nothing(elements, monkeypatch):
    hidden, weights = draw(50)
    whole = absorb_dropped(hidden, weights, 20)
    monkeypatch.setattr("vtprune.ops.inner_llm_merging._BLOCK_ELEMENTS", elements)
    for ours, theirs in zip(absorb_dropped(hidden, weights, 20), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_ties_zero_vectors_and_low_precision():
    hidden = torch.zeros(6, 4, dtype=torch.bfloat16)
    keep, merged, sources = absorb_dropped(hidden, torch.zeros(6), 2)
    assert keep.tolist() == [True] * 2 + [False] * 4 and sources.tolist() == [0, 1, 0, 0, 0, 0]
    assert merged.dtype == torch.bfloat16 and merged.isfinite().all()
