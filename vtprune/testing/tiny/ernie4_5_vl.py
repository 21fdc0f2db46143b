# SPDX-License-Identifier: Apache-2.0
"""A tiny model of Ernie 4.5 VL."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor

from vtprune.testing.configs import TEXT, WIDTH
from vtprune.testing.media import (
    END,
    IMAGE,
    MERGE,
    PATCH,
    START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    Item,
    Layout,
    collate_patches,
    noise,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import CLIPS, IMAGES, mm_token_types

_MARKS = {IMAGE: (START, END), VIDEO: (VIDEO_START, VIDEO_END)}
_TOGETHER = 2
"""Frames in a token of a video."""


def _config(**text):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    experts = dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=2, moe_intermediate_size=[24, 16])
    return hf.Ernie4_5_VLMoeConfig(
        vision_config=dict(
            hidden_size=WIDTH,
            intermediate_size=48,
            depth=4,
            num_heads=4,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            temporal_merge_size=_TOGETHER,
        ),
        text_config=TEXT | dict(rope_parameters=rope) | experts | text,
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
        video_token_id=VIDEO,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


def _lay(placeholder: int) -> Callable:
    """Flattened patches. shape: rows and columns of tokens behind pairs of frames, or the one frame of an image."""

    def make(model, shape, siblings, generator):
        frames, rows, columns = shape
        begin, end = _MARKS[placeholder]
        together = _TOGETHER if placeholder == VIDEO else 1
        grid = (frames * together, rows * MERGE, columns * MERGE)
        pixels = noise(generator, grid[0] * grid[1] * grid[2], 3 * PATCH**2)
        return Item([begin, *[placeholder] * (frames * rows * columns), end], pixels, grid)

    return make


def types(ids: Tensor) -> dict[str, Tensor]:
    """Kinds of columns, for positions; and for experts, where the tokens around are of the kind."""
    kinds = mm_token_types(ids)["mm_token_type_ids"]
    images, videos = (torch.isin(ids, torch.tensor(_MARKS[placeholder])) for placeholder in (IMAGE, VIDEO))
    return {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": kinds + images.int() + 2 * videos.int()}


FAMILIES = {
    "ernie4_5_vl": Family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        _config,
        {
            "image": Layout(IMAGES.shapes, _lay(IMAGE), IMAGES.collate),
            "video": Layout(CLIPS, _lay(VIDEO), collate_patches("pixel_values_videos", "video_grid_thw")),
        },
        types,
        kindred=True,
    ),
}
