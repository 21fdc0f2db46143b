# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the Qwen-VL families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from vtprune.testing.configs import EXPERTS, MROPE, TEXT, WIDTH
from vtprune.testing.media import (
    END,
    GRIDS,
    IMAGE,
    MERGE,
    PATCH,
    START,
    VIDEO,
    Layout,
    collate_patches,
    flat,
    lay_patches,
)
from vtprune.testing.tiny.family import Family

VISION: dict[str, Any] = dict(patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2, depth=4, num_heads=4)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_VISION_2_5 = VISION | dict(hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH)
WINDOWS = _VISION_2_5 | dict(window_size=16, fullatt_block_indexes=[1, 3])
"""The vision config of Qwen2.5-VL. Windows of 2x2 merged tokens, so that the tower reorders them."""
VISION_3 = _VISION_2_5 | dict(num_position_embeddings=64)
"""The vision config of Qwen3-VL, DeepStack aside."""
LINEAR: dict[str, Any] = dict(
    layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    head_dim=16,
    rope_parameters=MROPE["rope_parameters"] | {"mrope_interleaved": True, "partial_rotary_factor": 0.5},
)
"""Fields of the text config of Qwen3.5."""

CLIPS = ((3, 3, 3), (2, 2, 5), (4, 3, 2), (5, 3, 3))
IMAGES = Layout(
    tuple((1, *grid) for grid in GRIDS), lay_patches(IMAGE), collate_patches("pixel_values", "image_grid_thw")
)
VIDEOS = Layout(CLIPS, lay_patches(VIDEO), collate_patches("pixel_values_videos", "video_grid_thw"))
STAMPED = {
    "image": IMAGES,
    "video": Layout(CLIPS, lay_patches(VIDEO, stamped=True), collate_patches("pixel_values_videos", "video_grid_thw")),
}


def collate_timed(samples):
    """Qwen2.5-VL: videos of different frame rates."""
    arguments = collate_patches("pixel_values_videos", "video_grid_thw")(samples)
    seconds = [0.5 + item.shape[0] / 2 for item in flat(samples)]
    return arguments | {"second_per_grid_ts": torch.tensor(seconds)}


def mm_token_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def _qwen3_vl(config: str, **text_fields) -> Callable:
    return lambda **text: getattr(hf, config)(
        vision_config=VISION_3 | dict(deepstack_visual_indexes=[0, 1, 2]),
        text_config=TEXT | MROPE | dict(head_dim=8) | text_fields | text,
        **IDS,
    )


def _qwen3_5(config: str, **text_fields) -> Callable:
    return lambda **text: getattr(hf, config)(
        vision_config=VISION_3, text_config=TEXT | LINEAR | text_fields | text, **IDS
    )


FAMILIES = {
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        lambda **text: hf.Qwen2VLConfig(
            vision_config=VISION | dict(embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2),
            text_config=TEXT | MROPE | text,
            **IDS,
        ),
        {"image": IMAGES, "video": VIDEOS},
        mm_token_types,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        lambda **text: hf.Qwen2_5_VLConfig(
            vision_config=WINDOWS | dict(tokens_per_second=2), text_config=TEXT | MROPE | text, **IDS
        ),
        {"image": IMAGES, "video": Layout(CLIPS, lay_patches(VIDEO), collate_timed)},
        mm_token_types,
    ),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", _qwen3_vl("Qwen3VLConfig"), STAMPED, mm_token_types),
    "qwen3_vl_moe": Family(  # one layer without experts
        "Qwen3VLMoeForConditionalGeneration",
        _qwen3_vl("Qwen3VLMoeConfig", **EXPERTS, mlp_only_layers=[2]),
        STAMPED,
        mm_token_types,
        kindred=True,
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration", _qwen3_5("Qwen3_5Config"), STAMPED, mm_token_types, carries_state=True
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForConditionalGeneration",
        _qwen3_5("Qwen3_5MoeConfig", **EXPERTS, shared_expert_intermediate_size=16),
        STAMPED,
        mm_token_types,
        carries_state=True,
        kindred=True,
    ),
}
