# SPDX-License-Identifier: Apache-2.0
"""Tiny models of HunYuan-VL."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import TEXT, VISION
from vtprune.testing.media import END, GRIDS, IMAGE, MERGE, PATCH, START, Item, Layout, collate_patches, noise
from vtprune.testing.tiny.family import Family

# The last axis counts the images of all prompts together, and so tells a batch from single prompts. Here it has no part
# in the rotation.
_AXES = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1, 0]}, head_dim=8)


def _lay_rows(model, shape, siblings, generator):
    """A token in front, one after each row, and one behind. shape: rows and columns of merged tokens."""
    rows, columns = shape
    grid = (1, rows * MERGE, columns * MERGE)
    ids = [START, *[IMAGE] * (rows * (columns + 1) + 2), END]
    return Item(ids, noise(generator, grid[1] * grid[2], 3 * PATCH**2), grid)


FAMILIES = {
    "hunyuan_vl": Family(
        "HunYuanVLForConditionalGeneration",
        lambda **text: hf.HunYuanVLConfig(
            vision_config=VISION | dict(patch_size=PATCH, spatial_merge_size=MERGE, max_image_size=8 * PATCH),
            text_config=TEXT | _AXES | text,
            image_token_id=IMAGE,
        ),
        {"image": Layout(GRIDS, _lay_rows, collate_patches("pixel_values", "image_grid_thw"))},
        lambda ids: {"mm_token_type_ids": (ids == IMAGE).int()},
        kindred=True,
    ),
}
