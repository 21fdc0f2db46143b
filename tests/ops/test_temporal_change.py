# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.ops.temporal_change import changed, compared_in_fours, counts_in_fours, most_changed


def video(frames: int, positions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(frames, positions, 5, generator=torch.Generator().manual_seed(seed))


def test_what_moves_has_changed():
    features = video(1, 6).repeat(4, 1, 1)
    features[2, 3] = -features[2, 3]
    marked = changed(features, 0.5)
    assert marked[0].all() and not marked[1].any()
    # It moves in frame 2, and back in frame 3.
    assert marked[2].nonzero().tolist() == [[3]] and marked[3].nonzero().tolist() == [[3]]
    assert not changed(features, -1.0)[1].any()


@given(frames=st.integers(1, 9), positions=st.integers(1, 12), data=st.data())
def test_budgets_are_met(frames, positions, data):
    k = data.draw(st.integers(0, frames * positions))
    features = video(frames, positions)
    keep = most_changed(features, k)
    assert int(keep.sum()) == k and int(keep[0].sum()) == min(k, positions)
    later = keep[1:].sum(1)
    assert frames == 1 or int(later.max() - later.min()) <= 1
    counts = counts_in_fours(frames, positions, k)
    assert compared_in_fours(features, counts).sum(1).tolist() == counts.tolist() and int(counts.sum()) == k


@pytest.mark.parametrize("frame", [1, 2, 3, 5, 6, 7, 9])
def test_frames_are_compared_with_the_right_one(frame):
    """All tokens are alike but one of a frame, and one of the frame that it is compared with."""
    features = torch.ones(10, 8, 3)
    base = frame - 2 if frame % 4 == 2 else frame - 1
    other = next(number for number in range(10) if number not in (base, frame))
    features[frame, 5], features[base, 6], features[other, 7] = (-torch.ones(3) for _ in range(3))
    keep = compared_in_fours(features, torch.full((10,), 2))
    assert keep[frame].nonzero()[:, 0].tolist() == [5, 6]
