# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops.largest_remainder import share_out
from vtprune.ops.segmentation import segment_frames, temporal_similarity
from vtprune.ops.video_merging import CONTEXT, SALIENT, STATIC, merge_video


def clip(frames, positions, moving, seed=0, dim=6):
    """Scenes of a few frames in which most positions are still, and a saliency."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.arange(frames) // 4
    features = torch.randn(frames // 4 + 1, positions, dim, generator=generator)[scene]
    noise = torch.randn(frames, positions, dim, generator=generator)
    moves = torch.rand(frames, positions, 1, generator=generator) < moving
    return torch.where(moves, noise, features + 0.05 * noise), torch.rand(frames, positions, generator=generator)


clips = st.tuples(st.integers(1, 14), st.integers(1, 12), st.floats(0, 1), st.integers(0, 10_000))


@given(clips, st.floats(0, 1), st.floats(0, 1), st.booleans())
@settings(max_examples=120, deadline=None)
def test_counts_are_exact_and_every_token_is_accounted_for(drawn, ratio, context, quirks):
    features, saliency = clip(*drawn)
    before = features.clone()
    frames, positions = saliency.shape
    video = merge_video(features, saliency, ratio, context_share=context, reference_quirks=quirks)
    assert torch.equal(features, before)
    _, saved = segment_frames(temporal_similarity(features) > 0.8)
    if not quirks:
        assert video.keep.sum() == min(round(ratio * saliency.numel()), saliency.numel() - saved)
    kept = video.keep.flatten().nonzero()[:, 0]
    sources = video.sources.flatten()
    assert sources[kept].tolist() == kept.tolist()
    assert set(sources.tolist()) <= {-1, *kept.tolist()}
    assert torch.equal(video.features[~video.keep], features[~video.keep])
    assert torch.equal(video.features[video.part == SALIENT], features[video.part == SALIENT])
    assert video.features.isfinite().all()

    first = torch.zeros(frames, dtype=torch.bool)
    first[video.segments[:, 0]] = True
    assert not (video.part[~first] == STATIC).any()
    # Static tokens go to the first frame of their segment, all others stay in their frame.
    frame_of = torch.arange(frames).repeat_interleave(positions)
    went = sources >= 0
    segment_of = torch.arange(len(video.segments)).repeat_interleave(video.segments[:, 1] - video.segments[:, 0] + 1)
    assert (segment_of[frame_of[went]] == segment_of[frame_of[sources[went]]]).all()
    into_static = went & (video.part.flatten()[sources.clamp_min(0)] == STATIC)
    assert (frame_of[went & ~into_static] == frame_of[sources[went & ~into_static]]).all()


@given(clips, st.floats(0.05, 1))
@settings(max_examples=40, deadline=None)
def test_plain_means_are_means_of_all_that_went_into_a_token(drawn, ratio):
    features, saliency = clip(*drawn)
    video = merge_video(features, saliency, ratio, context_share=0.5, centre_weight=None)
    flat, sources = features.flatten(0, 1), video.sources.flatten()
    for index in video.keep.flatten().nonzero()[:, 0].tolist():
        expected = flat[sources == index].mean(0)
        torch.testing.assert_close(video.features.flatten(0, 1)[index], expected, atol=1e-5, rtol=1e-4)


def test_a_still_clip_is_one_picture():
    picture = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    features, saliency = picture.expand(20, 9, 6), torch.zeros(20, 9)
    video = merge_video(features, saliency, 1.0)
    assert video.keep[0].all() and not video.keep[1:].any()
    torch.testing.assert_close(video.features[0], picture)
    assert video.sources.tolist() == [list(range(9))] * 20
    assert merge_video(features, saliency, 4 / 180).keep.sum() == 4


def test_without_anything_still_each_frame_keeps_its_most_salient():
    features = torch.randn(6, 10, 16, generator=torch.Generator().manual_seed(0))
    saliency = torch.rand(6, 10, generator=torch.Generator().manual_seed(1))
    video = merge_video(features, saliency, 0.3)
    assert video.segments.tolist() == [[frame, frame] for frame in range(6)]
    for frame in range(6):
        assert sorted(saliency[frame].topk(3).indices.tolist()) == video.keep[frame].nonzero()[:, 0].tolist()


def test_context_takes_its_share_of_each_frame():
    features = torch.randn(5, 20, 16, generator=torch.Generator().manual_seed(0))
    video = merge_video(features, torch.rand(5, 20, generator=torch.Generator().manual_seed(1)), 0.5, context_share=0.4)
    assert (video.part == SALIENT).sum(1).tolist() == [6] * 5
    assert (video.part == CONTEXT).sum(1).tolist() == [4] * 5
    # Every token that is not kept went into a cluster of its frame.
    assert (video.sources >= 0).all()


@pytest.mark.parametrize("ratio, kept", [(0.0, 0), (1.0, 40)])
def test_edges(ratio, kept):
    features = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(0))
    video = merge_video(features, torch.ones(4, 10), ratio)
    assert video.keep.sum() == kept and (video.sources >= 0).sum() == kept


def test_low_precision_and_other_strides():
    features, saliency = clip(12, 9, 0.3)
    strided = features.mT.contiguous().mT
    for quirks in (False, True):
        video = merge_video(features, saliency, 0.3, context_share=0.5, reference_quirks=quirks)
        other = merge_video(strided, saliency, 0.3, context_share=0.5, reference_quirks=quirks)
        assert torch.equal(video.part, other.part)
        torch.testing.assert_close(video.features, other.features)
    assert merge_video(features.bfloat16(), saliency.bfloat16(), 0.3).features.dtype == torch.bfloat16


def test_what_is_not_finite_is_refused():
    features, saliency = clip(5, 4, 0.5)
    for bad in (torch.nan, torch.inf):
        broken = saliency.clone()
        broken[1, 1] = bad
        with pytest.raises(VTPruneError, match="saliency holds NaN or infinite"):
            merge_video(features, broken, 0.5)
        broken = features.clone()
        broken[4, 1, 0] = bad
        with pytest.raises(VTPruneError, match="features hold NaN or infinite"):
            merge_video(broken, saliency, 0.5)


@given(st.lists(st.integers(0, 300), max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_shares_are_exact_and_less_than_one_off(sizes, data):
    k = data.draw(st.integers(0, sum(sizes)))
    counts = share_out(torch.tensor(sizes, dtype=torch.long), k).tolist()
    assert sum(counts) == k
    for size, count in zip(sizes, counts, strict=True):
        assert 0 <= count <= size and abs(count - size * k / max(sum(sizes), 1)) < 1
