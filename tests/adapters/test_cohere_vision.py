# SPDX-License-Identifier: Apache-2.0
"""Aya Vision and Command A Vision."""

import pytest
import torch
import transformers as hf

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.testing import families
from vtprune.testing.configs import clip, siglip
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout, encoder_and_projector, means

TILE, PATCH = 24, 4
both = pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision"])


def features(model, tiles):
    return model.model.get_image_features(tiles, return_dict=True).pooler_output


@both
@torch.no_grad()
def test_tokens_stand_for_squares_of_four_patches(name):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    tiles = torch.randn(3, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": tiles}
    media = adapter.media("image", inputs, features(model, tiles))
    assert [medium.grids for medium in media] == [(Grid(3, 3),)] * 3 and adapter.image_grid is None
    depends = check_layout(media, lambda tiles: features(model, tiles).flatten(0, 1), tiles, PATCH, side=2)

    model, adapter = families.shared(name), vtprune.adapter_for(families.shared(name))
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    encoder, projector = encoder_and_projector(model, lambda: features(model, tiles))
    if name == "aya_vision":  # reads the last layer, in front of the encoder's norm
        encoder = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(adapter.projector_inputs("image", inputs, projector), means(depends, encoder))
    values = torch.randn(3, 36, 5)
    torch.testing.assert_close(adapter.patch_values("image", inputs, values), means(depends, values))
    assert adapter.encoder_sequences("image", inputs) == [36] * 3


def config(vision_config, **options):
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return hf.AyaVisionConfig(
        vision_config=vision_config,
        text_config=hf.Cohere2Config(**small, vocab_size=32),
        image_token_index=31,
        **options,
    )


def test_layers_whose_features_are_read():
    model = hf.AyaVisionForConditionalGeneration(config(siglip(TILE, PATCH), vision_feature_layer=-3))
    assert vtprune.adapter_for(model).shape.feature_layer == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(vision_config=clip(TILE, PATCH)), "its vision tower is 'clip_vision_model'"),
        (dict(vision_config=siglip(TILE, PATCH), vision_feature_select_strategy="default"), "cuts off the first patch"),
    ],
)
def test_what_gives_no_square_is_refused(options, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        vtprune.adapter_for(hf.AyaVisionForConditionalGeneration(config(**options)))


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell("aya_vision", cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned("aya_vision", media, method, attention, positions)


def test_keeping_everything_changes_nothing():
    check_untouched("aya_vision", "image", "sdpa")


@both
def test_a_budget_a_tile(name):
    """There is text between tiles, so each is an image of its own: 3 tiles; 1 and 2; 4."""
    for scope in ("crop", "image"):
        report = check_pruned(name, "image", "divprune", keep_ratio=None, keep_tokens=2, scope=scope)
        assert report.counts[:, 0].tolist() == [6, 6, 8]
