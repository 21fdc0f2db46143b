# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: frames that merge, and both merges one after the other."""

import pytest
import torch

import vtprune
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.frame_merging import frame_similarity, merge_frames, similar_frames
from vtprune.tokens import Grid, VisualTokens

GRID = Grid(2, 3)


def clip(scenes: list[int], k: int, kind: str = "video", noise: float = 0.1) -> VisualTokens:
    """Frames of six tokens. Frames of one scene are very similar, frames of different scenes are opposite."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8) - torch.full((8, 8), 0.5)
    frames = centres[scenes][:, None] + noise * torch.randn(len(scenes), len(GRID), 8, generator=generator)
    n = len(scenes) * len(GRID)
    return VisualTokens(
        features=frames.reshape(1, n, 8),
        valid=torch.ones(1, n, dtype=torch.bool),
        budget=torch.tensor([k]),
        crops=torch.arange(len(scenes)).repeat_interleave(len(GRID))[None],
        layouts=((GRID,) * len(scenes),),
        kinds=(kind,),
    )


def test_frames_of_a_scene_become_one():
    tokens = clip([0, 1, 0, 1, 1], k=12)
    selection = vtprune.BVLLMMerge(keep_tokens=12, threshold=0.95).select(tokens)
    assert selection.keep.view(5, 6).sum(1).tolist() == [6, 6, 0, 0, 0]
    frames = tokens.features[0].view(5, 6, 8)
    expected = torch.stack([frames[[0, 2]].mean(0), frames[[1, 3, 4]].mean(0)])
    torch.testing.assert_close(selection.features[0].view(5, 6, 8)[:2], expected)
    assert selection.sources[0].view(5, 6)[3].tolist() == [*range(6, 12)]


def test_tokens_of_the_frames_left_merge():
    tokens = clip([0, 0, 1], k=7)
    selection = vtprune.BVLLMMerge(keep_tokens=7, threshold=0.95).select(tokens)
    frames = tokens.features[0].view(3, 6, 8)
    for place, frame, k in ((0, frames[:2].mean(0), 4), (2, frames[2], 3)):
        merged = bipartite_merging(frame[None], k)
        here = selection.keep[0].view(3, 6)[place]
        assert here.nonzero()[:, 0].tolist() == merged.places[0].sort().values.tolist()
        values = selection.features[0].view(3, 6, 8)[place][merged.places[0]]
        torch.testing.assert_close(values, merged.features[0])
    # a token of a merged frame goes into the token that its counterpart in the remaining frame goes into
    sources = selection.sources[0].view(3, 6)
    assert sources[0].tolist() == sources[1].tolist()
    assert selection.keep[0][selection.sources[0]].all()


@pytest.mark.parametrize(("k", "sizes"), [(12, [6, 6]), (7, [4, 3])])
def test_the_reference_loses_frames_that_went_into_a_merged_one(k, sizes):
    """The third frame is most similar to the second, which goes into the first."""
    angles = torch.tensor([0.0, 0.3, 0.6, 3.0])
    places = torch.stack((angles.cos(), angles.sin()), dim=1)
    noise = 0.05 * torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    frames = torch.cat((places, torch.zeros(4, 6)), dim=1)[:, None] + noise
    tokens = VisualTokens(**vars(clip([0] * 4, k)) | {"features": frames.view(1, 24, 8)})
    quirky = vtprune.BVLLMMerge(threshold=0.95, reference_quirks=True).select(tokens)
    assert quirky.keep[0].view(4, 6).sum(1).tolist() == [sizes[0], 0, 0, sizes[1]]
    metric = frames.mean(1)
    merged = merge_frames(frames, similar_frames(frame_similarity(metric), 0.95, reference_quirks=True))
    assert merged.sources.tolist() == [[0, 0, -1, 3]]
    within = bipartite_merging(merged.features[0], torch.tensor(sizes), reference_quirks=True)
    for frame, features, places in zip((0, 3), within.features, within.places, strict=True):
        rows = places[places >= 0]
        torch.testing.assert_close(quirky.features[0].view(4, 6, 8)[frame, rows], features[: len(rows)])
    sources = quirky.sources[0].view(4, 6)
    assert (sources[2] == -1).all() and (sources[[0, 1, 3]] >= 0).all() and torch.equal(sources[0], sources[1])
    sane = vtprune.BVLLMMerge(threshold=0.95).select(tokens)
    assert (sane.sources >= 0).all()


@pytest.mark.parametrize("k", range(1, 31))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_budget_is_met_however_alike_frames_are(k, noise):
    """Frames are not merged if the remaining ones would be too few for the budget."""
    selection = vtprune.BVLLMMerge(keep_tokens=k).select(clip([0, 0, 1, 0, 2], k, noise=noise))
    # equal frames have equal similarities: all of them merge, or none
    assert int(selection.keep.sum()) == k


def test_tiles_of_an_image_are_no_frames():
    tokens = clip([0, 0, 0], k=9, kind="image")
    selection = vtprune.BVLLMMerge(keep_tokens=9).select(tokens)
    assert selection.keep.view(3, 6).sum(1).tolist() == [3, 3, 3]


def test_a_video_that_lost_tokens_before_is_refused():
    tokens = clip([0, 0], k=3)
    broken = VisualTokens(**vars(tokens) | {"layouts": ((GRID, None),)})
    with pytest.raises(vtprune.UnsupportedStageError, match="whole frames"):
        vtprune.BVLLMMerge(keep_tokens=3).select(broken)
