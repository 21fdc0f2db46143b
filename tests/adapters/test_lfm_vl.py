# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtprune
from vtprune.testing import families
from vtprune.testing.media import BREAK, END, GLOBAL, IMAGE, PATCH, ROW_COLUMN, START
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import check_layout

pytestmark = pytest.mark.skipif(not hasattr(hf, "Lfm3VlConfig"), reason="not in this release of transformers")
SIZES = [(4, 6), (2, 4), (6, 2)]
"""Rows and columns of patches of three tiles."""


def arguments(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    most = max(rows * columns for rows, columns in sizes)
    real = torch.tensor([[place < rows * columns for place in range(most)] for rows, columns in sizes])
    pixels = torch.randn(len(sizes), most, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor(sizes), "pixel_attention_mask": real.long()}


@torch.no_grad()
def test_tokens_of_lfm2_stand_for_squares_of_four_patches():
    model = blinkered("lfm2_vl")
    adapter, inputs = vtprune.adapter_for(model), arguments([(4, 6)] * 2)
    images = torch.randn(2, 3, 4 * PATCH, 6 * PATCH, generator=torch.Generator().manual_seed(0))

    def encode(images):
        patches = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1)
        given = inputs | {"pixel_values": patches.flatten(3).flatten(1, 2)}
        return torch.cat(model.model.get_image_features(**given).pooler_output)

    media = adapter.media("image", inputs, ())
    assert [medium.grids for medium in media] == [(Grid(2, 3),)] * 2
    check_layout(media, encode, images, PATCH, side=2)


@torch.no_grad()
def test_tiles_of_different_sizes_are_padded_in_the_encoder_and_before_the_projector(monkeypatch):
    model = families.build("lfm2_vl")
    adapter, inputs = vtprune.adapter_for(model), arguments(SIZES)
    values = torch.full((3, 24, 32), float("nan"))
    expected = []
    for tile, (rows, columns) in enumerate(SIZES):
        for place in range(rows * columns):
            values[tile, place] = torch.tensor([tile, place // columns, place % columns] + [0] * 29)
        grid = [(row, column) for row in range(rows // 2) for column in range(columns // 2)]
        expected += [[tile, 2 * row + 0.5, 2 * column + 0.5] for row, column in grid]
    output = BaseModelOutputWithPooling(last_hidden_state=values)
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda **kwargs: output)
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = model.model.get_image_features(**inputs).pooler_output
    assert [len(tile) for tile in features] == [6, 2, 3]
    assert [medium.grids for medium in adapter.media("image", inputs, features)] == [
        (Grid(2, 3),),
        (Grid(1, 2),),
        (Grid(3, 1),),
    ]
    for rows in (adapter.projector_inputs("image", inputs, seen[0]), adapter.patch_values("image", inputs, values)):
        assert rows[:, :3].tolist() == expected
    assert [len(tile) for tile in adapter.pixels("image", inputs)] == [24, 8, 12]
    assert adapter.encoder_sequences("image", inputs) == [24] * 3


def test_tiles_that_are_projected_one_by_one_are_refused():
    adapter, inputs = vtprune.adapter_for(families.shared("lfm2_vl")), arguments(SIZES)
    with pytest.raises(vtprune.UnsupportedStageError, match="one by one"):
        adapter.projector_inputs("image", inputs, torch.zeros(1, 6, 2, 32))


def language(ids: list[int]) -> list[int]:
    """What of a prompt is neither visual nor a marker."""
    adapter = vtprune.adapter_for(families.shared("lfm2_vl"))
    row = torch.tensor([ids])
    visual = row == IMAGE
    begins = visual & ~torch.cat([torch.zeros(1, 1, dtype=torch.bool), visual[:, :-1]], 1)
    images = (begins.cumsum(1) - 1).masked_fill(~visual, -1)
    return row[~adapter.markers(row, images) & ~visual].tolist()


def test_markers_of_images_that_are_cut_and_of_others():
    plain = [START, IMAGE, IMAGE, END]
    cut = [START, BREAK, IMAGE, ROW_COLUMN, IMAGE, GLOBAL, IMAGE, END]
    assert language([5, 6, *plain, 7, *plain, 8]) == [5, 6, 7, 8]
    assert language([5, 6, *cut, 7, *cut, 8]) == [5, 6, 7, 8]
    assert language([*cut, *plain, *cut]) == []


def test_parts_of_lfm3_and_what_is_not_read_of_it():
    model = families.shared("lfm3_vl")
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False) and adapter.position_axes == 1
    inputs = families.batch("lfm3_vl", model, media="mixed").inputs
    for kind in ("image", "video"):
        features = getattr(model.model, f"get_{kind}_features")
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
        output = features(inputs[pixels], inputs[f"{kind}_grid_thw"]).pooler_output
        assert [len(one) for one in adapter.media(kind, inputs, output)] == [len(one) for one in output]
    with pytest.raises(vtprune.UnsupportedStageError, match="most of its layers are convolutions"):
        vtprune.prune(model, "visionzip", keep_ratio=0.5)
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session:
        model(**inputs)
    assert session.report.encoder_flops is None
