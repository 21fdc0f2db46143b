# SPDX-License-Identifier: Apache-2.0
"""Tiny models of LFM2-VL and LFM3-VL."""

from __future__ import annotations

import torch
import transformers as hf
from torch.nn.functional import pad

from vtprune.testing.configs import TEXT, VISION, WIDTH
from vtprune.testing.media import (
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    MERGE,
    PATCH,
    ROW_COLUMN,
    START,
    Item,
    Layout,
    flat,
    noise,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import IDS, STAMPED

_TILE = (3, 3)
_CUTS = (((1, 2), (2, 3)), ((0, 0), (4, 3)), ((2, 1), (3, 2)), ((2, 2), (2, 2)))
"""Of each image: rows and columns of its tiles, (0, 0) if it is not cut; those of the tokens of the whole."""


def _lay_tiles(model, shape, siblings, generator):
    """Tiles, then the whole image. shape: see `_CUTS`."""
    (down, across), whole = shape
    ids, grids = [START], [_TILE] * (down * across) + [whole]
    for tile in range(down * across):
        ids += [(BREAK, ROW_COLUMN)[tile % 2], *[IMAGE] * (_TILE[0] * _TILE[1])]
    ids += [*[GLOBAL] * (down > 0), *[IMAGE] * (whole[0] * whole[1]), END]
    sizes = [side * MERGE for grid in grids for side in grid]
    patches = sum(rows * columns for rows, columns in grids) * MERGE**2
    return Item(ids, noise(generator, patches, 3 * PATCH**2), tuple(sizes))


def _collate_tiles(samples):
    items = flat(samples)
    sizes = torch.tensor([side for item in items for side in item.shape]).view(-1, 2)
    counts = sizes.prod(1)
    tiles = torch.cat([item.pixels for item in items]).split(counts.tolist())
    padded = torch.stack([pad(tile, (0, 0, 0, int(counts.max()) - len(tile))) for tile in tiles])
    real = torch.arange(padded.shape[1]) < counts[:, None]
    return {"pixel_values": padded, "spatial_shapes": sizes, "pixel_attention_mask": real.long()}


_CONV = dict(layer_types=["conv", "conv", "conv", "full_attention"] * 2, conv_L_cache=3)
_SLIDING = dict(
    layer_types=["conv", "conv", "full_attention", "conv", "sliding_attention", "conv", "conv", "full_attention"],
    conv_L_cache=5,
    sliding_window=512,
    head_dim=8,
)

FAMILIES = {
    "lfm2_vl": Family(
        "Lfm2VlForConditionalGeneration",
        lambda **text: hf.Lfm2VlConfig(
            vision_config=hf.Siglip2VisionConfig(**VISION, patch_size=PATCH, num_patches=64, vision_use_head=False),
            text_config=hf.Lfm2Config(**TEXT | _CONV | dict(block_multiple_of=8) | text),
            image_token_id=IMAGE,
            projector_hidden_size=WIDTH,
            tie_word_embeddings=False,
        ),
        {"image": Layout(_CUTS, _lay_tiles, _collate_tiles)},
        carries_state=True,
        kindred=True,
    ),
    "lfm3_vl": Family(  # its encoder ends with a convolution
        "Lfm3VlForConditionalGeneration",
        lambda **text: hf.Lfm3VlConfig(
            vision_config=VISION
            | dict(
                patch_size=PATCH,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention", "full_attention", "conv"],
            ),
            text_config=TEXT | _SLIDING | text,
            projector_hidden_size=WIDTH,
            tie_word_embeddings=False,
            **IDS,
        ),
        STAMPED,
        carries_state=True,
        kindred=True,
    ),
}
