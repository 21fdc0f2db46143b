# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import CDPruner
from vtprune.ops.determinantal import conditional_diversity, mean_similarity, scaled_relevance
from vtprune.signals import EncoderOutput, JointSpace
from vtprune.tokens import ModelShape

from . import Vector, handles, one_per_group

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)


@handles("cdpruner_*")
def selection(v: Vector) -> None:
    features, texts, k = v["features"], v["text_embeds"], v["k"]
    valid, budget = torch.ones(features.shape[:2], dtype=torch.bool), torch.full((len(features),), k)
    scores = -mean_similarity(v["image_embeds"], [texts] * len(features))
    keep = conditional_diversity(features, scaled_relevance(scores, valid, together=True), valid, budget)
    assert torch.equal(keep, v["keep_mask"])
    assert keep.nonzero()[:, 1].view(len(features), k).tolist() == v["keep_idx"].tolist()
    if len(texts) > 1:  # a tower of the library gives one embedding a question
        return
    method = CDPruner(text_tower="recorded", keep_tokens=k, reference_quirks=True)
    output, space = method.signals(SHAPE)
    assert (output, space) == (EncoderOutput(22, normalised=True), JointSpace("recorded"))
    # The recorded embeddings are already in CLIP's space.
    signals = {output: v["image_embeds"], space: (texts.expand(len(features), -1), torch.eye(texts.shape[1]))}
    tokens = one_per_group(features, k, signals=signals, shape=SHAPE)
    assert torch.equal(method.select(tokens).keep, v["keep_mask"])
    # A single image is scaled by its own minimum and maximum in both cases.
    sane = CDPruner(text_tower="recorded", keep_tokens=k).select(tokens).keep
    assert sane.sum(1).tolist() == [k] * len(features)
    if len(features) == 1:
        assert torch.equal(sane, v["keep_mask"])
