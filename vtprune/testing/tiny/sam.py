# SPDX-License-Identifier: Apache-2.0
"""Tiny models of families with the encoder of SAM."""

from __future__ import annotations

import torch
import transformers as hf

from vtprune.testing.configs import TEXT, VISION, WIDTH, qwen2
from vtprune.testing.media import END, IMAGE, PATCH, START, Item, Layout, collate_tiles, flat, noise
from vtprune.testing.tiny.family import Family

_SIDE = 64
_EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=2,
    moe_intermediate_size=16,
    mlp_layer_types=["dense", *["sparse"] * 7],
)
SAM = VISION | dict(
    image_size=_SIDE,
    patch_size=PATCH,
    output_channels=16,
    window_size=5,  # 16 patches a side are no multiple of it
    global_attn_indexes=[1, 3],
    mlp_dim=48,
)


def _lay_tiles(model, tiles, siblings, generator):
    """Tiles and thumbnail, all in a row."""
    return Item([START, *[IMAGE] * (16 * tiles), END], noise(generator, tiles, 3, _SIDE, _SIDE))


def _lay_views(model, tiles, siblings, generator):
    """Tiles, then the whole view, then a separator. Each has 144 tokens, whatever its size."""
    return Item([IMAGE] * (144 * (tiles + 1) + 1), noise(generator, tiles + 1, 3, _SIDE, _SIDE), (tiles,))


def _collate_views(samples):
    items = flat(samples)
    arguments = {
        "pixel_values": torch.stack([item.pixels[0] for item in items]),
        "num_local_patches": torch.tensor([item.shape[0] for item in items]),
    }
    tiles = torch.cat([item.pixels[1:, :, : _SIDE // 2, : _SIDE // 2] for item in items])
    return arguments | ({"pixel_values_local": tiles} if len(tiles) else {})


def _lay_mosaic(model, shape, siblings, generator):
    """A mosaic of tiles, then the whole view, with a newline behind every row, then a separator. shape: columns and
    rows of tiles, 0 for an image without."""
    columns, rows = shape
    tokens = rows * 2 * (columns * 2 + 1) + 4 * 5 + 1
    return Item([IMAGE] * tokens, noise(generator, columns * rows + 1, 3, _SIDE, _SIDE), (columns * rows, *shape))


def _collate_mosaics(samples):
    arguments, grids = _collate_views(samples), [list(item.shape[1:]) for item in flat(samples)]
    return arguments | {"num_local_patches": arguments["num_local_patches"].tolist(), "patches_grid": grids}


FAMILIES = {
    "got_ocr2": Family(
        "GotOcr2ForConditionalGeneration",
        lambda **text: hf.GotOcr2Config(
            vision_config=hf.GotOcr2VisionConfig(**SAM),
            text_config=qwen2(**text),
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
        {"image": Layout((1, 2, 1, 3), _lay_tiles, collate_tiles)},
        kindred=True,
    ),
    "deepseek_ocr2": Family(
        "DeepseekOcr2ForConditionalGeneration",
        lambda **text: hf.DeepseekOcr2Config(
            vision_config=dict(
                sam_config=SAM | dict(downsample_channels=[24, WIDTH]),
                encoder_config=VISION | dict(num_key_value_heads=2),
            ),
            text_config=TEXT | _EXPERTS | text,
            image_token_id=IMAGE,
        ),
        {"image": Layout((0, 1, 0, 2), _lay_views, _collate_views)},
        kindred=True,
    ),
    "unlimited_ocr": Family(
        "UnlimitedOcrForConditionalGeneration",
        lambda **text: hf.UnlimitedOcrConfig(
            vision_config=dict(
                sam_config=SAM | dict(downsample_channels=[24, WIDTH]),
                encoder_config=VISION | dict(image_size=_SIDE, patch_size=4 * PATCH),
            ),
            text_config=TEXT | _EXPERTS | dict(num_key_value_heads=4) | text,
            image_token_id=IMAGE,
        ),
        {"image": Layout(((0, 0), (2, 1), (0, 0), (1, 2)), _lay_mosaic, _collate_mosaics)},
        carries_state=True,
        kindred=True,
    ),
}
