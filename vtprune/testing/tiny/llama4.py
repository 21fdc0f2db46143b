# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Llama 4."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import TEXT, VISION, WIDTH
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
    Item,
    Layout,
    collate_tiles,
    noise,
)
from vtprune.testing.tiny.family import Family


def _lay_separated_tiles(model, shape, siblings, generator):
    """Tiles with separators between them, then the whole image. shape: rows, columns of tiles; (1, 1): not cut."""
    rows, columns = shape
    tokens = [IMAGE] * (TILE // PATCH // MERGE) ** 2
    row = [token for _ in range(columns - 1) for token in (*tokens, BREAK)] + [*tokens, NEWLINE]
    tiles = rows * columns if rows * columns > 1 else 0
    ids = [START, *(row * rows if tiles else ()), GLOBAL, *tokens, END]
    return Item(ids, noise(generator, tiles + 1, 3, TILE, TILE))


def _llama4() -> Callable:
    vision = VISION | dict(
        image_size=TILE,
        patch_size=PATCH,
        pixel_shuffle_ratio=1 / MERGE,
        projector_input_dim=WIDTH,
        projector_output_dim=WIDTH,
        vision_output_dim=WIDTH,
    )
    vision["intermediate_size"] = WIDTH * MERGE**2  # the MLP behind the pixel shuffle has this width, too
    text = TEXT | dict(
        head_dim=8,
        intermediate_size_mlp=40,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=512,
        floor_scale=512,
    )
    return lambda **fields: hf.Llama4Config(
        vision_config=hf.Llama4VisionConfig(**vision),
        text_config=hf.Llama4TextConfig(**text | fields),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _add_image_outputs(module, args, output):
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _mend(model):
    """The model of transformers 5.24.0 reads a field that its language model does not give, and so always fails."""
    model.language_model.register_forward_hook(_add_image_outputs)


_LAYOUTS = {"image": Layout(((1, 2), (1, 1), (2, 1), (2, 2)), _lay_separated_tiles, collate_tiles)}

FAMILIES = {"llama4": Family("Llama4ForConditionalGeneration", _llama4(), _LAYOUTS, mend=_mend)}
