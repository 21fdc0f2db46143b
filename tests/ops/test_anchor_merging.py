# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vtprune import VTPruneError
from vtprune.ops.anchor_merging import merge_into_anchors, salient_and_anchors


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def videos(draw_from):
    sizes = draw_from(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    cuts = draw_from(st.lists(st.booleans(), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    k = draw_from(st.integers(0, sum(sizes)))
    return torch.tensor(sizes), torch.tensor([0, *cuts]).long().cumsum(0), k


@given(videos(), st.sampled_from([0.0, 0.25, 0.4, 1.0]), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_counts_meet_the_budget_and_fit(video, share, period):
    sizes, scene_of, k = video
    salient, anchors = salient_and_anchors(sizes, scene_of, k, context_share=share, period=period)
    assert int(salient.sum() + anchors.sum()) == k
    assert (salient >= 0).all() and (anchors >= 0).all() and (salient + anchors <= sizes).all()
    assert (salient >= (1 - share) * (k / sizes.sum() * sizes - 1) - 1e-9).all()
    ends = torch.cat((scene_of.diff() > 0, torch.tensor([True])))
    distance, holds = 0, []
    for end in reversed(ends.tolist()):
        distance = 0 if end else distance + 1
        holds.insert(0, distance % period == 0)
    holds = torch.tensor(holds)
    room = sizes - salient - anchors
    # Frames without anchors get some only when the frames with anchors are full.
    assert not anchors[~holds].any() or not room[holds].any()


@pytest.mark.parametrize("length", [1, 4, 5, 9])
def test_published_counts_of_a_long_enough_video(length):
    """196 tokens a frame at 10 %: 12 salient tokens in each frame. 7 tokens a frame go to the frames with anchors."""
    sizes = torch.full((2 * length,), 196)
    scene_of = torch.arange(2).repeat_interleave(length)
    salient, anchors = salient_and_anchors(sizes, scene_of, 19 * 2 * length)
    assert salient.tolist() == [12] * (2 * length)
    with_anchors = math.ceil(length / 4)
    expected = [7 * length / with_anchors if (length - 1 - frame) % 4 == 0 else 0 for frame in range(length)] * 2
    assert all(abs(count - e) < 1 for count, e in zip(anchors.tolist(), expected, strict=True))


def by_hand(features, saliency, frames, scene_of, salient, anchors, weight, neighbours):
    """Kept tokens with their features, and for each token the anchors that it went into, one a frame."""
    features, total = features.double(), len(features)
    left, kept, chosen = set(range(total)), {}, {}
    for frame in range(len(scene_of)):
        own = [token for token in range(total) if frames[token] == frame]
        best = sorted(own, key=lambda token: (-saliency[token].item(), token))[: int(salient[frame])]
        left -= set(best)
        kept |= {token: features[token] for token in best}
        rest = [token for token in own if token in left]
        count = int(anchors[frame])
        if not count:
            continue
        points = features[rest]
        distances = torch.cdist(points, points) / points.shape[1] ** 0.5
        density = (-(distances.sort(1).values[:, :neighbours] ** 2).mean(1)).exp()
        score = []
        for row in range(len(rest)):
            denser = [distances[row, other].item() for other in range(len(rest)) if density[other] > density[row]]
            score.append(density[row].item() * min(denser, default=distances.max().item()))
        order = sorted(range(len(rest)), key=lambda row: -score[row])[:count]
        chosen[frame] = sorted(rest[row] for row in order)
    went = {token: {} for token in left}
    for frame, centres in chosen.items():
        for token in left:
            if scene_of[frames[token]] == scene_of[frame]:
                alike = cosine_similarity(features[token], features[centres], dim=1)
                went[token][frame] = token if token in centres else centres[int(alike.argmax())]
        for centre in centres:
            members = [token for token in left if went[token].get(frame) == centre]
            mean = features[members].mean(0)
            w = 0.0 if weight is None else max(weight, 1 / (len(members) + 1))
            kept[centre] = w * features[centre] + (1 - w) * mean
    return kept, went


@given(videos(), st.sampled_from([0.4, 1.0]), st.integers(1, 3), st.sampled_from([None, 0.1, 0.6]), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_equals_the_description(video, share, period, weight, seed):
    sizes, scene_of, k = video
    features, saliency = draw(int(sizes.sum()), 6, seed=seed), draw(int(sizes.sum()), seed=seed + 1)
    frames = torch.arange(len(sizes)).repeat_interleave(sizes)
    frames = frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))]
    counts = salient_and_anchors(sizes, scene_of, k, context_share=share, period=period)
    options = dict(context_share=share, period=period, neighbours=4, anchor_weight=weight)
    keep, merged, sources = merge_into_anchors(features, saliency, frames, scene_of, k, **options)
    kept, went = by_hand(features, saliency, frames, scene_of, *counts, weight, 4)
    assert keep.nonzero()[:, 0].tolist() == sorted(kept)
    for token, value in kept.items():
        torch.testing.assert_close(merged[token].double(), value, atol=1e-5, rtol=1e-4)
    for token, source in enumerate(sources.tolist()):
        if token in kept:
            assert source == token
        elif not went[token]:
            assert source == -1
        else:
            anchors = list(went[token].values())
            alike = cosine_similarity(features[token], features[anchors], dim=1)
            assert source == anchors[int(alike.argmax())]


def test_equal_tokens_stay_apart_and_half_precision_holds():
    half = torch.full((40, 2), 60000.0, dtype=torch.float16)
    frames, scene_of = torch.arange(4).repeat_interleave(10), torch.zeros(4, dtype=torch.long)
    keep, merged, sources = merge_into_anchors(half, torch.zeros(40), frames, scene_of, 20)
    assert int(keep.sum()) == 20 and torch.equal(merged, half)
    assert (sources >= 0).all() and torch.equal(sources[keep], keep.nonzero()[:, 0])


def test_what_is_no_number_is_refused():
    frames, scene_of = torch.zeros(4, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    with pytest.raises(VTPruneError, match="saliency holds NaN"):
        merge_into_anchors(draw(4, 3), torch.full((4,), float("nan")), frames, scene_of, 2)
