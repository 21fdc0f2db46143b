# SPDX-License-Identifier: Apache-2.0
"""Tiny models of families whose language models have latent attention (MLA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from vtprune.testing.configs import TEXT, VISION, WIDTH, YARN, pixtral
from vtprune.testing.media import (
    AUDIO,
    END,
    GRIDS,
    IMAGE,
    MERGE,
    NEWLINE,
    PATCH,
    START,
    VIDEO,
    Item,
    Layout,
    collate_patches,
    collate_rows,
    lay_rows,
    noise,
)
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import mm_token_types

LATENT: dict[str, Any] = TEXT | dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
"""Fields of the config of a language model with latent attention and experts."""

INDEX: dict[str, Any] = dict(index_topk=10, index_n_heads=24, index_head_dim=8)
"""Fields of an index, which finds fewer columns than there are. With few heads many columns would score nothing, and
then how long the sequence is would decide between them."""


def _kimi(**text):
    return hf.Kimi_K25Config(
        vision_config=VISION
        | dict(patch_size=PATCH, pos_emb_height=6, pos_emb_width=6, rope_parameters=dict(rope_theta=1e4)),
        text_config=hf.DeepseekV3Config(**LATENT | text),
        projection_hidden_size=WIDTH,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _lay_kimi(placeholder: int) -> Callable:
    """Packed patches. shape: frames, rows and columns of merged tokens; of a video, for each of its chunks."""

    def make(model, shape, siblings, generator):
        frames, rows, columns = shape
        grid = (frames, rows * MERGE, columns * MERGE)
        pixels = noise(generator, grid[0] * grid[1] * grid[2], 3, PATCH, PATCH)
        ids = [START, 30, NEWLINE, *[placeholder] * (rows * columns), END]
        return Item(ids if placeholder == IMAGE else [*range(31, 38), *ids], pixels, grid)

    return make


def _lay_packed(placeholder: int, newlines: int = 0) -> Callable:
    """Packed patches. shape: frames, rows and columns of merged tokens. newlines: tokens behind each row."""

    def make(model, shape, siblings, generator):
        frames, rows, columns = shape
        grid = (frames, rows * MERGE, columns * MERGE)
        pixels = noise(generator, grid[0] * grid[1] * grid[2], 3 * PATCH**2)
        return Item([START, *[placeholder] * (frames * rows * (columns + newlines)), END], pixels, grid)

    return make


def _mistral_small(**text):
    rope = YARN | {"llama_4_scaling_beta": 0.5, "partial_rotary_factor": 1 / 3}
    return hf.Mistral3Config(
        vision_config=pixtral(),
        text_config=hf.Mistral4Config(**LATENT | dict(rope_parameters=rope) | text),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
    )


def _mistral_large(**text):
    fields = dict(
        rope_parameters=YARN | dict(attention_factor=1.0),
        indexer_types=["full", "shared"] * 4,
        no_rope_layers=[1, 1, 1, 0] * 2,
    )
    return hf.MistralLarge4Config(
        vision_config=pixtral(),
        text_config=hf.MistralLarge4TextConfig(**LATENT | INDEX | fields | text),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
    )


def _dots3(**text):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    fields = dict(
        layer_types=["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"] * 2,
        sliding_window=512,
        head_dim=12,
        rope_parameters={"indexed_attention": rope, "sliding_attention": rope | {"rope_theta": 1e3}},
        mlp_layer_types=["dense"] + ["sparse"] * 7,
        shared_experts_intermediate_size=16,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=8,
        swa_kv_lora_rank=20,
        swa_head_dim=10,
        swa_qk_nope_head_dim=6,
        swa_v_head_dim=8,
    )
    layers = LATENT | INDEX | fields
    layers.pop("first_k_dense_replace")
    vision = dict(pyramid_num_routed=[-1, -1, 4, 4], moe_intermediate_size=24, patch_size=PATCH)
    return hf.Dots3NoteConfig(
        vision_config=VISION | vision | dict(adapter_in_dim=WIDTH, adapter_out_dim=WIDTH),
        text_config=layers | text,
        audio_config=VISION
        | dict(
            num_hidden_layers=1,
            num_key_value_heads=4,
            head_dim=8,
            downsample_hidden_size=8,
            adapter_input_size=WIDTH,
            adapter_out_dim=WIDTH,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    )


def _hy_v4(**text):
    fields = dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]},
        qk_rope_head_dim=6,
        indexer_types=["full", "full", "shared", "shared"] * 2,
        mlp_layer_types=["dense"] + ["sparse"] * 7,
        hc_mult=2,
    )
    layers = LATENT | INDEX | fields
    layers.pop("first_k_dense_replace")
    return hf.HYV4VLConfig(
        vision_config=VISION | dict(out_hidden_size=WIDTH, patch_size=PATCH, max_image_size=6 * PATCH),
        text_config=layers | text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _packed(newlines: int) -> dict[str, Layout]:
    images, videos = (_lay_packed(placeholder, newlines) for placeholder in (IMAGE, VIDEO))
    sizes = tuple((1, *grid) for grid in GRIDS)
    return {
        "image": Layout(sizes, images, collate_patches("pixel_values", "image_grid_thw")),
        "video": Layout(
            ((3, 3, 3), (2, 2, 5), (4, 3, 2), (5, 3, 3)),
            videos,
            collate_patches("pixel_values_videos", "video_grid_thw"),
        ),
    }


_ROWS = {"image": Layout(GRIDS, lay_rows, collate_rows)}

FAMILIES = {
    "kimi_k25": Family(
        "Kimi_K25ForConditionalGeneration",
        _kimi,
        {
            "image": Layout(
                tuple((1, *grid) for grid in GRIDS),
                _lay_kimi(IMAGE),
                collate_patches("pixel_values", "image_grid_thw"),
            ),
            "video": Layout(
                ((4, 3, 3), (2, 2, 5), (1, 3, 2), (3, 3, 3)),
                _lay_kimi(VIDEO),
                collate_patches("pixel_values_videos", "video_grid_thw"),
            ),
        },
        since=(5, 24),  # earlier ones fail on videos of different sizes
    ),
    "mistral_small4": Family("Mistral3ForConditionalGeneration", _mistral_small, _ROWS, kindred=True),
    "mistral_large4": Family(
        "MistralLarge4ForConditionalGeneration", _mistral_large, _ROWS, carries_state=True, kindred=True
    ),
    "dots3_note": Family("Dots3NoteForConditionalGeneration", _dots3, _packed(0), carries_state=True, kindred=True),
    "hy_v4_vl": Family(
        "HYV4VLForConditionalGeneration",
        _hy_v4,
        _packed(1),
        mm_token_types,
        carries_state=True,
        always_eager=True,
        kindred=True,
    ),
}
