# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: the grids that progressive_pooling and adaptive_pool make."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

import vtprune
from vtprune.tokens import Grid, VisualTokens


def tokens_of(grids: list[Grid], k: int, kind: str) -> VisualTokens:
    sizes = torch.tensor([len(grid) for grid in grids])
    n = int(sizes.sum())
    return VisualTokens(
        features=torch.randn(1, n, 3, generator=torch.Generator().manual_seed(0)),
        valid=torch.ones(1, n, dtype=torch.bool),
        budget=torch.tensor([k]),
        crops=torch.arange(len(grids)).repeat_interleave(sizes)[None],
        layouts=(tuple(grids),),
        kinds=(kind,),
    )


def left(selection) -> torch.Tensor:
    return selection.features[selection.keep]


def test_the_first_frame_of_a_group_is_finer():
    tokens = tokens_of([Grid(4, 4)] * 6, k=40, kind="video")
    selection = vtprune.ProgressivePooling(keep_tokens=40, frames=3).select(tokens)
    assert selection.keep.view(6, 16).sum(1).tolist() == [14, 3, 3, 14, 3, 3]
    exact = vtprune.ProgressivePooling(keep_tokens=60, frames=2).select(tokens_of([Grid(4, 4)] * 6, 60, "video"))
    # 16 and 4 each: the whole grid, and cells of 2 x 2
    frames = tokens.features[0].view(6, 4, 4, 3)
    expected = [
        part
        for lead, other in frames.unflatten(0, (3, 2))
        for part in (lead.flatten(0, 1), avg_pool2d(other.permute(2, 0, 1), 2).flatten(1).T)
    ]
    torch.testing.assert_close(left(exact), torch.cat(expected))


def test_tiles_of_an_image_are_pooled_evenly():
    tokens = tokens_of([Grid(4, 4), Grid(2, 4), Grid(4, 4)], k=20, kind="image")
    selection = vtprune.ProgressivePooling(keep_tokens=20).select(tokens)
    assert [int(part.sum()) for part in selection.keep[0].split([16, 8, 16])] == [8, 4, 8]


@pytest.mark.parametrize(("grid", "k", "cells"), [((7, 7), 16, (4, 4)), ((5, 10), 18, (3, 6)), ((8, 4), 6, (3, 2))])
def test_counts_that_make_a_grid_are_pooled_adaptively(grid, k, cells):
    tokens = tokens_of([Grid(*grid)], k, "image")
    expected = adaptive_avg_pool2d(tokens.features[0].T.unflatten(1, grid), cells).flatten(1).T
    torch.testing.assert_close(left(vtprune.AdaptivePool(keep_tokens=k).select(tokens)), expected)


def test_without_overlap_a_token_counts_once():
    tokens = tokens_of([Grid(5, 7)], 6, "image")
    selection = vtprune.AdaptivePool(keep_tokens=6, overlap=False).select(tokens)
    for place in selection.keep[0].nonzero()[:, 0].tolist():
        mean = tokens.features[0, selection.sources[0] == place].mean(0)
        torch.testing.assert_close(selection.features[0, place], mean)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("method", [vtprune.AdaptivePool, vtprune.ProgressivePooling, vtprune.Pool])
def test_every_count_is_met(method, prefix):
    for k in range(51):
        tokens = tokens_of([Grid(3, 8, prefix=prefix)] * 2, k, "image")
        selection = method(keep_tokens=k, scope="image").select(tokens)
        assert int(selection.keep.sum()) == min(k, 2 * (24 + prefix))
        into = selection.sources[selection.sources >= 0]
        assert selection.keep[0, into].all()


@pytest.mark.parametrize("name", ["adaptive_pool", "progressive_pooling"])
def test_images_that_lost_tokens_before_are_refused(name):
    broken = VisualTokens(**vars(tokens_of([Grid(2, 2)], 2, "image")) | {"layouts": ((None,),)})
    with pytest.raises(vtprune.UnsupportedStageError, match=f"{name} needs whole images"):
        vtprune.build_method(name, keep_tokens=2).select(broken)
