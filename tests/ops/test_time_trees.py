# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import vtprune
from vtprune.ops.density_peaks import density_peaks
from vtprune.ops.time_trees import cluster_frames, grow_trees, merge_scenes


def still_video(frames: int, tokens: int, seed: int = 0, noise: float = 0.2) -> torch.Tensor:
    """(frames, tokens, 6): each token changes a little from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, tokens, 6, generator=generator)
    return first + noise * torch.randn(frames, tokens, 6, generator=generator)


@settings(deadline=None)
@given(seed=st.integers(0, 99), frames=st.integers(1, 7), data=st.data())
def test_counts_are_exact_and_merged_tokens_are_plain_means(seed, frames, data):
    tokens = 10
    features = still_video(frames, tokens, seed)
    scene_of = torch.tensor([0, *(data.draw(st.integers(0, 1)) for _ in range(frames - 1))]).cumsum(0)
    salient = torch.tensor([data.draw(st.integers(0, tokens)) for _ in range(frames)])
    merged = torch.tensor([data.draw(st.integers(0, tokens - count)) for count in salient.tolist()])
    saliency = torch.rand(frames, tokens, generator=torch.Generator().manual_seed(seed))
    keep, changed, sources = merge_scenes(features, saliency, scene_of, salient, merged, by_scene=False)
    assert int(keep.sum()) == int(salient.sum() + merged.sum())
    flat, went, scene = features.flatten(0, 1), sources.flatten(), scene_of.repeat_interleave(tokens)
    for place in keep.flatten().nonzero()[:, 0].tolist():
        members = went == place
        assert members[place] and set(scene[members].tolist()) == {scene[place].item()}
        torch.testing.assert_close(changed.flatten(0, 1)[place], flat[members].mean(0))
    # What is dropped was left in a frame that no merged token fell to.
    merging = (keep.sum(1) > salient)[scene_of == scene_of[-1]]
    if merging.all():
        assert (went[scene == scene_of[-1]] >= 0).all()


def test_still_tokens_become_one_and_scenes_stay_apart():
    features = still_video(4, 5, noise=0.01)
    directions, free = normalize(features, dim=2), torch.ones(4, 5, dtype=torch.bool)
    one = grow_trees(directions, free, torch.zeros(4, dtype=torch.long), torch.tensor([0]), 0.8)
    assert one.child.sum(1).tolist() == [0, 5, 5, 5]
    assert one.roots().tolist() == [list(range(5))] * 4
    two = grow_trees(directions, free, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]), 0.8)
    assert two.child.sum(1).tolist() == [0, 5, 0, 5]
    # At least so many are left, and those that join are the most alike.
    few = grow_trees(directions, free, torch.zeros(4, dtype=torch.long), torch.tensor([12]), 0.8)
    assert int((~few.child).sum()) == 13


def test_a_mean_over_time_counts_everything_once_and_the_quirk_does_not():
    features, scene_of = torch.ones(3, 1, 4), torch.zeros(3, dtype=torch.long)
    directions, everything = normalize(features, dim=2), torch.ones(3, 1, dtype=torch.bool)
    # One token has to be left, and as many joins as are allowed less one happen.
    trees = grow_trees(directions, everything, scene_of, torch.tensor([1]), 0.8)
    assert trees.child.sum().item() in (1, 2)
    free = grow_trees(directions, everything, scene_of, torch.tensor([0]), 0.8)
    totals, sizes = free.sums(features)
    assert (totals[0] / sizes[0]).tolist() == [[1.0] * 4]
    totals, sizes = free.sums(features, reference_quirks=True)
    assert (totals[0] / sizes[0]).tolist() == [[1.5] * 4]


@settings(deadline=None)
@given(seed=st.integers(0, 99), data=st.data())
def test_frames_are_clustered_as_each_one_alone(seed, data):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(3, 12, 4, generator=generator)
    valid = torch.rand(3, 12, generator=generator) < 0.7
    clusters = torch.tensor([data.draw(st.integers(0, int(some.sum()))) for some in valid])
    # With one or two clusters the quirk leaves several points equally dense, so that rounding decides.
    quirks = not torch.isin(clusters, torch.tensor([1, 2])).any().item()
    centres, joined = cluster_frames(points, valid, clusters, reference_quirks=quirks)
    for frame in range(3):
        places = valid[frame].nonzero()[:, 0]
        expected, assigned = density_peaks(points[frame, places], int(clusters[frame]), reference_quirks=quirks)
        assert centres[frame].nonzero()[:, 0].tolist() == places[expected].tolist()
        if len(expected):
            assert joined[frame, places].tolist() == places[expected[assigned]].tolist()


def test_bad_numbers_are_refused():
    ones = torch.ones(1, dtype=torch.long)
    with pytest.raises(vtprune.VTPruneError, match="NaN"):
        merge_scenes(torch.full((1, 3, 2), torch.nan), torch.ones(1, 3), ones - 1, ones, ones)
