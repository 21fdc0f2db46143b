# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf

import vtprune
from vtprune.testing import families
from vtprune.testing.media import IMAGE, MERGE, PATCH, VIDEO

from . import packed
from .checks import blinkered

NAME = "cosmos3_edge"
CELL = MERGE * PATCH

every_kind = pytest.mark.parametrize("kind", ["image", "video"])


def process(kind, media):
    sizes = dict(patch_size=PATCH, merge_size=MERGE, do_resize=False, return_tensors="pt")
    if kind == "image":
        return dict(hf.Cosmos3EdgeImageProcessor()(media, **sizes))
    return dict(hf.Cosmos3EdgeVideoProcessor()(media, do_sample_frames=False, **sizes))


@every_kind
def test_tokens_stand_for_the_pixels_that_they_show(kind):
    sizes = {"image": [(1, 3, 5), (1, 4, 3)], "video": [(3, 3, 5), (2, 4, 3)]}[kind]
    packed.check_places(blinkered(NAME), kind, lambda media: process(kind, media), sizes, CELL)


@every_kind
def test_encoder_values_stand_beside_what_is_made_of_them(kind):
    shots = (1, 1) if kind == "image" else (3, 2)
    media = [torch.randint(0, 200, (count, 3, 3 * CELL, 2 * CELL), dtype=torch.uint8) for count in shots]
    inputs = process(kind, [m[0] for m in media] if kind == "image" else media)
    packed.check_rows_of_patches(blinkered(NAME), kind, inputs)


@every_kind
def test_encoder_flops(kind):
    tower = families.shared(NAME, "eager").model.visual
    packed.check_encoder_flops(NAME, kind, tower.embeddings.patch_embedding)


@torch.no_grad()
def test_omni_is_a_qwen3_vl():
    qwen, omni = families.build("qwen3_vl"), families.build("cosmos3_omni")
    assert type(omni).__name__ == "Cosmos3OmniForConditionalGeneration"
    omni.load_state_dict(qwen.state_dict())
    inputs, logits = families.batch("qwen3_vl", qwen, media="mixed").inputs, []
    for model in (qwen, omni):
        with vtprune.prune(model, "fastv", keep_ratio=0.5) as session:
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits) and session.report.keep_ratio < 0.7


@pytest.mark.parametrize("name", ["cosmos3_edge", "cosmos3_omni"])
def test_what_methods_are_told_of_the_model(name):
    adapter = vtprune.adapter_for(families.shared(name))
    assert adapter.visual_token_ids == {"image": IMAGE, "video": VIDEO} and adapter.position_axes == 3
    assert (adapter.shape.encoder_layers, adapter.shape.feature_layer, adapter.shape.has_cls) == (4, 3, False)
