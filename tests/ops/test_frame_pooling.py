# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune.ops.frame_pooling import frame_means


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_of_frames_that_take_turns_and_differ_in_size(dtype):
    features, frames = draw(9, 4).to(dtype), torch.tensor([0, 2, 1, 0, 2, 1, 0, 2, 0])
    expected = torch.stack([features[frames == frame].float().mean(0) for frame in range(3)])
    means = frame_means(features, frames, 3)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, expected)
