# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops.scene_cuts import scenes


@given(st.integers(1, 14), st.integers(1, 16), st.floats(-1, 1), st.integers(0, 10_000))
@settings(max_examples=120, deadline=None)
def test_a_scene_ends_below_the_threshold_and_at_the_greatest_changes(count, least, threshold, seed):
    frames = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    frames[count // 2 :] = frames[count // 2 :][:1]  # the end stands still
    likeness = torch.cosine_similarity(frames[:-1], frames[1:], dim=1).tolist()
    smallest = sorted(range(count - 1), key=lambda frame: (round(likeness[frame], 5), frame))[: least - 1]
    expected = [0]
    for frame, value in enumerate(likeness):
        expected.append(expected[-1] + (value < threshold - 1e-6 or frame in smallest))
    found = scenes(frames, least, threshold).tolist()
    if all(abs(value - threshold) > 1e-5 for value in likeness) and min(likeness, default=0) < 0.999:
        still = sum(value > 0.999 for value in likeness)
        if least - 1 <= count - 1 - still:  # otherwise rounding decides between equal cosines
            assert found == expected
    assert found[-1] + 1 >= min(least, count) and found == sorted(found)
    assert set(found) == set(range(found[-1] + 1))


def test_a_still_video_is_cut_at_its_beginning_if_it_has_to_be():
    still = torch.ones(6, 4)
    assert scenes(still, 1).tolist() == [0] * 6
    assert scenes(still, 3).tolist() == [0, 1, 2, 2, 2, 2]
    assert scenes(still, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert scenes(still[:1], 8).tolist() == [0]


def test_black_frames_and_what_is_no_number():
    assert scenes(torch.zeros(3, 4), 1, 0.0).tolist() == [0, 0, 0]
    assert scenes(torch.zeros(3, 4), 1, 0.1).tolist() == [0, 1, 2]
    with pytest.raises(VTPruneError, match="NaN"):
        scenes(torch.full((3, 4), float("nan")))
