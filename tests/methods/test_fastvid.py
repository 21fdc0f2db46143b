# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: weighted anchors, several frames with anchors, images, scenes by a model."""

import pytest
import torch

import vtprune
from vtprune.ops.anchor_merging import merge_into_anchors
from vtprune.ops.scene_cuts import scenes
from vtprune.signals import EncoderSaliency
from vtprune.testing import families
from vtprune.tokens import ModelShape, VisualTokens

SHAPE = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=2, has_cls=True)
NO_CLS = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=2, has_cls=False)
FRAMES, SIZE = 9, 16


def groups(k: int, shape: ModelShape = SHAPE) -> VisualTokens:
    """A video of two scenes, the second from frame 3 on; and an image of two tiles whose tokens alternate."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 24, generator=generator).repeat_interleave(torch.tensor([3, 6]), 0)
    features = features.repeat_interleave(SIZE, 0) + 0.6 * torch.randn(2, FRAMES * SIZE, 24, generator=generator)
    crops = torch.arange(FRAMES).repeat_interleave(SIZE).repeat(2, 1)
    crops[1] = torch.arange(FRAMES * SIZE) // 4 % 2
    valid = torch.ones_like(crops, dtype=torch.bool)
    valid[1, 64:] = False
    crops[~valid] = -1
    return VisualTokens(
        features=features * valid[..., None],
        valid=valid,
        budget=torch.tensor([k, min(k, 64)]),
        signals={EncoderSaliency(2): torch.rand(2, FRAMES * SIZE, generator=generator)},
        crops=crops,
        kinds=("video", "image"),
        shape=shape,
    )


@pytest.mark.parametrize("shape", [SHAPE, NO_CLS], ids=["cls", "no cls"])
@pytest.mark.parametrize("k", [0, 1, 9, 40, 90, 144])
def test_videos_by_scenes_and_images_by_tiles(k, shape):
    tokens = groups(k, shape)
    selection = vtprune.FastVID(keep_tokens=k, min_scenes=2).select(tokens)
    assert selection.keep.sum(1).tolist() == [k, min(k, 64)]
    saliency = tokens[EncoderSaliency(2)]
    for group, (length, scene_of) in enumerate(((144, [0] * 3 + [1] * 6), (64, [0, 1]))):
        expected = merge_into_anchors(
            tokens.features[group, :length],
            saliency[group, :length],
            tokens.crops[group, :length],
            torch.tensor(scene_of),
            min(k, length),
        )
        for part, other in zip((selection.keep, selection.features, selection.sources), expected, strict=True):
            torch.testing.assert_close(part[group, :length], other)
        assert not selection.keep[group, length:].any() and (selection.sources[group, length:] == -1).all()


def test_tokens_go_into_anchors_of_their_scene_only():
    tokens = groups(40)
    selection = vtprune.FastVID(keep_tokens=40, min_scenes=2).select(tokens)
    frames = tokens.crops[0]
    assert (selection.sources[0] >= 0).all()
    assert torch.equal(frames[selection.sources[0]] < 3, frames < 3)
    counts = selection.keep[0].view(FRAMES, SIZE).sum(1)
    assert (counts[[2, 4, 8]] > counts[[0, 1, 3, 5, 6, 7]].max()).all()  # the last of a scene, and four before it


def test_each_frame_a_scene_of_its_own():
    tokens = groups(40)
    by_count = vtprune.FastVID(keep_tokens=40, min_scenes=FRAMES, threshold=-1).select(tokens)
    by_threshold = vtprune.FastVID(keep_tokens=40, min_scenes=1, threshold=1).select(tokens)
    assert torch.equal(by_count.keep, by_threshold.keep) and torch.equal(by_count.features, by_threshold.features)
    assert torch.equal(tokens.crops[0][by_count.sources[0]], tokens.crops[0])


@torch.no_grad()
def test_scenes_and_saliency_of_a_model():
    """The tokens that enter the LLM are the result of the operations on the model's features and attention."""
    name = "llava_onevision"
    model = families.shared(name)
    inputs = families.batch(name, model, media="video").singles[0]
    seen = {}

    class Spy(vtprune.FastVID):
        name = "spy"

        def select(self, tokens):
            seen["features"], seen["budget"] = tokens.features[0], int(tokens.budget)
            seen["saliency"] = tokens[EncoderSaliency(tokens.shape.feature_layer)][0]
            return super().select(tokens)

    entering = []
    with vtprune.prune(model, Spy(keep_ratio=0.4, min_scenes=2)) as session:
        watch = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        model(**inputs)
        watch.remove()
    count = inputs["pixel_values_videos"].shape[1]
    frames = torch.arange(count).repeat_interleave(len(seen["features"]) // count)
    scene_of = scenes(seen["features"].unflatten(0, (count, -1)).mean(1), 2)
    keep, merged, _ = merge_into_anchors(seen["features"], seen["saliency"], frames, scene_of, seen["budget"])
    first = int(session.report.visual[0][0])
    assert (session.report.kept(0, 0)[:-1] - first).tolist() == keep.nonzero()[:, 0].tolist()  # then comes the newline
    torch.testing.assert_close(entering[0][0, first : first + int(keep.sum())], merged[keep])
