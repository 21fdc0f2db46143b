# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.testing.media import BREAK, END, GLOBAL, IMAGE, NEWLINE, START
from vtprune.testing.recompute import look
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import check_layout, encoder_and_projector, means

NAME, TILE, PATCH = "ovis2", 24, 4
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="this release of transformers has no Ovis 2")


def pixels(tiles: int) -> torch.Tensor:
    return torch.randn(tiles, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))


def features(model, tiles):
    return model.model.get_image_features(tiles, return_dict=True).pooler_output


@torch.no_grad()
def test_tokens_stand_for_squares_of_four_patches():
    model = blinkered(NAME)
    adapter, tiles = vtprune.adapter_for(model), pixels(3)
    inputs = {"pixel_values": tiles}
    media = adapter.media("image", inputs, features(model, tiles))
    assert [medium.grids for medium in media] == [(Grid(3, 3),)] * 3 and adapter.image_grid == Grid(3, 3)
    depends = check_layout(media, lambda tiles: features(model, tiles).flatten(0, 1), tiles, PATCH, side=2)

    model = families.shared(NAME)
    adapter, normed = vtprune.adapter_for(model), []
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    norm = model.model.vision_tower.transformer.rms_norm
    handle = norm.register_forward_hook(lambda module, args, output: normed.append(output))
    _, projector = encoder_and_projector(model, lambda: features(model, tiles))
    handle.remove()
    shown = adapter.projector_inputs("image", inputs, projector)
    torch.testing.assert_close(shown, means(depends, normed[0]))
    values = torch.randn(3, 36, 5)
    torch.testing.assert_close(adapter.patch_values("image", inputs, values), means(depends, values))
    assert adapter.encoder_sequences("image", inputs) == [36] * 3


@torch.no_grad()
def test_indicators_are_markers_whose_embeddings_come_with_the_image():
    model = families.shared(NAME)
    inputs = families.batch(NAME, model).singles[2]  # an image of two times two tiles
    ids = inputs["input_ids"][0]
    visual = ids == IMAGE
    begins = torch.nn.functional.pad(visual.int(), (1, 0)).diff() == 1
    images = torch.where(visual, begins.cumsum(0) - 1, -1)
    found = vtprune.adapter_for(model).markers(ids[None], images[None])[0]
    assert set(ids[found].tolist()) == {START, GLOBAL, BREAK, NEWLINE, END}
    assert bool((ids[~found & ~visual] < IMAGE).all())

    entering = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    columns, rows = look(model, inputs).indicators
    assert torch.equal(columns, found.nonzero()[:, 0]) and torch.equal(entering[0][columns], rows)
    assert not torch.equal(rows, model.get_input_embeddings()(ids[columns]))
