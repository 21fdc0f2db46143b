# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.run_budgets import best_of_runs, runs_of


@given(length=st.integers(0, 40), count=st.integers(1, 20), padding=st.integers(0, 5))
def test_runs_are_consecutive_and_nearly_equal(length, count, padding):
    valid = torch.arange(length + padding) < length
    runs = runs_of(valid[None], count)[0, :length]
    sizes = runs.bincount(minlength=count)
    assert bool((runs.diff() >= 0).all())
    assert int(sizes.max() - sizes.min()) <= 1 and sizes.tolist() == sorted(sizes.tolist(), reverse=True)


@given(seed=st.integers(0, 999), k=st.integers(0, 40), count=st.integers(1, 12))
def test_budgets_are_met_and_a_run_keeps_its_most_salient(seed, k, count):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(2, 30, generator=generator).square_()
    valid = torch.arange(30) < torch.tensor([[30], [17]])
    keep = best_of_runs(saliency, valid, torch.tensor([k, k]), count)
    assert keep.sum(1).tolist() == [min(k, 30), min(k, 17)]
    runs = runs_of(valid, count)
    for group in range(2):
        for run in range(count):
            members = valid[group] & (runs[group] == run)
            kept, left = saliency[group][members & keep[group]], saliency[group][members & ~keep[group]]
            assert not len(kept) or not len(left) or kept.min() >= left.max()


def test_what_a_run_cannot_take_goes_to_the_most_salient_of_the_others():
    saliency = torch.tensor([[9.0, 9.0, 0.1, 0.2, 0.3, 0.1]])
    valid, four = torch.ones(1, 6, dtype=torch.bool), torch.tensor([4])
    assert best_of_runs(saliency, valid, four, 3).nonzero()[:, 1].tolist() == [0, 1, 3, 4]
    assert best_of_runs(saliency, valid, four, 3, reference_quirks=True).nonzero()[:, 1].tolist() == [0, 1]


@pytest.mark.parametrize("saliency", [torch.zeros(1, 8), torch.ones(1, 8)])
def test_equal_attention_keeps_the_first(saliency):
    keep = best_of_runs(saliency, torch.ones(1, 8, dtype=torch.bool), torch.tensor([3]), 1)
    assert keep.nonzero()[:, 1].tolist() == [0, 1, 2]
