# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Ovis 2."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import VISION, WIDTH, qwen2
from vtprune.testing.media import (
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    MERGE,
    NEWLINE,
    PATCH,
    START,
    TILE,
    VOCABULARY,
    Item,
    Layout,
    collate_tiles,
    noise,
)
from vtprune.testing.tiny.family import Family

_INDICATORS = [START, GLOBAL, BREAK, NEWLINE, END]
"""Before the whole image, behind it, between tiles, between their rows, behind all."""


def _lay_indicated_tiles(model, shape, siblings, generator):
    """The whole image, then its tiles. shape: rows, columns of tiles; (1, 1): not cut."""
    rows, columns = shape
    tokens = [IMAGE] * (TILE // PATCH // MERGE) ** 2
    row = [token for _ in range(columns - 1) for token in (*tokens, BREAK)] + tokens
    cut = rows * columns > 1
    tiles = [token for _ in range(rows - 1) for token in (*row, NEWLINE)] + row if cut else []
    pixels = noise(generator, 1 + rows * columns * cut, 3, TILE, TILE)
    return Item([START, *tokens, GLOBAL, *tiles, END], pixels)


def _config(**text):
    return hf.Ovis2Config(
        vision_config=hf.Ovis2VisionConfig(
            **VISION,
            image_size=TILE,
            patch_size=PATCH,
            hidden_stride=MERGE,
            vocab_size=24 + len(_INDICATORS),
            num_visual_indicator_tokens=len(_INDICATORS),
        ),
        text_config=qwen2(**text),
        image_token_id=IMAGE,
        visual_indicator_token_ids=_INDICATORS,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )


_LAYOUTS = {"image": Layout(((1, 2), (1, 1), (2, 1), (2, 2)), _lay_indicated_tiles, collate_tiles)}

FAMILIES = {"ovis2": Family("Ovis2ForConditionalGeneration", _config, _LAYOUTS, kindred=True)}
