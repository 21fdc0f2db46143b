# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf

import vtprune
from vtprune.testing import families
from vtprune.testing.configs import llama, siglip
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout


def features(model, pixels):
    return model.model.get_image_features(pixels, return_dict=True).pooler_output


@torch.no_grad()
def test_tokens_are_the_patches_in_raster_order():
    model = blinkered("vipllava")
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    media = vtprune.adapter_for(model).media("image", {"pixel_values": pixels}, features(model, pixels))
    assert [medium.grids for medium in media] == [(Grid(6, 6),)] * 2
    check_layout(media, lambda images: features(model, images).flatten(0, 1), pixels, 7, side=1)


@pytest.mark.parametrize(("layers", "read"), [([-2, -4, 1], [2, 0, 0]), ([3], [2]), (-1, [3]), ((1, 2), [0, 1])])
@torch.no_grad()
def test_the_projector_reads_the_stated_layers_without_the_cls_token(layers, read):
    config = families.shared("vipllava").config
    model = hf.VipLlavaForConditionalGeneration(
        hf.VipLlavaConfig(
            vision_config=config.vision_config, text_config=config.text_config, vision_feature_layers=layers
        )
    ).eval()
    adapter = vtprune.adapter_for(model)
    assert adapter.feature_layers == read
    assert adapter.shape == ModelShape(4, 8, feature_layer=max(read), has_cls=True)
    outputs, seen = {}, []
    for number, layer in enumerate(adapter.encoder_layers()):
        layer.register_forward_hook(
            lambda module, args, output, number=number: outputs.update(
                {number: output[0] if isinstance(output, tuple) else output}
            )
        )
    adapter.projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features(model, torch.randn(2, 3, 42, 42))
    assert torch.equal(seen[0], torch.cat([outputs[layer][:, 1:] for layer in read], -1))


def test_a_tower_without_cls_token_is_refused():
    """The model would cut off a patch."""
    config = hf.VipLlavaConfig(vision_config=siglip(32, 8), text_config=llama())
    model = hf.VipLlavaForConditionalGeneration(config)
    with pytest.raises(vtprune.UnsupportedModelError, match="'siglip_vision_model'; supported: clip_vision_model"):
        vtprune.adapter_for(model)


@every_cell("vipllava", cls_token=True)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned("vipllava", media, method, attention, positions)


def test_keeping_everything_changes_nothing():
    check_untouched("vipllava", "image", "sdpa")
