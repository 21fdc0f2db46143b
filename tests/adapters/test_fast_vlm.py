# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vtprune
from vtprune.eval.pages.views import view_of
from vtprune.signals import EncoderFeatures
from vtprune.testing import families
from vtprune.testing.statements import Look
from vtprune.tokens import Grid

pytestmark = pytest.mark.skipif(not families.is_available("fast_vlm"), reason="no timm, or no FastVLM")


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (192, 330), (65, 129)])
@torch.no_grad()
def test_tokens_are_the_last_feature_map_in_raster_order(size):
    model = families.shared("fast_vlm")
    adapter, inputs = vtprune.adapter_for(model), {"pixel_values": torch.randn(2, 3, *size)}
    output = model.model.get_image_features(**inputs, return_dict=True)
    rows, columns = output.last_hidden_state.shape[-2:]
    media = adapter.media("image", inputs, output.pooler_output)
    assert [medium.grids for medium in media] == [(Grid(rows, columns),)] * 2
    assert adapter.encoder_sequences("image", inputs) == [rows * columns] * 2
    by_hand = torch.stack([output.last_hidden_state[0, :, r, c] for r in range(rows) for c in range(columns)])
    projected = adapter.projector(by_hand)
    torch.testing.assert_close(output.pooler_output[0], projected)


@torch.no_grad()
def test_methods_are_shown_the_feature_map():
    model = families.shared("fast_vlm")
    look = Look(vtprune.adapter_for(model), families.batch("fast_vlm", model).inputs)
    output = model.model.get_image_features(look.inputs["pixel_values"], return_dict=True).last_hidden_state
    shown = look.shown([EncoderFeatures()])[EncoderFeatures()]
    torch.testing.assert_close(shown, output.flatten(2).mT.flatten(0, 1), atol=0, rtol=0)


@torch.no_grad()
def test_a_report_has_no_flops_of_the_encoder():
    model = families.shared("fast_vlm")
    with vtprune.prune(model, "mmtok", keep_ratio=0.5) as session:
        model(**families.batch("fast_vlm", model).inputs)
    assert session.report.encoder_flops is None and session.report.prefill_flops > 0
    assert "FLOPs of the encoder are not counted: it is a network of timm" in str(session.report)


@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "holitom", "tome", "mctf"])
def test_what_needs_layers_of_a_transformer_is_refused(method):
    with pytest.raises(vtprune.UnsupportedStageError, match=f"{method}: .*FastVLM.*it is a network of timm"):
        vtprune.prune(families.shared("fast_vlm"), method, keep_ratio=0.5)


@torch.no_grad()
def test_a_picture_is_what_the_encoder_saw():
    """Its config names no patches, and every pixel counts."""
    model = families.shared("fast_vlm")
    pixels = torch.rand(1, 3, 200, 130)
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(do_normalize=False, do_rescale=True, rescale_factor=1 / 255)
    )
    inputs = {"input_ids": torch.full((1, 12), model.config.image_token_id), "pixel_values": pixels}
    view, (picture,) = view_of(model, processor, inputs, "a question", "image", (200, 200))
    assert view.grids == [[4, 3]] and view.places == [[0, row, column] for row in range(4) for column in range(3)]
    assert (picture.width, picture.height) == (130, 200)
    shown = torch.tensor(np.asarray(picture)).permute(2, 0, 1)
    torch.testing.assert_close(shown.float(), (255 * pixels[0]).round(), atol=1, rtol=0)
