# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops.frame_uniqueness import commonness, frame_shares, steady_channels


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


videos = given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 10_000))


def frames_of(sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def by_hand(features, frames):
    """Both scores of each token, in double precision."""
    features = features.double()
    variance = [float(((column - column.mean()) ** 2).mean()) for column in features.T]
    channels = sorted(range(len(variance)), key=lambda c: variance[c])[: max(len(variance) // 2, 1)]
    rows = [row[channels] / row[channels].norm() for row in features]
    scores = []
    for row, frame in zip(rows, frames, strict=True):
        own = [other for other, f in zip(rows, frames, strict=True) if f == frame]
        centres = [torch.stack(part).mean(0) for part in (rows, own)]
        squares = [float(((row - centre) ** 2).sum()) for centre in centres]
        scores.append([sum(math.exp(-s / (2 * w)) for w in (0.125, 0.25, 0.5, 1, 2)) for s in squares])
    return torch.tensor(scores).T


@videos
@settings(max_examples=60, deadline=None)
def test_nearness_to_the_means_of_video_and_frame(sizes, dim, seed):
    features, frames = draw(sum(sizes), dim, seed=seed) + 0.5, frames_of(sizes)
    torch.testing.assert_close(
        torch.stack(commonness(features, frames, len(sizes))), by_hand(features, frames), atol=1e-4, rtol=0
    )


@videos
@settings(max_examples=60, deadline=None)
def test_frames_that_differ_more_get_more_and_the_average_stays(sizes, dim, seed):
    common, frames = draw(sum(sizes), seed=seed).abs(), frames_of(sizes)
    shares = frame_shares(common, frames, len(sizes))
    assert shares.mean().item() == pytest.approx(1, abs=1e-5) and (shares >= -1e-6).all()
    means = torch.stack([common[frames == frame].mean() for frame in range(len(sizes))])
    assert (shares[means.argsort()].diff() <= 1e-6).all()


def test_frames_need_not_stand_together():
    features, frames = draw(12, 6), torch.tensor([0, 1, 2] * 4)
    mixed = torch.stack(commonness(features, frames, 3))
    order = frames.argsort(stable=True)
    torch.testing.assert_close(mixed[:, order], torch.stack(commonness(features[order], frames[order], 3)))


def test_edges():
    assert steady_channels(torch.tensor([[0.0, 1.0, 5.0, 2.0], [9.0, 2.0, 5.0, 1.0]])).tolist() == [1, 2]
    assert steady_channels(draw(3, 1)).tolist() == [0]
    same = commonness(torch.ones(6, 4), frames_of([3, 3]), 2)
    torch.testing.assert_close(torch.stack(same), torch.full((2, 6), 5.0))
    black = commonness(torch.zeros(4, 4), frames_of([4]), 1)
    assert torch.stack(black).isfinite().all()
    with pytest.raises(VTPruneError, match="NaN"):
        commonness(draw(4, 4).index_fill(1, torch.tensor([2]), float("nan")), frames_of([2, 2]), 2)
