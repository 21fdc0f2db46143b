# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.testing.media import END, START
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout, encoder_and_projector, means

NAME, SIZE, PATCH = "gemma3", 32, 4


def features(model, images):
    return model.model.get_image_features(images, return_dict=True).pooler_output


@torch.no_grad()
def test_tokens_stand_for_the_patches_that_are_averaged():
    model = blinkered(NAME)
    adapter = vtprune.adapter_for(model)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images}
    media = adapter.media("image", inputs, features(model, images))
    assert [medium.grids for medium in media] == [(Grid(4, 4),)] * 2 and adapter.image_grid == Grid(4, 4)
    depends = check_layout(media, lambda images: features(model, images).flatten(0, 1), images, PATCH, side=2)
    model = families.shared(NAME)
    encoder, projector = encoder_and_projector(model, lambda: features(model, images))
    shown = vtprune.adapter_for(model).projector_inputs("image", inputs, projector)
    torch.testing.assert_close(shown, means(depends, encoder))
    assert adapter.encoder_sequences("image", inputs) == [64] * 2
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.marker_token_ids == (START, END)


def test_blocks_are_images_and_count_from_the_start_of_the_sequence():
    adapter = vtprune.adapter_for(families.shared(NAME))
    types = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0]])
    expected = [[-1, 0, 0, -1, 1, 1, 1, -1], [-1, -1, -1, -1, -1, 0, 0, -1]]
    assert adapter.blocks({"token_type_ids": types}).tolist() == expected
    assert adapter.blocks({}) is None


@torch.no_grad()
def test_rotary_embeddings_differ_between_kinds_of_layers():
    model = families.shared(NAME)
    adapter, seen = vtprune.adapter_for(model), {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: seen.update({i: (args[0], kwargs)}), with_kwargs=True
        )
        for i, layer in enumerate(adapter.decoder_layers[:2])
    ]
    model(**families.batch(NAME, model).singles[0])
    for handle in handles:
        handle.remove()
    for layer, (hidden, kwargs) in seen.items():
        ours = adapter.rope(layer, hidden, torch.arange(hidden.shape[1])[None])
        assert all(map(torch.equal, ours, kwargs["position_embeddings"]))
    sliding, full = (kwargs["position_embeddings"][0] for _, kwargs in seen.values())
    assert not torch.equal(sliding, full)


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(attention):
    check_untouched(NAME, "image", attention)


@pytest.mark.parametrize("scope", ["crop", "image"])
def test_every_image_has_a_budget_of_its_own(scope):
    report = check_pruned(NAME, "image", "divprune", keep_ratio=None, keep_tokens=5, scope=scope)
    assert report.counts[:, 0].tolist() == [5, 10, 5]
