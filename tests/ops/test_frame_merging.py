# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.frame_merging import frame_similarity, merge_frames, similar_frames


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merge_similar_frames(features, metric, threshold=0.75, **options):
    return merge_frames(features, similar_frames(frame_similarity(metric), threshold, **options))


videos = given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from([0.5, 0.6, 0.75, 0.9]))


@videos
@settings(max_examples=80, deadline=None)
def test_every_frame_is_counted_once_and_resembles_what_it_went_into(seed, frames, threshold):
    features, metric = draw(frames, 5, 3, seed=seed), draw(frames, 4, seed=seed + 1)
    merged = merge_similar_frames(features, metric, threshold)
    places, sources = merged.places[0].tolist(), merged.sources[0].tolist()
    assert places[0] == 0 and places == sorted(set(sources))
    similarity = frame_similarity(metric)
    for frame, source in enumerate(sources):
        earlier = [place for place in places if place < frame]
        if source != frame:
            assert similarity[frame, source] > threshold
            assert source == max(earlier, key=lambda place, frame=frame: (similarity[frame, place].item(), -place))
        else:
            assert all(similarity[frame, place] <= threshold for place in earlier)
    for row, place in enumerate(places):
        torch.testing.assert_close(merged.features[0, row], features[merged.sources[0] == place].mean(0))


@videos
@settings(max_examples=80, deadline=None)
def test_agrees_with_the_reference_rule_where_that_loses_nothing(seed, frames, threshold):
    features, metric = draw(frames, 2, 3, seed=seed), draw(frames, 6, seed=seed + 1)
    reference = merge_similar_frames(features, metric, threshold, reference_quirks=True)
    ours = merge_similar_frames(features, metric, threshold)
    if (reference.sources >= 0).all():
        assert torch.equal(ours.sources, reference.sources) and torch.equal(ours.features, reference.features)
    else:
        assert ours.sizes.sum() == frames > reference.sizes.sum()


def test_a_still_picture_becomes_one_frame_and_a_slow_pan_several():
    picture = draw(1, 4, 3).expand(30, -1, -1)
    merged = merge_similar_frames(picture, picture.flatten(1))
    torch.testing.assert_close(merged.features[0], picture[:1])
    angles = torch.linspace(0, torch.pi, 30)
    metric = torch.stack((angles.cos(), angles.sin()), dim=1)
    pan = merge_similar_frames(metric[:, None], metric, 0.9)
    assert 2 < pan.places.shape[1] < 6
    assert merge_similar_frames(metric[:, None], metric, 0.9, reference_quirks=True).places.shape[1] == 1


def test_edges():
    assert merge_similar_frames(draw(1, 2, 3), draw(1, 4)).places.tolist() == [[0]]
    apart = merge_similar_frames(draw(6, 2, 3), draw(6, 4), threshold=1.0)
    assert apart.sources.tolist() == [list(range(6))] and torch.equal(apart.features[0], draw(6, 2, 3))
    black = merge_similar_frames(torch.zeros(3, 2, 3), torch.zeros(3, 4))
    assert black.features.isfinite().all()
    half = torch.full((40, 1, 2), 60000.0, dtype=torch.float16)
    merged = merge_similar_frames(half, torch.ones(40, 2))
    assert merged.features.dtype == torch.float16 and torch.equal(merged.features[0], half[:1])
