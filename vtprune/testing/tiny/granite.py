# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the Granite families, whose visual tokens get features in several decoder layers."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import TEXT, VISION, WIDTH
from vtprune.testing.media import IMAGE, MERGE, PAD, PATCH, TILE, Item, Layout, collate_anyres, noise
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.idefics3 import TILES, collate_marked_tiles, lay_marked_tiles
from vtprune.transformers_private import llava_next_crops

_MULTIPLIERS = dict(
    embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=0.5, rms_norm_eps=1e-5
)
"""Fields of the text configs, none of which is 1."""


def _lay_anyres(model, shape, siblings, generator):
    """A base tile, then the tiles of the mosaic. shape: height, width."""
    size = model.config.vision_config.image_size
    pixels = noise(generator, llava_next_crops(list(shape), model.config.image_grid_pinpoints, size), 3, size, size)
    output = model.get_image_features(**collate_anyres([[Item([], pixels, shape)]]), return_dict=True)
    return Item([IMAGE] * len(output.deepstack_features[0][1][0]), pixels, shape)


def _collate_marked_tiles(samples):
    """The mask is of tiles, not of pixels."""
    tiles = collate_marked_tiles(samples)["pixel_values"]
    return {"pixel_values": tiles, "pixel_attention_mask": (tiles != 0).flatten(2).any(2)}


FAMILIES = {
    "granite4_vision": Family(  # two windows of queries a side
        "Granite4VisionForConditionalGeneration",
        lambda **text: hf.Granite4VisionConfig(
            # queries have heads of 64
            vision_config=VISION
            | dict(
                model_type="siglip_vision_model", image_size=32, patch_size=4, hidden_size=64, vision_use_head=False
            ),
            text_config=TEXT | _MULTIPLIERS | text,
            qformer_config=dict(model_type="blip_2_qformer", num_hidden_layers=1, intermediate_size=48),
            image_token_index=IMAGE,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            vision_feature_select_strategy="full",
            downsample_rate="2/4",
            deepstack_layer_map=[[-2, 3], [-3, 1], [-1, 0]],
            spatial_target_layers=[2, 4, 5, 6],
        ),
        {"image": Layout(((32, 44), (40, 32), (60, 40), (64, 64)), _lay_anyres, collate_anyres)},
        since=(5, 24),
    ),
    "granite_docling": Family(
        "GraniteDoclingForConditionalGeneration",
        lambda **text: hf.GraniteDoclingConfig(
            vision_config=VISION
            | dict(image_size=TILE, patch_size=PATCH, out_hidden_size=WIDTH, scale_factor=MERGE)
            | dict(deepstack_visual_indexes=[0, 1, 2]),
            text_config=TEXT | _MULTIPLIERS | text,
            image_token_id=IMAGE,
            pad_token_id=PAD,
        ),
        {"image": Layout(TILES, lay_marked_tiles, _collate_marked_tiles)},
        kindred=True,
    ),
}
