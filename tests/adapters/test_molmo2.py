# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.testing.batching import encode_all
from vtprune.testing.media import BREAK, END, IMAGE, START
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import means

NAME, PATCHES = "molmo2", 25
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="this release of transformers has no Molmo 2")


def inputs_of(media: str, model):
    return families.batch(NAME, model, media=media).inputs


@torch.no_grad()
def depends_on(model, media: str, inputs) -> torch.Tensor:
    """(tokens, crops, patches) bool: the patches that each token of a blinkered model depends on."""
    adapter = vtprune.adapter_for(model)
    name = "pixel_values_videos" if media == "video" else "pixel_values"
    before = encode_all(adapter, inputs)[0].rows
    crops = inputs[name]
    found = torch.zeros(len(before), *crops.shape[:2], dtype=torch.bool)
    for crop in range(len(crops)):
        for patch in range(PATCHES):
            changed = crops.clone()
            changed[crop, patch] += 1
            found[:, crop, patch] = (encode_all(adapter, inputs | {name: changed})[0].rows != before).any(-1)
    return found


@torch.no_grad()
@pytest.mark.parametrize("media", ["image", "video"])
def test_tokens_stand_for_the_patches_that_they_pool(media):
    model = blinkered(NAME)
    adapter, inputs = vtprune.adapter_for(model), inputs_of(media, model)
    (encoded,) = encode_all(adapter, inputs)
    depends = depends_on(model, media, inputs)
    assert int(depends.flatten(1).sum(1).max()) == 4 and int(depends.flatten(1).sum(1).min()) == 1
    values = torch.randn(*depends.shape[1:], 5)
    for rows in (adapter.patch_values, adapter.projector_inputs):
        torch.testing.assert_close(rows(media, encoded.arguments, values), means(depends, values))

    layouts = adapter.media(media, encoded.arguments, encoded.features)
    crops = depends.any(2).split([len(medium) for medium in layouts])
    pixels = list(adapter.pixels(media, encoded.arguments))
    first = 0
    for medium, own, of_medium in zip(layouts, crops, pixels, strict=True):
        there = own.any(0).nonzero()[:, 0]
        name = "pixel_values_videos" if media == "video" else "pixel_values"
        assert there.tolist() == list(range(first, first + len(of_medium)))
        assert torch.equal(of_medium, inputs[name][there])
        first += len(of_medium)
        frames = own.nonzero()[:, 1].view(-1)[: len(medium)] - there[0]
        if media == "video":  # a grid a frame
            assert medium.crops.tolist() == frames.tolist() and set(medium.grids) == {Grid(3, 3)}
        else:  # the whole view, then a grid over all other crops
            assert medium.grids[0] == Grid(3, 3) and bool(((medium.crops > 0) == (frames > 0)).all())
    if media == "image":
        assert [medium.grids[1] for medium in layouts] == [Grid(3, 4), Grid(3, 3), Grid(4, 3), Grid(4, 4)]
    assert adapter.encoder_sequences(media, encoded.arguments) == [PATCHES] * first


@torch.no_grad()
def test_a_row_of_the_mosaic_goes_on_in_the_next_crop():
    """In raster order over all crops."""
    model = blinkered(NAME)
    adapter, inputs = vtprune.adapter_for(model), families.batch(NAME, model, samples=1).inputs
    depends = depends_on(model, "image", inputs)[9:]  # a line of two crops, after the whole view
    first_row = [depends[token].any(1).nonzero()[:, 0].tolist() for token in range(4)]
    assert first_row == [[1], [1], [2], [2]]
    (medium,) = adapter.media("image", {"image_grids": inputs["image_grids"]}, ())
    assert medium.grids[1] == Grid(3, 4) and len(depends) == 12


def test_facts():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 2, has_cls=False) and adapter.feature_layers == [2, 1]
    assert [adapter.rope_kinds[layer] for layer in (0, 2, 3)] == ["scaled", "unscaled", "scaled"]


def test_markers_are_all_but_words():
    """Column tokens are inside the image, or right behind its last token."""
    model = families.shared(NAME)
    (inputs,) = families.batch(NAME, model, samples=1).singles
    ids = inputs["input_ids"][0]
    visual = ids == IMAGE
    found = vtprune.adapter_for(model).markers(ids[None], torch.where(visual, 0, -1)[None])[0]
    assert bool((ids[~found & ~visual] < IMAGE).all()) and {BREAK, START, END} < set(ids[found].tolist())


def test_tokens_that_come_back_are_refused_where_rotations_differ():
    with pytest.raises(UnsupportedStageError, match="rotations differ"):
        vtprune.prune(families.shared(NAME), "lazyllm", keep_ratio=0.5)
    vtprune.prune(families.build(NAME, rope_scaling_layers=None), "lazyllm", keep_ratio=0.5).remove()
