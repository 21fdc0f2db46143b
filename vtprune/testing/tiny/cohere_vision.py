# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Aya Vision and Command A Vision."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import TEXT, siglip
from vtprune.testing.media import (
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    MERGE,
    PATCH,
    ROW_COLUMN,
    START,
    TILE,
    Item,
    Layout,
    collate_tiles,
    noise,
)
from vtprune.testing.tiny.family import Family

_TOKENS = [IMAGE] * (TILE // PATCH // MERGE) ** 2


def _lay_numbered_tiles(model, tiles, siblings, generator):
    """A token with the tile's number before each tile, and another one before the thumbnail."""
    labels = [*[ROW_COLUMN] * (tiles - 1), GLOBAL]
    ids = [START, *(token for label in labels for token in (label, *_TOKENS)), END]
    return Item(ids, noise(generator, tiles, 3, TILE, TILE))


def _lay_broken_tiles(model, tiles, siblings, generator):
    """A line break behind each tile."""
    return Item([START, *[*_TOKENS, BREAK] * tiles, END], noise(generator, tiles, 3, TILE, TILE))


def _cohere2(**text):
    return hf.Cohere2Config(**TEXT | dict(sliding_window=512) | text)


def _layouts(make: Callable) -> dict[str, Layout]:
    return {"image": Layout((3, 1, 2, 4), make, collate_tiles)}


FAMILIES = {
    "aya_vision": Family(
        "AyaVisionForConditionalGeneration",
        lambda **text: hf.AyaVisionConfig(
            vision_config=siglip(TILE, PATCH),
            text_config=_cohere2(**text),
            image_token_index=IMAGE,
            downsample_factor=MERGE,
        ),
        _layouts(_lay_numbered_tiles),
    ),
    "cohere2_vision": Family(
        "Cohere2VisionForConditionalGeneration",
        lambda **text: hf.Cohere2VisionConfig(
            vision_config=siglip(TILE, PATCH),
            text_config=_cohere2(**text),
            image_token_id=IMAGE,
            downsample_factor=MERGE,
            alignment_intermediate_size=64,
        ),
        _layouts(_lay_broken_tiles),
        kindred=True,
    ),
}
