# SPDX-License-Identifier: Apache-2.0
"""A tiny model of Step 3.7."""

from __future__ import annotations

import torch
import transformers as hf

from vtprune.testing.configs import TEXT, VISION
from vtprune.testing.media import BREAK, END, GLOBAL, IMAGE, NEWLINE, PATCH, START, Item, Layout, flat, noise
from vtprune.testing.tiny.family import Family

WHOLE, TILE = 48, 32
"""Sides, in pixels, of the whole image and of its tiles."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def _lay(model, shape, siblings, generator):
    """Tiles, and the whole image in another size. shape: rows and columns of tiles."""
    rows, columns = shape
    tile = [BREAK, *[IMAGE] * (TILE // PATCH // 4) ** 2, GLOBAL]
    tiles = [token for row in range(rows) for token in (*tile * columns, *[NEWLINE] * (row < rows - 1))]
    whole = [START, *[IMAGE] * (WHOLE // PATCH // 4) ** 2, END]
    return Item([*tiles, *whole], noise(generator, rows * columns + 1, 3, WHOLE, WHOLE))


def _collate(samples):
    """Of the pixels of an item the last are those of the whole image, and of the others a corner those of a tile."""
    items = flat(samples)
    tiles = torch.cat([item.pixels[:-1, :, :TILE, :TILE] for item in items])
    return {
        "pixel_values": torch.stack([item.pixels[-1] for item in items]),
        "num_local_patches": torch.tensor([len(item.pixels) - 1 for item in items]),
    } | ({"pixel_values_local": tiles} if len(tiles) else {})


FAMILIES = {
    "step3p7": Family(
        "Step3p7ForConditionalGeneration",
        lambda **text: hf.Step3p7Config(
            vision_config=VISION | dict(image_size=WHOLE, patch_size=PATCH, mlp_ratio=1.5),
            text_config=TEXT
            | dict(
                head_dim=8,
                num_sliding_attention_heads=2,
                sliding_window=512,
                layer_types=["full_attention", "sliding_attention"] * 4,
                mlp_layer_types=["dense"] + ["sparse"] * 7,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                share_expert_dim=24,
                rope_parameters={
                    "full_attention": _ROPE | {"partial_rotary_factor": 0.5},
                    "sliding_attention": _ROPE,
                },
            )
            | text,
            image_token_id=IMAGE,
        ),
        {"image": Layout(((1, 2), (0, 0), (2, 1), (2, 2)), _lay, _collate)},
        kindred=True,
    ),
}
