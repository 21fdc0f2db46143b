# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache

import vtprune
from vtprune.testing import families
from vtprune.tokens import Grid, ModelShape
from vtprune.transformers_private import CACHE

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout, encoder_and_projector, means

SIZE, PATCH = 35, 7
both = pytest.mark.parametrize("name", ["paligemma", "paligemma2"])


def features(model, images):
    return model.model.get_image_features(images, return_dict=True).pooler_output


@both
@torch.no_grad()
def test_tokens_stand_for_patches(name):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images}
    media = adapter.media("image", inputs, features(model, images))
    assert [medium.grids for medium in media] == [(Grid(5, 5),)] * 2 and adapter.image_grid == Grid(5, 5)
    depends = check_layout(media, lambda images: features(model, images).flatten(0, 1), images, PATCH, side=1)
    model = families.shared(name)
    encoder, projector = encoder_and_projector(model, lambda: features(model, images))
    shown = vtprune.adapter_for(model).projector_inputs("image", inputs, projector)
    torch.testing.assert_close(shown, means(depends, encoder))
    assert adapter.encoder_sequences("image", inputs) == [25] * 2
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)


def test_the_prompt_is_one_block_unless_it_continues_a_cache():
    """The model recognises a first call by pixels, not by encoded images."""
    adapter = vtprune.adapter_for(families.shared("paligemma"))
    types = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    expected, used = [[0, 0, 0, -1], [0, 0, 0, 0]], DynamicCache()
    used.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    assert adapter.blocks({"token_type_ids": types}).tolist() == expected
    assert adapter.blocks({"token_type_ids": types, CACHE: DynamicCache()}).tolist() == expected
    assert adapter.blocks({"token_type_ids": types, CACHE: used}) is None
    pixels = {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}
    assert adapter.blocks({"token_type_ids": types, CACHE: used} | pixels).tolist() == expected
    assert adapter.blocks({}) is None


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell("paligemma", cls_token=False)
@both
def test_pruned_generation_is_the_recomputed_one(name, media, method, attention, positions):
    check_pruned(name, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@both
def test_keeping_everything_changes_nothing(name, attention):
    check_untouched(name, "image", attention)


@pytest.mark.parametrize("scope", ["crop", "image"])
@both
def test_every_image_has_a_budget_of_its_own(name, scope):
    """Images side by side are not tiles of one image."""
    report = check_pruned(name, "image", "divprune", keep_ratio=None, keep_tokens=5, scope=scope)
    assert report.counts[:, 0].tolist() == [5, 10, 5]
