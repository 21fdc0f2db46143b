# SPDX-License-Identifier: Apache-2.0
"""A tiny model of VideoLLaMA 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf

from vtprune.testing.configs import VISION, qwen2
from vtprune.testing.media import GRIDS, IMAGE, MERGE, PATCH, VIDEO, Item, Layout, collate_patches, flat, noise
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import CLIPS


def _lay(placeholder: int, side: int) -> Callable:
    """side: patches in a row of what becomes a token. Frames of a video have a comma and a time stamp between them."""

    def make(model, shape, siblings, generator):
        frames, rows, columns = shape
        grid = (frames, rows * side, columns * side)
        ids: list[int] = []
        for frame in range(frames):
            stamp = [30, 31 + frame, 29] if placeholder == VIDEO else []
            ids += [*([28] if frame else []), *stamp, *[placeholder] * (rows * columns)]
        return Item(ids, noise(generator, grid[0] * grid[1] * grid[2], 3 * PATCH**2), grid)

    return make


def _collate(kind: str, pixels: str, side: int) -> Callable:
    packed = collate_patches(pixels, f"{kind}_grid_thw")
    return lambda samples: packed(samples) | {f"{kind}_merge_sizes": torch.tensor([side] * len(flat(samples)))}


FAMILIES = {
    "video_llama3": Family(
        "VideoLlama3ForConditionalGeneration",
        lambda **text: hf.VideoLlama3Config(
            vision_config=VISION | dict(patch_size=PATCH),
            text_config=qwen2(**text),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        {
            "image": Layout(tuple((1, *grid) for grid in GRIDS), _lay(IMAGE, 1), _collate("image", "pixel_values", 1)),
            "video": Layout(CLIPS, _lay(VIDEO, MERGE), _collate("video", "pixel_values_videos", MERGE)),
        },
        kindred=True,
    ),
}
