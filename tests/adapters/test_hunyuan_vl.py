# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf

import vtprune
from vtprune.testing import families
from vtprune.testing.recompute import recompute, visual_columns
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned
from .merging import encoder_and_projector

NAME, PATCH, SIDE = "hunyuan_vl", 4, 2
GRIDS = ((2, 3), (4, 2))
pytestmark = pytest.mark.skipif(not hasattr(hf, "HunYuanVLConfig"), reason="this release of transformers has none")


def images(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Patches of images of so many rows and columns of merged tokens."""
    sizes = [(1, SIDE * rows, SIDE * columns) for rows, columns in grids]
    patches = sum(rows * columns for _, rows, columns in sizes)
    pixels = torch.randn(patches, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(sizes)}


def features(model, inputs):
    return torch.cat(list(model.model.get_image_features(**inputs, return_dict=True).pooler_output))


@torch.no_grad()
def test_a_begin_token_rows_with_newlines_and_an_end_token():
    """Found by changing one patch at a time, which come row by row."""
    model, inputs = blinkered(NAME), images(*GRIDS)
    adapter = vtprune.adapter_for(model)
    before, media = features(model, inputs), adapter.media("image", inputs, [])
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False) and adapter.encoder_sequences("image", inputs) == [
        24,
        32,
    ]
    assert [medium.grids for medium in media] == [(Grid(*grid),) for grid in GRIDS]
    assert media[0].crops.tolist() == [-1, *[0, 0, 0, -1] * 2, -1]
    assert media[0].lines.tolist() == [-1, *[0] * 4, *[1] * 4, -1]
    places, start = [], 0
    for number, (rows, columns) in enumerate(GRIDS):
        for row in range(SIDE * rows):
            for column in range(SIDE * columns):
                places.append(start + 1 + row // SIDE * (columns + 1) + column // SIDE)
        start += len(media[number])
    assert start == len(before)
    for patch, token in enumerate(places):
        changed = inputs["pixel_values"].clone()
        changed[patch] += 1
        moved = (features(model, inputs | {"pixel_values": changed}) != before).any(-1)
        assert moved.nonzero().tolist() == [[token]]
    separators = torch.cat([medium.crops for medium in media]) < 0
    assert sorted({*range(start)} - {*places}) == separators.nonzero().flatten().tolist()


@torch.no_grad()
def test_features_are_means_of_four_patches():
    """The merger runs once an image."""
    model, inputs = families.shared(NAME), images(*GRIDS)
    adapter = vtprune.adapter_for(model)
    encoder, projector = encoder_and_projector(model, lambda: features(model, inputs))
    assert projector.shape[1] == 32  # of the last image alone
    shown = adapter.projector_inputs("image", inputs, encoder)
    first = encoder[0, :24].view(4, 6, -1)
    torch.testing.assert_close(shown[1], first[:2, :2].mean((0, 1)))
    torch.testing.assert_close(shown[1 + 4 + 2], first[2:, 4:].mean((0, 1)))
    assert (shown[[0, 4, 8, 9]] == 0).all() and len(shown) == 10 + 14
    assert torch.equal(adapter.projector_inputs("image", images(GRIDS[0]), encoder[:, :24]), shown[:10])


def test_separators_go_with_their_rows_and_their_images():
    report = check_pruned(NAME, "image", "uniform", keep_ratio=None, keep_tokens=2)
    # Begin, end, and the newlines of at most two rows.
    assert all(2 + 2 + 1 <= count <= 2 + 2 + 2 for count in report.counts[[0, 2], 0].tolist())
    model = families.shared(NAME)
    with vtprune.prune(model, "zero", strict=False) as session:
        model(**families.batch(NAME, model).inputs)
    assert session.report.counts.sum() == 0


@torch.no_grad()
def test_images_of_a_batch_are_counted_through():
    """With a part in the rotation for the last axis, the model gives a prompt other logits behind others than alone.

    The first prompt of a batch, whose images have the same numbers, is pruned as if alone; so is each one alone.
    """
    axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}
    model = families.build(NAME, rope_parameters=axes)
    batch = families.batch(NAME, model)
    unpruned = [model(**inputs).logits[:, -1] for inputs in (batch.inputs, *batch.singles)]
    assert (unpruned[0][2] - unpruned[3][0]).abs().max() > 1e-3
    with vtprune.prune(model, "divprune", keep_ratio=0.4, positions="original") as session:
        together, alone = model(**batch.inputs).logits[0, -1], []
        for inputs in batch.singles:
            alone.append(model(**inputs).logits[0, -1])
            kept = [session.report.kept(0, layer) for layer in range(8)]
            assert len(kept[0]) < len(visual_columns(model, inputs))
            expected = recompute(model, inputs, torch.empty(0, dtype=torch.long), kept)[-1]
            torch.testing.assert_close(alone[-1], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(together, alone[0], atol=1e-4, rtol=0)
