# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which tokens the attention of a model picks, and equal scores."""

import pytest
import torch

import vtprune
from vtprune.signals import ClsAttention, EncoderSaliency
from vtprune.testing import families
from vtprune.tokens import ModelShape, VisualTokens

SHAPE = ModelShape(encoder_layers=4, decoder_layers=8, feature_layer=2, has_cls=True)


@torch.no_grad()
@pytest.mark.parametrize("feature_layer", [-2, -1])
def test_the_tokens_kept_are_those_that_cls_attends_to_in_the_layer_that_is_read(feature_layer):
    model = families.build("llava", "eager")
    model.config.vision_feature_layer = feature_layer
    inputs = families.batch("llava", model).singles[0]
    seen = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[feature_layer]
    expected = seen[0, :, 0, 1:].mean(0).topk(7).indices.sort().values
    with vtprune.prune(model, "fastervlm", keep_tokens=7) as session:
        model(**inputs)
    first = (inputs["input_ids"][0] == families.IMAGE).nonzero()[0, 0]
    assert (session.report.kept(0, 0) - first).tolist() == expected.tolist()


def test_padding_is_never_kept_and_of_equal_tokens_the_first_ones_are():
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    tokens = VisualTokens(
        features=torch.zeros(2, 6, 3),
        valid=valid,
        budget=torch.tensor([3, 4]),
        signals={EncoderSaliency(2): torch.full((2, 6), 0.1)},
        shape=SHAPE,
    )
    keep = vtprune.FasterVLM(keep_tokens=3).select(tokens).keep
    assert keep.tolist() == [[True] * 3 + [False] * 3, [True] * 4 + [False] * 2]


def test_one_layer_of_vtc_cls():
    attention = torch.rand(1, 1, 4, 30, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens(
        features=torch.zeros(1, 30, 3),
        valid=torch.ones(1, 30, dtype=torch.bool),
        budget=torch.tensor([9]),
        signals={ClsAttention((2,)): attention, EncoderSaliency(2): attention.mean((1, 2))},
        shape=SHAPE,
    )
    ours, theirs = vtprune.FasterVLM(keep_tokens=9), vtprune.VTCCls(keep_tokens=9, start_layer=2)
    assert torch.equal(ours.select(tokens).keep, theirs.select(tokens).keep)
