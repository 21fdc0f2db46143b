# SPDX-License-Identifier: Apache-2.0
"""Pooling over time, and of images of several crops; single grids are covered by the matrix."""

import pytest
import torch

import vtprune
from vtprune.ops.pooling import pool_grid
from vtprune.tokens import Grid, VisualTokens


def video(frames: int, grid: Grid, k: int, kind: str = "video") -> VisualTokens:
    n = frames * len(grid)
    generator = torch.Generator().manual_seed(0)
    return VisualTokens(
        features=torch.randn(1, n, 3, generator=generator),
        valid=torch.ones(1, n, dtype=torch.bool),
        budget=torch.tensor([k]),
        crops=torch.arange(frames).repeat_interleave(len(grid))[None],
        layouts=((grid,) * frames,),
        kinds=(kind,),
    )


def test_frames_are_averaged_then_their_grid_is():
    tokens = video(5, Grid(2, 3), k=7)
    selection = vtprune.Pool(keep_tokens=7, scope="image", frames=2).select(tokens)
    assert selection.keep.sum() == 7
    frames = tokens.features[0].unflatten(0, (5, 6))
    expected = []
    # windows of two, two and one frame, whose means stand in frames 0, 2 and 4; 7 tokens are spread as 2, 3, 2
    for window, middle, k in ((slice(0, 2), 0, 2), (slice(2, 4), 2, 3), (slice(4, 5), 4, 2)):
        keep, pooled, into = pool_grid(frames[window].mean(0), (2, 3), k)
        expected.append(pooled[keep])
        assert torch.equal(selection.keep[0].view(5, 6)[middle], keep)
        for frame in range(window.start, window.stop):
            assert torch.equal(selection.sources[0].view(5, 6)[frame], into + 6 * middle)
    torch.testing.assert_close(selection.features[selection.keep], torch.cat(expected))


def test_every_kept_token_is_the_mean_of_its_sources():
    tokens = video(4, Grid(3, 3, prefix=1), k=11)
    selection = vtprune.Pool(keep_tokens=11, scope="image", frames=4).select(tokens)
    assert selection.keep.sum() == 10  # a frame has no more: one CLS token and nine patches
    selection = vtprune.Pool(keep_tokens=7, scope="image", frames=4).select(video(4, Grid(3, 3, prefix=1), k=7))
    assert selection.keep.sum() == 7 and selection.keep[0, 10]  # in frame 1, the CLS token among them
    for place in selection.keep[0].nonzero()[:, 0].tolist():
        mean = tokens.features[0, selection.sources[0] == place].mean(0)
        torch.testing.assert_close(selection.features[0, place], mean)


def test_tiles_of_an_image_are_no_frames():
    tokens = video(4, Grid(2, 2), k=4, kind="image")
    selection = vtprune.Pool(keep_tokens=4, scope="image", frames=2).select(tokens)
    assert selection.keep.view(4, 4).sum(1).tolist() == [1] * 4


def test_a_single_frame_has_no_neighbours():
    with pytest.raises(vtprune.ConfigError, match="frames=2 needs scope='image'"):
        vtprune.Pool(keep_ratio=0.5, frames=2)
