# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vtprune.ops.frame_pooling import frame_means, pool_frames


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "mode, grid, pooled", [("bilinear", (27, 27), 196), ("average", (27, 27), 169), ("max", (4, 7), 6)]
)
def test_sizes(mode, grid, pooled):
    assert pool_frames(draw(2, grid[0] * grid[1], 3), grid, mode).shape == (2, pooled, 3)


def test_cells_of_an_even_grid_are_two_by_two():
    values = draw(3, 24, 5)
    cells = values.view(3, 2, 2, 3, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(3, 6, 4, 5)
    for mode in ("average", "bilinear"):
        torch.testing.assert_close(pool_frames(values, (4, 6), mode), cells.mean(2))
    torch.testing.assert_close(pool_frames(values, (4, 6), "max"), cells.amax(2))


@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_scores_go_through_what_features_go_through(mode):
    features = draw(2, 35, 4)
    pooled = pool_frames(features, (5, 7), mode)
    for channel in range(4):
        alone = pool_frames(features[..., channel : channel + 1], (5, 7), mode)
        torch.testing.assert_close(alone[..., 0], pooled[..., channel])
    assert pool_frames(features.bfloat16(), (5, 7), mode).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_of_frames_that_take_turns_and_differ_in_size(dtype):
    features, frames = draw(9, 4).to(dtype), torch.tensor([0, 2, 1, 0, 2, 1, 0, 2, 0])
    expected = torch.stack([features[frames == frame].float().mean(0) for frame in range(3)])
    means = frame_means(features, frames)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, expected)
