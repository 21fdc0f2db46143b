# SPDX-License-Identifier: Apache-2.0
"""Tiny models of MiniCPM-V 4.6, MiniCPM-V 4.7 and MiniCPM-OCR."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf

from vtprune.testing.configs import TEXT, VISION
from vtprune.testing.media import (
    AUDIO,
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    NEWLINE,
    PATCH,
    ROW_COLUMN,
    START,
    VIDEO,
    Item,
    Layout,
    flat,
    noise,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import LINEAR, mm_token_types

_NUMBER = 20
"""The word for 0."""
_SLICES = (((2, 3), (1, 2), (2, 2)), ((3, 3), (0, 0), ()), ((4, 2), (2, 1), (2, 3)), ((2, 2), (2, 2), (1, 2)))
"""Of each image: rows and columns of its tokens, of its slices, and of the tokens of a slice."""
_FRAMES = (5, 4, 6, 7)


def _side(model) -> int:
    return 4 if model.config.downsample_mode == "16x" else 2


def _pixels(sizes: list[tuple[int, int]], generator) -> torch.Tensor:
    return noise(generator, 3, PATCH, PATCH * sum(rows * columns for rows, columns in sizes))


def _lay_slices(model, shape, siblings, generator):
    """The whole image, and then its slices row by row. shape: see `_SLICES`."""
    (rows, columns), (down, across), slice_ = shape
    side = _side(model)
    ids = [GLOBAL, _NUMBER, AUDIO, START, *[IMAGE] * (rows * columns), END]
    sizes = [(rows * side, columns * side)]
    if down:
        one = [BREAK, *[IMAGE] * (slice_[0] * slice_[1]), ROW_COLUMN]
        ids += ([*one * across, NEWLINE] * down)[:-1]
        sizes += [(slice_[0] * side, slice_[1] * side)] * (down * across)
    return Item(ids, _pixels(sizes, generator), tuple(side for size in sizes for side in size))


def _lay_clip(model, shape, siblings, generator):
    """Frames side by side. shape: their number."""
    side = _side(model)
    ids = [START, *[VIDEO] * 3, END] * shape
    sizes = [(side, 3 * side)] * shape
    return Item(ids, _pixels(sizes, generator), tuple(side for size in sizes for side in size))


def _collate(pixels: str, sizes: str) -> Callable:
    return lambda samples: {
        pixels: torch.cat([item.pixels for item in flat(samples)], -1)[None],
        sizes: torch.tensor([side for item in flat(samples) for side in item.shape], dtype=torch.int32).view(-1, 2),
    }


_LAYOUTS = {
    "image": Layout(_SLICES, _lay_slices, _collate("pixel_values", "target_sizes")),
    "video": Layout(_FRAMES, _lay_clip, _collate("pixel_values_videos", "target_sizes_videos")),
}


def _minicpm(config: str, **fields) -> Callable:
    return lambda **text: getattr(hf, config)(
        vision_config=VISION | dict(image_size=8 * PATCH, patch_size=PATCH),
        text_config=hf.Qwen3_5TextConfig(**TEXT | LINEAR | text),
        insert_layer_id=1,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **fields,
    )


_CANVAS = dict(
    image_start_id=START, image_end_id=END, slice_start_id=BREAK, slice_end_id=ROW_COLUMN, newline_id=NEWLINE
)

FAMILIES = {
    "minicpmv4_6": Family(  # at first its encoder could not take slices of different sizes
        "MiniCPMV4_6ForConditionalGeneration",
        _minicpm("MiniCPMV4_6Config"),
        _LAYOUTS,
        carries_state=True,
        since=(5, 24),
    ),
    "minicpmv4_7": Family(
        "MiniCPMV4_7ForConditionalGeneration",
        _minicpm("MiniCPMV4_7Config", **_CANVAS),
        _LAYOUTS,
        mm_token_types,
        carries_state=True,
        kindred=True,
    ),
    "minicpm_ocr": Family(  # its encoder merges nothing between its layers
        "MiniCPMOcrForConditionalGeneration",
        _minicpm("MiniCPMOcrConfig"),
        _LAYOUTS,
        carries_state=True,
        kindred=True,
    ),
}
