# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.token_recycling import recycle_dropped, recycling_counts

shares = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])


@given(st.integers(0, 300), st.integers(0, 310), shares)
@settings(max_examples=300, deadline=None)
def test_what_is_kept_and_merged_is_what_is_asked_for(n, k, share):
    kept, pooled, clusters = recycling_counts(n, k, share)
    assert kept + clusters == min(k, n) and kept + pooled <= max(n, kept)
    assert clusters <= pooled or clusters == 0
    if share and 2 <= k < n:
        assert 1 <= clusters <= pooled // 10 + 1
        assert kept >= k / 2 and pooled == min(int(share * (n - kept)) + 1, n - kept)


def test_the_published_counts():
    """Kept and merged tokens of 576 after each stage, with the budgets of the reference."""
    for kept, left in ((300, 309), (303, 312), (238, 249), (66, 82)):
        assert recycling_counts(576, left, 0.3)[0] == kept
    assert recycling_counts(309, 204, 0.3) == (200, 33, 4)
    assert recycling_counts(40, 3, 1.0) == (2, 38, 1)


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(0, 60), shares)
@settings(max_examples=80, deadline=None)
def test_kept_tokens_stay_and_merged_ones_are_means(seed, n, k, share):
    generator = torch.Generator().manual_seed(seed)
    points, scores = torch.randn(n, 6, generator=generator), torch.randn(n, generator=generator)
    runs = (torch.arange(n) >= n // 3).long()
    keep, merged, sources = recycle_dropped(points, scores, k, share, runs=runs)
    kept, pooled, clusters = recycling_counts(n, k, share)
    order = scores.argsort(descending=True)
    assert int(keep.sum()) == min(k, n) and keep[order[:kept]].all()
    assert torch.equal(merged[order[:kept]], points[order[:kept]])
    assert sources[order[:kept]].tolist() == order[:kept].tolist()
    assert (sources[order[kept + pooled :]] == -1).all()
    assert torch.equal(sources[keep], keep.nonzero()[:, 0])
    centres = [c for c in order[kept : kept + pooled].tolist() if keep[c]]
    assert len(centres) == clusters
    for place in order[kept : kept + pooled].tolist():
        own = [c for c in centres if runs[c] == runs[place]]
        if clusters == 0 or not own:
            assert sources[place] == -1
            continue
        distance = (points[own] - points[place]).norm(dim=-1)
        assert int(sources[place]) in own and distance[own.index(int(sources[place]))] <= distance.min() + 1e-4
    for centre in centres:
        torch.testing.assert_close(merged[centre], points[sources == centre].mean(0), atol=1e-5, rtol=1e-5)


def test_two_heaps_of_leftovers_become_two_tokens():
    generator = torch.Generator().manual_seed(0)
    heaps = torch.tensor([[9.0, 0], [-9, 0]])[torch.arange(12) % 2] + torch.randn(12, 2, generator=generator) * 0.1
    points, scores = torch.cat([torch.zeros(4, 2), heaps]), torch.arange(16, 0, -1).float()
    keep, merged, sources = recycle_dropped(points, scores, 6, 1.0)
    assert keep[:4].all() and int(keep[4:].sum()) == 2
    assert {int(place) % 2 for place in keep[4:].nonzero()} == {0, 1}
    assert (sources[4:] % 2 == torch.arange(12) % 2).all()
    assert merged[4:][keep[4:]][:, 0].abs().tolist() == pytest.approx([9, 9], abs=0.1)
