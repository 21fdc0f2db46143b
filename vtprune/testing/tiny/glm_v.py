# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the GLM-V families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import Tensor

from vtprune.testing.configs import MROPE, TEXT, WIDTH
from vtprune.testing.media import (
    END,
    IMAGE,
    MERGE,
    PATCH,
    START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    Item,
    Layout,
    collate_patches,
    noise,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.latent import INDEX, LATENT
from vtprune.testing.tiny.qwen_vl import CLIPS, IMAGES

_VISION: dict[str, Any] = dict(
    depth=4,
    hidden_size=WIDTH,
    num_heads=4,
    intermediate_size=48,
    out_hidden_size=WIDTH,
    image_size=24,
    patch_size=PATCH,
    spatial_merge_size=MERGE,
    temporal_patch_size=2,
)
_IDS = dict(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    image_start_token_id=START,
    image_end_token_id=END,
    video_start_token_id=VIDEO_START,
    video_end_token_id=VIDEO_END,
)
_ROPE = dict(rope_parameters=MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5})


def _lay_video(model, shape, siblings, generator):
    """Frames that are marked as images, a time stamp behind each. shape: frames, rows and columns of merged tokens."""
    frames, rows, columns = shape
    grid = (frames, rows * MERGE, columns * MERGE)
    frame = [START, *[IMAGE] * (rows * columns), END]
    ids = [VIDEO_START, *(token for f in range(frames) for token in (*frame, 30, 31 + f)), VIDEO_END]
    return Item(ids, noise(generator, grid[0] * grid[1] * grid[2], 3 * 2 * PATCH**2), grid)


def _mm_token_types(ids: Tensor) -> dict[str, Tensor]:
    in_video = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
    return {"mm_token_type_ids": (ids == IMAGE).int() * (1 + in_video.int())}


_LAYOUTS = {
    "image": IMAGES,
    "video": Layout(CLIPS, _lay_video, collate_patches("pixel_values_videos", "video_grid_thw")),
}


def _family(class_name: str, config: str, *, kindred: bool, **text_fields) -> Family:
    def make(**text) -> Callable:
        return getattr(hf, config)(vision_config=_VISION, text_config=TEXT | _ROPE | text_fields | text, **_IDS)

    return Family(class_name, make, _LAYOUTS, _mm_token_types, mixes_kinds=False, kindred=kindred)


def _glm5_next(**text) -> Callable:
    kinds = ["linear_attention", "linear_attention", "indexed_attention", "indexed_attention"] * 2
    index = dict(indexer_types=["full", "full", "full", "shared"] * 2, index_kpool=3, index_topk=12)
    linear = dict(linear_num_heads=4, linear_head_dim=8, hc_mult=2, layer_types=kinds)
    # Experts weigh no more than the shared one, or rounding errors would grow from layer to layer.
    experts = dict(mlp_layer_types=["dense"] + ["sparse"] * 7, routed_scaling_factor=1.0)
    layers = LATENT | INDEX | index | linear | experts | dict(qk_rope_head_dim=0)
    layers.pop("first_k_dense_replace")
    vision = _VISION | dict(projection_intermediate_size=40)
    return hf.Glm5NextConfig(vision_config=vision, text_config=layers | text, **_IDS)


FAMILIES = {
    "glm46v": _family(
        "Glm46VForConditionalGeneration",
        "Glm46VConfig",
        kindred=False,
        num_attention_heads=2,
        num_key_value_heads=1,
        model_type="glm4v_text",
    ),
    "glm4v_moe": _family(  # one layer without experts
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        kindred=True,
        head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "glm_ocr": _family("GlmOcrForConditionalGeneration", "GlmOcrConfig", kindred=True, head_dim=16),
    "glm5_next": Family(  # four pools of three columns, and the columns behind the last pool
        "Glm5NextForConditionalGeneration",
        _glm5_next,
        _LAYOUTS,
        _mm_token_types,
        carries_state=True,
        mixes_kinds=False,
        kindred=True,
    ),
}
