# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: weighted centres, the merge inside the LLM, budgets of both stages."""

import pytest
import torch

import vtprune
from vtprune.ops.video_merging import merge_video
from vtprune.signals import AttentionReceived
from vtprune.testing import families
from vtprune.tokens import ModelShape

NAME = "llava_onevision"
SHAPE = ModelShape(encoder_layers=26, decoder_layers=28, feature_layer=25, has_cls=False)


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6, 0.9])
def test_both_stages_together_meet_the_ratio(ratio, share):
    method = vtprune.HoliTom(keep_ratio=ratio, inner_share=share)
    entering, left = method.shares(SHAPE)
    assert (18 * entering + 10 * entering * left) / 28 == pytest.approx(ratio)
    assert entering <= 1 and (left == share or entering == 1)


def test_published_layer_is_rescaled_and_checked():
    assert vtprune.HoliTom(keep_ratio=0.1).inner_layer(SHAPE) == 18
    shallow = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=3, has_cls=False)
    assert vtprune.HoliTom(keep_ratio=0.1).inner_layer(shallow) == 5
    with pytest.raises(vtprune.ConfigError, match="layer=8 must be within 1..7"):
        vtprune.HoliTom(keep_ratio=0.1, layer=8).check_budget(shallow)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.8])
def test_the_measured_average_is_the_ratio(ratio):
    model = families.shared(NAME)
    batch = families.batch(NAME, model, media="video")
    with vtprune.prune(model, "holitom", keep_ratio=ratio) as session:
        model(**batch.inputs)
    report = session.report
    newlines = torch.tensor([len(s["pixel_values_videos"]) for s in batch.singles])[:, None]
    content = torch.tensor(report.original_tokens)[:, None] - newlines
    measured = (report.counts - newlines).float().mean(1) / content[:, 0]
    # each count is rounded once, and a video has 24 tokens
    assert (measured - ratio).abs().max() < 0.05


@torch.no_grad()
def test_videos_are_merged_by_saliency_of_the_encoder():
    """The tokens that enter the LLM are the result of the operation on the model's features and attention."""
    model = families.shared(NAME)
    inputs = families.batch(NAME, model, media="video").singles[0]
    seen = {}

    class Spy(vtprune.HoliTom):
        name = "spy"

        def parts(self, shape):
            (part,) = super().parts(shape)
            select = type(part).select

            class Watched(type(part)):
                def select(self, tokens):
                    seen["saliency"] = tokens[AttentionReceived(shape.feature_layer)]
                    seen["features"], seen["budget"] = tokens.features, tokens.budget
                    seen["selection"] = select(self, tokens)
                    return seen["selection"]

            object.__setattr__(part, "__class__", Watched)
            return (part,)

    entering = []
    layer = model.get_decoder().layers[0]
    with vtprune.prune(model, Spy(keep_ratio=0.3, inner_share=1.0)) as session:
        watch = layer.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        model(**inputs)
        watch.remove()
    frames = inputs["pixel_values_videos"].shape[1]
    features, saliency = seen["features"][0].unflatten(0, (frames, -1)), seen["saliency"][0].view(frames, -1)
    expected = merge_video(features, saliency, int(seen["budget"]) / saliency.numel())
    assert torch.equal(seen["selection"].keep[0], expected.keep.flatten())
    first, count = int(session.report.visual[0][0]), int(expected.keep.sum())
    rows = entering[0][0, first : first + count]  # then comes the newline
    torch.testing.assert_close(rows, expected.features.flatten(0, 1)[expected.keep.flatten()])


@torch.no_grad()
def test_inside_the_llm_kept_tokens_absorb_dropped_ones():
    """The hidden states at the layer's input are running means of the tokens that went into each, in order."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[1]
    depth, layer = 8, 5
    states = {}
    decoder = model.get_decoder()
    with vtprune.prune(model, "holitom", keep_ratio=0.5) as session:
        watches = [
            decoder.layers[layer - 1].register_forward_hook(lambda m, a, output: states.update(before=output)),
            decoder.layers[layer].register_forward_pre_hook(lambda m, args: states.update(after=args[0])),
        ]
        model(**inputs)
        for watch in watches:
            watch.remove()
    report = session.report
    alive, left = report.kept(0, layer - 1), report.kept(0, layer)
    assert 0 < len(left) < len(alive) and report.depth == depth
    text = (~torch.isin(inputs["input_ids"][0], torch.tensor(families.IMAGE))).nonzero()[:, 0]

    def places(visual):
        columns = torch.cat([text, visual]).sort().values
        return torch.searchsorted(columns, visual)

    before, after = states["before"][0][places(alive)], states["after"][0][places(left)]
    # The token that each alive token went into, found through the visual tokens that stand for themselves.
    index = torch.searchsorted(report.visual[0], alive)
    target = report.sources(0, layer)[index]
    assert (target >= 0).any() and len(target.unique()) >= len(left)
    for place in range(len(left)):
        own = int((alive == left[place]).nonzero())
        running = before[own]
        for other in (target == place).nonzero()[:, 0].tolist():
            if other != own:
                running = (running + before[other]) / 2
        torch.testing.assert_close(after[place], running, atol=1e-5, rtol=1e-5)


def test_a_video_that_lost_tokens_before_is_refused():
    model = families.shared(NAME)
    inputs = families.batch(NAME, model, media="video").singles[0]
    methods = [{"name": "random", "keep_ratio": 0.7}, {"name": "holitom", "keep_ratio": 0.5}]
    with (
        torch.no_grad(),
        vtprune.prune(model, methods),
        pytest.raises(vtprune.UnsupportedStageError, match="whole frames"),
    ):
        model(**inputs)
