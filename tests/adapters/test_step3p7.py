# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.testing.tiny.step3p7 import TILE, WHOLE
from vtprune.tokens import Grid

from . import packed
from .checks import blinkered, check_pruned

NAME, PATCH = "step3p7", 4


def call(model):
    """The encode call of a batch: images with two tiles, none, two and four."""
    inputs = families.batch(NAME, model).inputs
    names = ("pixel_values", "pixel_values_local", "num_local_patches")
    return {key: inputs[key] for key in names}


@torch.no_grad()
def test_tiles_come_before_the_whole_image():
    """And each token shows the pixels that its place in the layout says."""
    model = blinkered(NAME)
    adapter, inputs = vtprune.adapter_for(model), call(model)
    assert inputs["num_local_patches"].tolist() == [2, 0, 2, 4] and len(inputs["pixel_values_local"]) == 8

    def encode(changed):
        return model.model.get_image_features(**inputs | changed, return_dict=True).pooler_output

    before = encode({})
    media = adapter.media("image", inputs, before)
    assert [len(medium) for medium in media] == list(map(len, before))
    tile, whole = Grid(2, 2), Grid(3, 3)
    assert [medium.grids for medium in media] == [
        (tile, tile, whole),
        (whole,),
        (tile, tile, whole),
        (*[tile] * 4, whole),
    ]
    starts = {"pixel_values_local": [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (3, 3)]}
    starts["pixel_values"] = [(image, len(medium.grids) - 1) for image, medium in enumerate(media)]
    for key, places in starts.items():
        for number, (image, crop) in enumerate(places):
            grid = media[image].grids[crop]
            for row in range(grid.rows):
                for column in range(grid.cols):
                    pixels = inputs[key].clone()
                    # The patch in the middle of those that a token stands for, which no other token sees.
                    top, left = 16 * row, 16 * column
                    pixels[number, :, top : top + PATCH, left : left + PATCH] += 1
                    after = encode({key: pixels})
                    moved = [(a != b).any(1).nonzero().flatten().tolist() for a, b in zip(before, after, strict=True)]
                    token = int((media[image].crops == crop).nonzero()[0]) + row * grid.cols + column
                    assert moved == [[token] if index == image else [] for index in range(len(media))]


@torch.no_grad()
def test_what_the_encoder_runs_on():
    model = families.shared(NAME)
    adapter, inputs = vtprune.adapter_for(model), call(model)
    lengths = []
    layer = adapter.encoder_layers()[0]
    handle = layer.register_forward_pre_hook(lambda module, args: lengths.extend([args[0].shape[1]] * len(args[0])))
    model.model.get_image_features(**inputs)
    handle.remove()
    assert (
        adapter.encoder_sequences("image", inputs)
        == lengths
        == [(WHOLE // PATCH) ** 2] * 4 + [(TILE // PATCH) ** 2] * 8
    )
    assert [tuple(image.shape) for image in adapter.pixels("image", inputs)] == [
        (tiles + 1, 3, WHOLE, WHOLE) for tiles in (2, 0, 2, 4)
    ]
    alone = {"pixel_values": inputs["pixel_values"][:2]}
    assert [medium.grids for medium in adapter.media("image", alone, [])] == [(Grid(3, 3),)] * 2
    assert adapter.encoder_sequences("image", alone) == [(WHOLE // PATCH) ** 2] * 2
    assert all(map(torch.equal, adapter.pixels("image", alone), alone["pixel_values"][:, None]))


def test_encoder_flops():
    packed.check_encoder_flops(
        NAME, "image", families.shared(NAME, "eager").model.vision_model.embeddings.patch_embedding
    )


@pytest.mark.parametrize("method", ["fastervlm", "visionzip"])
def test_nothing_is_read_of_the_encoder(method):
    with pytest.raises(UnsupportedStageError, match="Step 3.7: .*overlap"):
        vtprune.prune(families.shared(NAME), method, keep_ratio=0.5)


@pytest.mark.parametrize("method", ["random", "divprune"])
def test_a_budget_a_crop_or_an_image(method):
    report = check_pruned(NAME, "image", method, keep_ratio=None, keep_tokens=2)
    assert report.counts[:, 0].tolist() == [6, 8, 10]
    report = check_pruned(NAME, "image", method, keep_ratio=None, keep_tokens=2, scope="image")
    assert report.counts[:, 0].tolist() == [2, 4, 2]
