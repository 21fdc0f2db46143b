# SPDX-License-Identifier: Apache-2.0
"""A tiny model of PaddleOCR-VL."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import MROPE, TEXT, VISION
from vtprune.testing.media import GRIDS, IMAGE, MERGE, PATCH, Layout, collate_patches, lay_patches
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import IDS, mm_token_types


def _lay_squares(model, shape, siblings, generator):
    """As in Qwen2-VL, with each patch as a square of one frame."""
    item = lay_patches(IMAGE)(model, shape, siblings, generator)
    return type(item)(item.ids, item.pixels[:, : 3 * PATCH**2].unflatten(1, (3, PATCH, PATCH)), item.shape)


FAMILIES = {
    "paddleocr_vl": Family(
        "PaddleOCRVLForConditionalGeneration",
        lambda **text: hf.PaddleOCRVLConfig(
            vision_config=VISION | dict(image_size=24, patch_size=PATCH, spatial_merge_size=MERGE),
            text_config=TEXT | MROPE | dict(head_dim=8) | text,
            **IDS,
        ),
        {
            "image": Layout(
                tuple((1, *grid) for grid in GRIDS), _lay_squares, collate_patches("pixel_values", "image_grid_thw")
            )
        },
        mm_token_types,
        kindred=True,
    ),
}
