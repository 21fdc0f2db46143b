# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the Muse families."""

from __future__ import annotations

from typing import Any

import transformers as hf

from vtprune.testing.configs import EXPERTS, TEXT, VISION, WIDTH
from vtprune.testing.media import (
    AUDIO,
    IMAGE,
    MERGE,
    NEWLINE,
    PATCH,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    Item,
    Layout,
    collate_patches,
    noise,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import CLIPS, IMAGES

_VISION: dict[str, Any] = VISION | dict(patch_size=PATCH, merge_size=MERGE, pos_emb_height=4, pos_emb_width=4)
"""Windows of 2x2 merged tokens, so that the tower reorders the patches."""
_TEXT: dict[str, Any] = TEXT | dict(
    head_dim=8, sliding_window=512, qk_scale_factor=1.5, final_logit_softcapping=5.0, output_multiplier=0.5
)
_PROJECTOR = dict(out_hidden_size=MERGE**2 * WIDTH, projector_hidden_size=WIDTH)
_EXPERTS = EXPERTS | dict(
    num_local_experts=EXPERTS["num_experts"],
    moe_hidden_size=24,
    mlp_layer_types=["sparse", "sparse", "dense", "sparse"] * 2,
)
_AUDIO = dict(patch_sizes=[4, 2], hidden_sizes=[16, WIDTH], depths=[1, 1], num_hidden_layers=2, out_hidden_size=WIDTH)


def _lay_video(model, shape, siblings, generator):
    """A time stamp before each grid, a separator between grids. shape: frames, rows and columns of merged tokens."""
    frames, rows, columns = shape
    grid = (frames, rows * MERGE, columns * MERGE)
    marks = [VIDEO_START, *[NEWLINE] * (frames - 1)]
    tokens = [VIDEO] * (rows * columns)
    ids = [token for frame, mark in enumerate(marks) for token in (mark, 30, 31 + frame, *tokens)]
    return Item([*ids, VIDEO_END], noise(generator, grid[0] * grid[1] * grid[2], 3 * 2 * PATCH**2), grid)


_LAYOUTS = {
    "image": IMAGES,
    "video": Layout(CLIPS, _lay_video, collate_patches("pixel_values_videos", "video_grid_thw")),
}

FAMILIES = {
    "muse_glimmer": Family(
        "MuseGlimmerForConditionalGeneration",
        lambda **text: hf.MuseGlimmerConfig(
            vision_config=_VISION, text_config=_TEXT | text, image_token_id=IMAGE, video_token_id=VIDEO, **_PROJECTOR
        ),
        _LAYOUTS,
        kindred=True,
    ),
    "muse_spark": Family(
        "MuseSparkForConditionalGeneration",
        lambda **text: hf.MuseSparkConfig(
            vision_config=_VISION,
            text_config=_TEXT | _EXPERTS | text,
            audio_config=_AUDIO,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            **_PROJECTOR,
        ),
        _LAYOUTS,
        kindred=True,
    ),
}
