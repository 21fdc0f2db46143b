# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout, encoder_and_projector, means

TILE, PATCH = 24, 4
both = pytest.mark.parametrize("name", ["idefics3", "smolvlm"])


def features(model, **inputs):
    return model.model.get_image_features(**inputs, return_dict=True).pooler_output


@both
@torch.no_grad()
def test_tokens_stand_for_squares_of_four_patches(name):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    tiles = torch.randn(2, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))
    media = adapter.media("image", {"pixel_values": tiles[None]}, features(model, pixel_values=tiles[None]))
    assert [medium.grids for medium in media] == [(Grid(3, 3),)] * 2
    check_layout(media, lambda tiles: features(model, pixel_values=tiles[None])[0], tiles, PATCH, side=2)


@both
@torch.no_grad()
def test_samples_of_different_numbers_of_tiles(name):
    """Tiles that only pad samples to the same number do not count; a tile with padding does."""
    model = families.shared(name)
    adapter, batch = vtprune.adapter_for(model), families.batch(name, model)
    inputs = {key: batch.inputs[key] for key in ("pixel_values", "pixel_attention_mask")}
    output = features(model, **inputs)
    media = adapter.media("image", inputs, output)
    # The samples have: 1x2 tiles and the whole; one padded image uncut, and 2x1 tiles and the whole; 2x2 and the whole.
    assert [len(sample) for sample in output] == [27, 36, 45] and len(media) == 12
    per_sample = [tiles[tiles.flatten(1).any(1)] for tiles in inputs["pixel_values"]]
    assert [len(tiles) for tiles in per_sample] == [3, 4, 5]
    assert torch.equal(adapter.pixels("image", inputs), torch.cat(per_sample))
    assert adapter.encoder_sequences("image", inputs) == [36] * 12

    encoder, projector = encoder_and_projector(model, lambda: features(model, **inputs))
    shown = adapter.projector_inputs("image", inputs, projector)
    traced = blinkered(name)
    depends = check_layout(
        media,
        lambda tiles: torch.cat(features(traced, pixel_values=tiles[None])),
        torch.cat(per_sample),
        PATCH,
        side=2,
    )
    torch.testing.assert_close(shown, means(depends, encoder))
    modality = model.model.connector.modality_projection
    stacked = model.model.connector.pixel_shuffle(projector, 2).flatten(0, 1)
    torch.testing.assert_close(modality(stacked), torch.cat(output))


@both
def test_depths_and_parts(name):
    model = families.shared(name)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.language_model is model.model.text_model and adapter.vision_tower() is model.model.vision_model


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell("idefics3", cls_token=False)
@both
def test_pruned_generation_is_the_recomputed_one(name, media, method, attention, positions):
    check_pruned(name, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@both
def test_keeping_everything_changes_nothing(name, attention):
    check_untouched(name, "image", attention)


@both
@pytest.mark.parametrize("scope", ["crop", "image"])
@pytest.mark.parametrize("method", ["random", "divprune", "mmtok"])
def test_every_tile_has_a_budget_of_its_own(name, method, scope):
    """Text is between the tiles of an image, so each tile is a separate image."""
    report = check_pruned(name, "image", method, keep_ratio=None, keep_tokens=2, scope=scope)
    assert report.counts[:, 0].tolist() == [6, 8, 10]
    for sample, tiles in enumerate((3, 4, 5)):
        alive = torch.isin(report.visual[sample], report.kept(sample, 0))
        assert alive.view(tiles, 9).sum(1).tolist() == [2] * tiles
