# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which frames keep more, exact budgets, frames that are not whole."""

import pytest
import torch

import vtprune
from vtprune.ops.frame_uniqueness import commonness
from vtprune.testing import families
from vtprune.tokens import VisualTokens

FRAMES, SIZE = 6, 20


def video(k: int, seed: int = 0) -> VisualTokens:
    """Frames of one scene, except the fourth, which shows something else; and an image of 50 tokens."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, 32, generator=generator)
    features = scenes[0] + 0.5 * torch.randn(2, FRAMES * SIZE, 32, generator=generator)
    features[0, 3 * SIZE : 4 * SIZE] += 2 * (scenes[1] - scenes[0])
    crops = torch.arange(FRAMES).repeat_interleave(SIZE).repeat(2, 1)
    valid = torch.ones_like(crops, dtype=torch.bool)
    valid[1, 50:] = False
    crops[1] = torch.where(valid[1], 0, -1)
    return VisualTokens(
        features=features * valid[..., None], valid=valid, budget=torch.tensor([k, min(k, 50)]), crops=crops
    )


@pytest.mark.parametrize("k", [0, 1, 7, 30, 60, 100, 120])
def test_the_frame_that_differs_keeps_most_and_of_each_the_least_common(k):
    tokens = video(k)
    selection = vtprune.VidCom2(keep_tokens=k).select(tokens)
    assert selection.keep.sum(1).tolist() == [k, min(k, 50)] and not selection.keep[1, 50:].any()
    counts = selection.keep[0].view(FRAMES, SIZE).sum(1)
    if k >= FRAMES:
        assert counts[3] == min(counts.max(), SIZE) and (counts > 0).all()
        assert k > 60 or counts[3] > counts.sum() / FRAMES
    scores = sum(commonness(tokens.features[0], tokens.crops[0], FRAMES)).view(FRAMES, SIZE)
    for frame, count in enumerate(counts.tolist()):
        lowest = scores[frame].argsort()[:count].sort().values
        assert torch.equal(selection.keep[0].view(FRAMES, SIZE)[frame].nonzero()[:, 0], lowest)


def test_an_image_keeps_what_is_least_like_its_mean():
    tokens = video(10)
    (to_video, to_frame) = commonness(tokens.features[1, :50], tokens.crops[1, :50], 1)
    torch.testing.assert_close(to_video, to_frame)
    keep = vtprune.VidCom2(keep_tokens=10).select(tokens).keep[1]
    assert torch.equal(keep.nonzero()[:, 0], to_video.argsort()[:10].sort().values)


def test_frames_may_have_lost_tokens_before():
    tokens = video(20)
    tokens.crops[0, : 2 * SIZE] = 5  # two frames are gone, and one is larger
    keep = vtprune.VidCom2(keep_tokens=20).select(tokens).keep
    assert keep.sum(1).tolist() == [20, 20]


@torch.no_grad()
def test_a_video_has_one_budget_for_its_frames():
    name = "llava_onevision"
    model = families.shared(name)
    inputs = families.batch(name, model, media="video").singles[0]
    with vtprune.prune(model, "vidcom2", keep_ratio=0.5) as session:
        model(**inputs)
    report, frames = session.report, inputs["pixel_values_videos"].shape[1]
    content = report.original_tokens[0] - 1  # the last one is a newline
    kept = report.kept(0, 0) - int(report.visual[0][0])
    assert len(kept) == round(content / 2) + 1
    counts = (kept[:-1] // (content // frames)).bincount(minlength=frames)
    assert counts.max() > counts.min()
