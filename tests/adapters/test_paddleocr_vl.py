# SPDX-License-Identifier: Apache-2.0
import torch
import transformers as hf

import vtprune
from vtprune.testing import families
from vtprune.testing.media import IMAGE, MERGE, PATCH

from . import packed
from .checks import blinkered

NAME = "paddleocr_vl"


def process(images):
    sizes = dict(patch_size=PATCH, temporal_patch_size=1, merge_size=MERGE, do_resize=False, return_tensors="pt")
    return dict(hf.PaddleOCRVLImageProcessor()(images, **sizes))


def test_tokens_stand_for_the_pixels_that_they_show():
    packed.check_places(blinkered(NAME), "image", process, [(1, 3, 5), (1, 4, 3)], MERGE * PATCH)


def test_encoder_values_stand_beside_what_is_made_of_them():
    cell = MERGE * PATCH
    images = [torch.randint(0, 200, (3, r * cell, c * cell), dtype=torch.uint8) for r, c in ((3, 2), (2, 4))]
    packed.check_rows_of_patches(blinkered(NAME), "image", process(images))


def test_encoder_flops():
    tower = families.shared(NAME, "eager").model.visual.vision_model
    packed.check_encoder_flops(NAME, "image", tower.embeddings.patch_embedding)


def test_what_methods_are_told_of_the_model():
    adapter = vtprune.adapter_for(families.shared(NAME))
    assert adapter.visual_token_ids == {"image": IMAGE} and adapter.position_axes == 3
    assert (adapter.shape.encoder_layers, adapter.shape.feature_layer, adapter.shape.has_cls) == (4, 3, False)
