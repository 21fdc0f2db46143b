# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Gemma 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad

from vtprune.testing.configs import TEXT, VISION, WIDTH
from vtprune.testing.media import (
    AUDIO_END,
    AUDIO_START,
    END,
    GRIDS,
    IMAGE,
    PATCH,
    START,
    VIDEO,
    VOCABULARY,
    Item,
    Layout,
    flat,
    noise,
)
from vtprune.testing.tiny.family import Family

MOST = 40
"""Visual tokens of an image that fills its padded patches."""

_VISION = VISION | dict(
    num_key_value_heads=4, head_dim=8, patch_size=PATCH, pooling_kernel_size=2, position_embedding_size=32
)
_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
_TEXT = TEXT | dict(
    head_dim=8,
    global_head_dim=16,
    sliding_window=512,
    layer_types=[*_KINDS, "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", _KINDS[2]],
    vocab_size_per_layer_input=TEXT["vocab_size"],
    hidden_size_per_layer_input=0,
)
SMALL: dict[str, Any] = dict(
    hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True, final_logit_softcapping=8.0
)
"""Fields of the text config of E2B and E4B."""
LARGE: dict[str, Any] = dict(use_bidirectional_attention="vision", attention_k_eq_v=True, num_global_key_value_heads=1)
"""Fields of the text config of the others."""
IDS = dict(
    boi_token_id=START,
    eoi_token_id=END,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    boa_token_id=AUDIO_START,
    audio_token_id=VOCABULARY,  # never generated: the model would embed it as padding
    eoa_token_index=AUDIO_END,
)


def positions_of(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2): column and row of each."""
    return torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), -1).reshape(-1, 2)


def lay_image(model, shape, siblings, generator):
    """shape: rows, columns of visual tokens."""
    side = model.config.vision_config.pooling_kernel_size
    rows, columns = shape
    pixels = noise(generator, rows * columns * side**2, 3 * PATCH**2)
    return Item([START, *[IMAGE] * (rows * columns), END], pixels, (1, rows * side, columns * side))


def lay_video(model, shape, siblings, generator):
    """A time stamp before each frame. shape: frames, rows and columns of visual tokens."""
    side = model.config.vision_config.pooling_kernel_size
    frames, rows, columns = shape
    pixels = noise(generator, frames * rows * columns * side**2, 3 * PATCH**2)
    frame = [START, *[VIDEO] * (rows * columns), END]
    ids = [token for f in range(frames) for token in (30, 31 + f, *frame)]
    return Item(ids, pixels, (frames, rows * side, columns * side))


def collate(pixels: str, positions: str, most: int) -> Callable:
    """Patches of each image or frame, padded to `most`, and where they stand."""

    def collated(samples):
        patches, places = [], []
        for item in flat(samples):
            frames, rows, columns = item.shape
            missing = most - rows * columns
            patches += [pad(frame, (0, 0, 0, missing)) for frame in item.pixels.chunk(frames)]
            places += [pad(positions_of(rows, columns), (0, 0, 0, missing), value=-1)] * frames
        arguments = {pixels: torch.stack(patches), positions: torch.stack(places)}
        if pixels == "pixel_values_videos":
            arguments["num_frames_per_video"] = torch.tensor([item.shape[0] for item in flat(samples)])
        return arguments

    return collated


CLIPS = ((3, 3, 3), (2, 2, 5), (4, 3, 2), (5, 3, 3))
_LAYOUTS = {
    "image": Layout(GRIDS, lay_image, collate("pixel_values", "image_position_ids", 4 * MOST)),
    "video": Layout(CLIPS, lay_video, collate("pixel_values_videos", "video_position_ids", 4 * 12)),
}


def types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _config(**fields) -> Callable:
    return lambda **text: hf.Gemma4Config(
        vision_config=hf.Gemma4VisionConfig(**_VISION),
        text_config=hf.Gemma4TextConfig(**_TEXT | fields | text),
        audio_config=None,
        **IDS,
    )


def scale_queries(model) -> None:
    """Weights of norms that bring scores to a size of 1, which nothing else does in Gemma 3n and Gemma 4."""
    for module in model.modules():
        if hasattr(module, "q_norm"):
            module.q_norm.weight.data *= module.head_dim**-0.5


_EXPERTS = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)


def _unified(**text):
    # The projection ends at the width of the language model.
    vision = dict(
        patch_size=PATCH, pooling_kernel_size=1, mm_embed_dim=WIDTH, mm_posemb_size=32, output_proj_dims=WIDTH
    )
    fields = {key: value for key, value in _TEXT.items() if "per_layer" not in key}
    return hf.Gemma4UnifiedConfig(
        vision_config=vision,
        text_config=hf.Gemma4UnifiedTextConfig(**fields | text),
        audio_config=None,
        **IDS,
    )


_MORE: dict[str, Any] = dict(token_types=types, mend=scale_queries, since=(5, 24))

FAMILIES = {
    "gemma4": Family("Gemma4ForConditionalGeneration", _config(**SMALL), _LAYOUTS, **_MORE),
    "gemma4_31b": Family("Gemma4ForConditionalGeneration", _config(**LARGE), _LAYOUTS, **_MORE, kindred=True),
    "gemma4_experts": Family(
        "Gemma4ForConditionalGeneration", _config(**LARGE, **_EXPERTS), _LAYOUTS, **_MORE, kindred=True
    ),
    "gemma4_unified": Family("Gemma4UnifiedForConditionalGeneration", _unified, _LAYOUTS, **_MORE, kindred=True),
}
