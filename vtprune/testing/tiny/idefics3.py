# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch.nn.functional import pad

from vtprune.testing.configs import VISION, llama
from vtprune.testing.media import (
    BREAK,
    GLOBAL,
    IMAGE,
    MERGE,
    NEWLINE,
    PAD,
    PATCH,
    ROW_COLUMN,
    TILE,
    Item,
    Layout,
    noise,
)
from vtprune.testing.tiny.family import Family


def lay_marked_tiles(model, shape, siblings, generator):
    """Tiles with text tokens between them, then the whole image. shape: rows, columns of tiles; (0, 0): not cut."""
    rows, columns = shape
    tokens = [IMAGE] * (TILE // PATCH // MERGE) ** 2
    row = [token for _ in range(columns) for token in (BREAK, ROW_COLUMN, *tokens)] + [NEWLINE]
    ids = [*row * rows, *[NEWLINE] * (rows > 0), BREAK, GLOBAL, *tokens, BREAK]
    pixels = noise(generator, rows * columns + 1, 3, TILE, TILE)
    if rows == 0:  # a wide image: padded below, and the mask says so
        pixels[:, :, 2 * TILE // 3 :] = 0
    return Item(ids, pixels)


def collate_marked_tiles(samples):
    most = max(sum(len(item.pixels) for item in items) for items in samples)
    none = torch.empty(0, 3, TILE, TILE)
    padded = [torch.cat([none, *(item.pixels for item in items)]) for items in samples]
    padded = torch.stack([pad(pixels, (0, 0, 0, 0, 0, 0, 0, most - len(pixels))) for pixels in padded])
    return {"pixel_values": padded, "pixel_attention_mask": (padded != 0).any(2).long()}


def _idefics(config: str) -> Callable:
    vision = VISION | dict(image_size=TILE, patch_size=PATCH)
    return lambda **text: getattr(hf, config)(
        vision_config=vision, text_config=llama(**text), image_token_id=IMAGE, scale_factor=MERGE, pad_token_id=PAD
    )


TILES = ((1, 2), (0, 0), (2, 1), (2, 2))
"""Rows and columns of tiles of the images of a batch."""
_LAYOUTS = {"image": Layout(TILES, lay_marked_tiles, collate_marked_tiles)}

FAMILIES = {
    "idefics3": Family("Idefics3ForConditionalGeneration", _idefics("Idefics3Config"), _LAYOUTS),
    "smolvlm": Family("SmolVLMForConditionalGeneration", _idefics("SmolVLMConfig"), _LAYOUTS),
}
