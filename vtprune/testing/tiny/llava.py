# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the LLaVA families."""

from __future__ import annotations

import functools

import torch
import transformers as hf

from vtprune.testing.configs import clip, llama, mistral, pixtral, qwen2, siglip
from vtprune.testing.media import (
    GRIDS,
    IMAGE,
    TILE,
    VIDEO,
    Layout,
    collate_anyres,
    collate_rows,
    lay_anyres,
    lay_frames,
    lay_rows,
    lay_square,
    stack,
)
from vtprune.testing.tiny.family import Family

_PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
_SIDE_4 = [[32, 64], [64, 32], [64, 64]]
_SIZES = ((TILE, 32), (32, TILE), (46, 30), (48, 48))
_SIZES_4 = ((32, 44), (40, 32), (60, 40), (64, 64))


def _collate_onevision(samples):
    return collate_anyres(samples) | {"batch_num_images": torch.tensor([len(items) for items in samples if items])}


def _clips(frames: int, tokens: int) -> Layout:
    return Layout(((frames, tokens),) * 4, lay_frames, stack("pixel_values_videos"))


def _one_grid(tokens: int) -> Layout:
    return Layout((tokens,) * 4, lay_square(), stack("pixel_values"))


FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        lambda **text: hf.LlavaConfig(vision_config=clip(42, 7), text_config=llama(**text), image_token_index=IMAGE),
        {"image": _one_grid(36)},
    ),
    "pixtral": Family(
        "LlavaForConditionalGeneration",
        lambda **text: hf.LlavaConfig(
            vision_config=pixtral(),
            text_config=mistral(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        {"image": Layout(GRIDS, lay_rows, collate_rows)},
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        lambda **text: hf.LlavaNextConfig(
            vision_config=clip(TILE, 8),
            text_config=llama(**text),
            image_token_index=IMAGE,
            image_grid_pinpoints=_PINPOINTS,
        ),
        {"image": Layout(_SIZES, lay_anyres, collate_anyres)},
    ),
    "llava_next_video": Family(  # an even number of patches a side: frames are pooled 2x2
        "LlavaNextVideoForConditionalGeneration",
        lambda **text: hf.LlavaNextVideoConfig(
            vision_config=clip(32, 8),
            text_config=llama(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_SIDE_4,
        ),
        {"image": Layout(_SIZES_4, lay_anyres, collate_anyres), "video": _clips(5, 20)},
    ),
    "llava_onevision": Family(  # 2x2 tiles exceed the maximum, so that their mosaic is resized
        "LlavaOnevisionForConditionalGeneration",
        lambda **text: hf.LlavaOnevisionConfig(
            vision_config=siglip(TILE, 8),
            text_config=qwen2(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        ),
        {
            "image": Layout(_SIZES, functools.partial(lay_anyres, only_alone=True), _collate_onevision),
            "video": _clips(6, 25),
        },
    ),
    "video_llava": Family(
        "VideoLlavaForConditionalGeneration",
        lambda **text: hf.VideoLlavaConfig(
            vision_config=clip(32, 8), text_config=llama(**text), image_token_index=IMAGE, video_token_index=VIDEO
        ),
        {"image": _one_grid(16), "video": _clips(3, 51)},
    ),
}
