# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.tokens import VisualTokens


def kept(crops: list[int], k: int) -> list[int]:
    crops = torch.tensor([crops])
    tokens = VisualTokens(
        features=torch.zeros(1, crops.shape[1], 2),
        valid=torch.ones_like(crops, dtype=torch.bool),
        budget=torch.tensor([k]),
        crops=crops,
    )
    return vtprune.UniformFrames(keep_tokens=k).select(tokens).keep[0].nonzero()[:, 0].tolist()


SIX_FRAMES_OF_FOUR = [frame for frame in range(6) for _ in range(4)]


def test_whole_frames_at_an_even_stride():
    assert kept(SIX_FRAMES_OF_FOUR, 8) == [*range(4, 8), *range(16, 20)]  # frames 1 and 4


def test_what_is_left_goes_into_the_last_frame():
    assert kept(SIX_FRAMES_OF_FOUR, 6) == [*range(4, 8), 17, 19]
    assert kept(SIX_FRAMES_OF_FOUR, 1) == [14]  # the middle of frame 3


@pytest.mark.parametrize("k", range(0, 20))
def test_the_budget_is_met_on_crops_of_any_size(k):
    crops = [0] * 3 + [1] * 7 + [2] * 1 + [3] * 8
    assert len(set(kept(crops, k))) == k


def test_a_single_crop_is_strided_like_uniform():
    assert kept([0] * 10, 5) == [1, 3, 5, 7, 9]
