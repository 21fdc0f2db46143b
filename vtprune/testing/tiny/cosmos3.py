# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Cosmos 3."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import MROPE, TEXT, VISION
from vtprune.testing.media import GRIDS, IMAGE, MERGE, PATCH, VIDEO, Item, Layout, collate_patches, lay_patches
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import CLIPS, IDS, STAMPED, VISION_3, mm_token_types


def _of_one_frame(lay: Callable) -> Callable:
    """Patches of one frame each, instead of two."""

    def make(model, shape, siblings, generator):
        item = lay(model, shape, siblings, generator)
        return Item(item.ids, item.pixels[:, : 3 * PATCH**2], item.shape)

    return make


FAMILIES = {
    "cosmos3_omni": Family(
        "Cosmos3OmniForConditionalGeneration",
        lambda **text: hf.Cosmos3OmniConfig(
            vision_config=VISION_3 | dict(deepstack_visual_indexes=[0, 1, 2]),
            text_config=TEXT | MROPE | dict(head_dim=8) | text,
            **IDS,
        ),
        STAMPED,
        mm_token_types,
        kindred=True,
    ),
    "cosmos3_edge": Family(
        "Cosmos3EdgeForConditionalGeneration",
        lambda **text: hf.Cosmos3EdgeConfig(
            vision_config=VISION | dict(patch_size=PATCH, num_patches=36, spatial_merge_size=MERGE),
            text_config=TEXT | MROPE | dict(head_dim=8) | text,
            projector_hidden_size=48,
            **IDS,
        ),
        {
            "image": Layout(
                tuple((1, *grid) for grid in GRIDS),
                _of_one_frame(lay_patches(IMAGE)),
                collate_patches("pixel_values", "image_grid_thw"),
            ),
            "video": Layout(
                CLIPS,
                _of_one_frame(lay_patches(VIDEO, stamped=True)),
                collate_patches("pixel_values_videos", "video_grid_thw"),
            ),
        },
        mm_token_types,
        kindred=True,
    ),
}
