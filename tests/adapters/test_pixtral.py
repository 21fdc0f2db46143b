# SPDX-License-Identifier: Apache-2.0
"""Pixtral-12B, Mistral 3 and LightOnOCR, which have the tower in common."""

import pytest
import torch
from torch.nn.functional import pad

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.testing import families
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout, encoder_and_projector, means

PATCH = 4
every_side = pytest.mark.parametrize(("name", "side"), [("pixtral", 1), ("mistral3", 2), ("lighton_ocr", 2)])
every_name = pytest.mark.parametrize("name", ["pixtral", "mistral3", "lighton_ocr"])


def features(model, **inputs):
    return model.model.get_image_features(**inputs, return_dict=True).pooler_output


def images(*sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Images of random pixels, padded to the largest as the processor does."""
    generator = torch.Generator().manual_seed(0)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    pixels = [pad(torch.randn(3, h, w, generator=generator), (0, width - w, 0, height - h)) for h, w in sizes]
    return {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}


@every_side
@torch.no_grad()
def test_tokens_stand_for_patches_of_their_image_alone(name, side):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    inputs = images((8, 24), (20, 16), (24, 8))
    media = adapter.media("image", inputs, features(model, **inputs))
    expected = [(8, 24), (20 // side // PATCH * side * PATCH, 16), (24, 8)]
    unit = side * PATCH
    assert [medium.grids for medium in media] == [(Grid(h // unit, w // unit),) for h, w in expected]

    def encode(pixels):
        return torch.cat(list(features(model, pixel_values=pixels, image_sizes=inputs["image_sizes"])))

    depends = check_layout(media, encode, inputs["pixel_values"], PATCH, side)
    model = families.shared(name)
    encoder, projector = encoder_and_projector(model, lambda: features(model, **inputs))
    # The tower's one sequence, laid out as the padded pixels are: 6 x 6 patches an image.
    padded, patches = torch.zeros(3, 6, 6, encoder.shape[-1]), encoder.flatten(0, 1)
    for image, (height, width) in enumerate((size // PATCH).tolist() for size in inputs["image_sizes"]):
        padded[image, :height, :width] = patches[: height * width].view(height, width, -1)
        patches = patches[height * width :]
    assert len(patches) == 0
    shown = vtprune.adapter_for(model).projector_inputs("image", inputs, projector)
    torch.testing.assert_close(shown, means(depends, padded.flatten(1, 2)))
    assert adapter.encoder_sequences("image", inputs) == [12, 20, 12]


@every_name
def test_pixels_do_not_depend_on_the_batch(name):
    adapter = vtprune.adapter_for(families.shared(name))
    together = images((8, 24), (24, 8))
    for image, size in enumerate([(8, 24), (24, 8)]):
        assert adapter.pixels("image", together)[image].shape == (3, *size)
    listed = {"pixel_values": together["pixel_values"], "image_sizes": [[8, 24], [24, 8]]}
    assert all(map(torch.equal, adapter.pixels("image", together), adapter.pixels("image", listed)))


@torch.no_grad()
def test_pixtral_without_sizes_takes_images_for_as_large_as_their_pixels():
    model = families.shared("pixtral")
    adapter, inputs = vtprune.adapter_for(model), {"pixel_values": torch.randn(2, 3, 8, 12)}
    output = features(model, **inputs)
    media = adapter.media("image", inputs, output)
    assert [medium.grids for medium in media] == [(Grid(2, 3),)] * 2
    assert sum(map(len, output)) == 12 and adapter.encoder_sequences("image", inputs) == [6, 6]


@every_name
def test_depths(name):
    adapter = vtprune.adapter_for(families.shared(name))
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.model_types == ({"pixtral": "llava/pixtral"}.get(name, name),)


def test_pixtral_without_its_first_patch_is_refused():
    model = families.build("pixtral")
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="cuts off the first patch"):
        vtprune.adapter_for(model)


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell("pixtral", cls_token=False)
@every_name
def test_pruned_generation_is_the_recomputed_one(name, media, method, attention, positions):
    check_pruned(name, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_name
def test_keeping_everything_changes_nothing(name, attention):
    check_untouched(name, "image", attention)


@pytest.mark.parametrize("scope", ["crop", "image"])
@every_name
def test_every_image_has_a_budget_of_its_own(name, scope):
    """Text after each row of an image does not divide it."""
    report = check_pruned(name, "image", "divprune", keep_ratio=None, keep_tokens=5, scope=scope)
    assert report.counts[:, 0].tolist() == [5, 10, 5]
