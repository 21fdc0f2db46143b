# SPDX-License-Identifier: Apache-2.0
"""Tiny models of families with the encoder of SAM."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import VISION, qwen2
from vtprune.testing.media import END, IMAGE, PATCH, START, Item, Layout, collate_tiles, noise
from vtprune.testing.tiny.family import Family

_SIDE = 64
SAM = VISION | dict(
    image_size=_SIDE,
    patch_size=PATCH,
    output_channels=16,
    window_size=5,  # 16 patches a side are no multiple of it
    global_attn_indexes=[1, 3],
    mlp_dim=48,
)


def _lay_tiles(model, tiles, siblings, generator):
    """Tiles and thumbnail, all in a row."""
    return Item([START, *[IMAGE] * (16 * tiles), END], noise(generator, tiles, 3, _SIDE, _SIDE))


FAMILIES = {
    "got_ocr2": Family(
        "GotOcr2ForConditionalGeneration",
        lambda **text: hf.GotOcr2Config(
            vision_config=hf.GotOcr2VisionConfig(**SAM),
            text_config=qwen2(**text),
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
        {"image": Layout((1, 2, 1, 3), _lay_tiles, collate_tiles)},
        kindred=True,
    ),
}
