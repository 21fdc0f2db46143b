# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    ViTConfig,
)

import vtprune
from vtprune.errors import UnsupportedModelError

TEXT = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=32)
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)


def llava(vision, **options) -> LlavaForConditionalGeneration:
    config = LlavaConfig(vision_config=vision, text_config=TEXT, image_token_index=31, **options)
    return LlavaForConditionalGeneration(config).eval()


def clip():
    return CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)


def siglip():
    return SiglipVisionConfig(**SMALL, image_size=32, patch_size=8, vision_use_head=False)


@pytest.mark.parametrize("layer", [-1, -2, 2, [-2, -3], [1, -1]])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", [clip, siglip])
def test_facts_agree_with_what_the_model_computes(tower, strategy, layer):
    model = llava(tower(), vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    adapter = vtprune.adapter_for(model)
    with torch.no_grad():
        features = model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output[0]
    medium = adapter.media("image", {}, [features])[0]
    assert len(medium) == len(features) and medium.lines is None
    (grid,) = medium.grids
    assert adapter.image_grid == grid
    if tower is siglip and strategy == "default":
        assert grid is None  # a patch is missing
    else:
        assert len(grid) == len(features) and grid.prefix == (tower is clip and strategy == "full")
    assert adapter.shape.has_cls == (tower is clip)
    assert adapter.shape.decoder_layers == 3 and adapter.shape.encoder_layers == 4
    deepest = {-1: 3, -2: 2, 2: 1}.get(layer) if isinstance(layer, int) else {-2: 2, 1: 3}[layer[0]]
    assert adapter.shape.feature_layer == deepest
    assert len(adapter.encoder_layers()) == 4 and adapter.visual_token_ids == {"image": 31}


def test_other_towers_and_models_are_refused_by_name():
    vit = ViTConfig(**SMALL, image_size=32, patch_size=8)
    with pytest.raises(UnsupportedModelError, match="'vit'; supported: clip_vision_model"):
        vtprune.adapter_for(llava(vit))
    with pytest.raises(UnsupportedModelError, match="a LlamaForCausalLM cannot be pruned: it is a language model"):
        vtprune.adapter_for(LlamaForCausalLM(TEXT))
