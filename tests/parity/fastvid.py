# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import FastVID
from vtprune.ops.anchor_merging import merge_into_anchors
from vtprune.ops.scene_cuts import scenes
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape

from . import Vector, close, handles, one_per_group, same

SHAPE = ModelShape(encoder_layers=26, decoder_layers=28, feature_layer=25, has_cls=False)


@handles("fastvid_*")
def scenes_and_anchors(v: Vector) -> None:
    """The reference keeps text around the video, and as many tokens of every frame, rounded down."""
    hidden, size, count, start = v["hidden"][0], v["tokens_per_frame"], v["frames"], v["video_start"]
    end = start + count * size
    features = hidden[start:end]
    frames = torch.arange(count).repeat_interleave(size)
    scene_of = scenes(v["frame_global"], v["c"], v["tau"])
    same(scene_of.bincount(), v["segment_sizes"])

    budget = int(size * v["ratio"]) * count
    parameters = dict(context_share=v["d"], anchor_weight=v["beta"])
    keep, merged, sources = merge_into_anchors(
        features, v["frame_attn"], frames, scene_of, budget, period=v["p"], **parameters
    )
    kept = keep.nonzero()[:, 0]
    text = torch.arange(len(hidden))
    same(torch.cat((text[:start], kept + start, text[end:])), v["keep_idx"])
    close(torch.cat((hidden[:start], merged[kept], hidden[end:])), v["out"], atol=1e-6)

    # The method does the same, but finds the scenes by the features.
    class Given(FastVID):
        def _scenes(self, values, frames, kind):
            return scene_of

    method = Given(keep_tokens=budget, anchor_period=v["p"], min_scenes=v["c"], threshold=v["tau"], **parameters)
    signals = {EncoderSaliency(SHAPE.feature_layer): v["frame_attn"][None]}
    facts = dict(signals=signals, shape=SHAPE, crops=frames[None], kinds=("video",))
    selection = method.select(one_per_group(features[None], budget, **facts))
    assert torch.equal(selection.keep[0], keep) and torch.equal(selection.sources[0], sources)
    assert torch.equal(selection.features[0], merged)
