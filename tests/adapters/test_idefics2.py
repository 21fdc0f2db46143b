# SPDX-License-Identifier: Apache-2.0
"""Idefics2 and Aria: tokens that a resampler makes."""

import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.testing.media import BREAK
from vtprune.tokens import ModelShape

from .checks import check_pruned

LATENTS = 12


def encode(name, inputs):
    model = families.shared(name)
    return torch.cat([*model.model.get_image_features(**inputs, return_dict=True).pooler_output]).view(-1, LATENTS, 32)


def pixels_of(name, *keys):
    model = families.shared(name)
    inputs = families.batch(name, model).inputs
    return vtprune.adapter_for(model), {key: inputs[key] for key in ("pixel_values", *keys)}


@torch.no_grad()
def test_tiles_of_idefics2_are_media_and_padding_is_none():
    """The samples have one tile; two images, of two tiles and one; and three tiles."""
    adapter, inputs = pixels_of("idefics2", "pixel_attention_mask")
    output = families.shared("idefics2").model.get_image_features(**inputs, return_dict=True).pooler_output
    media = adapter.media("image", inputs, output)
    assert [len(medium) for medium in media] == [LATENTS] * 7
    assert all(medium.grids == (None,) and medium.lines is None for medium in media)
    assert inputs["pixel_values"].shape == (3, 3, 3, 24, 24)
    tiles = inputs["pixel_values"].flatten(0, 1)
    real = [0, 3, 4, 5, 6, 7, 8]
    assert torch.equal(adapter.pixels("image", inputs), tiles[real])
    assert adapter.encoder_sequences("image", inputs) == [30, 24, 24, 36, 15, 15, 15]
    # Up to transformers 5.18 the features come tile by tile.
    assert len(adapter.media("image", inputs, torch.cat([*output]).view(-1, LATENTS, 32))) == 7


@torch.no_grad()
def test_each_tile_of_idefics2_makes_the_tokens_of_one_medium():
    _, inputs = pixels_of("idefics2", "pixel_attention_mask")
    before = encode("idefics2", inputs)
    for number, (sample, tile) in enumerate(((0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2))):
        pixels = inputs["pixel_values"].clone()
        pixels[sample, tile, :, :8, :8] += 1
        moved = (encode("idefics2", inputs | {"pixel_values": pixels}) != before).any(-1)
        assert moved.any(1).nonzero().flatten().tolist() == [number]
        assert moved[number].all(), "a token of a perceiver is made of all patches"


@torch.no_grad()
def test_each_tile_of_aria_makes_the_tokens_of_one_medium():
    adapter, inputs = pixels_of("aria", "pixel_mask")
    before = encode("aria", inputs)
    assert [len(medium) for medium in adapter.media("image", inputs, before)] == [LATENTS] * len(before)
    assert adapter.encoder_sequences("image", inputs) == [36] * len(before)
    for tile in range(len(before)):
        pixels = inputs["pixel_values"].clone()
        pixels[tile, :, :8, :8] += 1
        moved = (encode("aria", inputs | {"pixel_values": pixels}) != before).any(-1)
        assert moved.any(1).nonzero().flatten().tolist() == [tile] and moved[tile].all()


@pytest.mark.parametrize("name", ["idefics2", "aria"])
def test_depths_and_parts(name):
    adapter = vtprune.adapter_for(families.shared(name))
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.stages()[0] != "encoder" and adapter.signals() == ("text", "LLM attention", "transition")


@pytest.mark.parametrize(
    ("name", "scope", "kept"),
    [
        ("idefics2", "crop", [2, 6, 6]),
        ("idefics2", "image", [2, 6, 6]),  # text is between tiles
        ("aria", "crop", [4, 8, 4]),
        ("aria", "image", [2, 2, 2]),  # tiles side by side are one image, and so are images
    ],
)
@pytest.mark.parametrize("method", ["random", "divprune"])
def test_budgets_of_tiles_and_images(name, scope, kept, method):
    report = check_pruned(name, "image", method, keep_ratio=None, keep_tokens=2, scope=scope)
    assert report.counts[:, 0].tolist() == kept


def test_what_is_around_a_tile_of_idefics2_is_no_question():
    model = families.shared("idefics2")
    ids = families.batch("idefics2", model).singles[2]["input_ids"]
    visual = (ids == model.config.image_token_id).long()
    tiles = torch.where(visual.bool(), (visual.cumsum(1) - 1) // LATENTS, -1)
    found = vtprune.adapter_for(model).markers(ids, tiles)
    assert ids[found].tolist() == [BREAK] * 4
