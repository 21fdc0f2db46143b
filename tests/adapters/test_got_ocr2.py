# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf

import vtprune
from vtprune.testing import families
from vtprune.tokens import Grid, ModelShape

from .checks import check_pruned
from .merging import check_layout, encoder_and_projector

NAME, SIDE, PATCH = "got_ocr2", 64, 4


def features(model, tiles):
    return model.model.get_image_features(tiles, return_dict=True).pooler_output


@torch.no_grad()
def test_tokens_stand_for_squares_of_sixteen_patches():
    """Without attention, and without what convolutions see beyond their squares."""
    model = families.build(NAME)
    adapter = vtprune.adapter_for(model)
    for layer in model.model.vision_tower.layers:
        layer.attn.proj.weight.data.zero_()
    neck, projector = model.model.vision_tower.neck, model.model.multi_modal_projector
    neck.conv2.weight.data *= torch.tensor([0, 1, 0])[:, None] * torch.tensor([0, 1, 0])
    for convolution in (projector.conv_upsampler1, projector.conv_upsampler2):
        convolution.weight.data *= torch.tensor([0, 1, 1])[:, None] * torch.tensor([0, 1, 1])
    tiles = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    media = adapter.media("image", {"pixel_values": tiles}, features(model, tiles))
    assert [medium.grids for medium in media] == [(Grid(4, 4),)] * 2 and adapter.image_grid is None
    check_layout(media, lambda tiles: features(model, tiles).flatten(0, 1), tiles, PATCH, side=4)


@torch.no_grad()
def test_features_are_means_of_squares():
    model = families.shared(NAME)
    adapter, tiles = vtprune.adapter_for(model), torch.randn(2, 3, SIDE, SIDE)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    _, projector = encoder_and_projector(model, lambda: features(model, tiles))
    assert projector.shape[2:] == (16, 16)
    rows = adapter.projector_inputs("image", {"pixel_values": tiles}, projector)
    assert len(rows) == 2 * 16
    torch.testing.assert_close(rows[16 + 4 * 2 + 3], projector[1, :, 8:12, 12:16].mean((1, 2)))


def test_what_reads_the_layers_of_the_encoder_is_refused():
    with pytest.raises(vtprune.UnsupportedStageError, match="fastervlm: .*it is a SAM"):
        vtprune.prune(families.shared(NAME), "fastervlm", keep_ratio=0.5)


@torch.no_grad()
def test_flops_of_the_encoder_are_not_counted():
    model = families.shared(NAME)
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session:
        model(**families.batch(NAME, model).inputs)
    assert session.report.encoder_flops is None and "not counted: it is a SAM" in str(session.report)


def test_tiles_side_by_side_are_one_image():
    for scope, counts in (("crop", [2, 6, 6]), ("image", [2, 4, 2])):
        report = check_pruned(NAME, "image", "divprune", keep_ratio=None, keep_tokens=2, scope=scope)
        assert report.counts[:, 0].tolist() == counts


@pytest.mark.skipif(not hasattr(hf, "PPChart2TableConfig"), reason="this release of transformers has none")
def test_pp_chart2table_is_the_same_class():
    config = hf.PPChart2TableConfig(**families.shared(NAME).config.to_diff_dict() | {"model_type": "pp_chart2table"})
    model = hf.GotOcr2ForConditionalGeneration(config)
    assert model.config.model_type == "pp_chart2table"
    assert vtprune.adapter_for(model).media("image", {}, torch.zeros(1, 256, 2))[0].grids == (Grid(16, 16),)
