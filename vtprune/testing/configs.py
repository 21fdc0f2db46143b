# SPDX-License-Identifier: Apache-2.0
"""The config of a tiny model of every family, with the classes of transformers that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from vtprune.testing.media import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    BOS,
    END,
    IMAGE,
    MERGE,
    PAD,
    PATCH,
    START,
    TILE,
    VIDEO,
    VOCABULARY,
)

WIDTH = 32
INIT_STD = 0.2
"""Wide enough that a wrong mask, position or token moves logits by far more than the tolerance of any comparison."""

TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=None,
)
"""Fields of the config of every language model."""
_VISION = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
_QWEN_VISION = dict(patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2, depth=4, num_heads=4)
_QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_AUDIO = dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, d_model=WIDTH, output_dim=WIDTH)
_OMNI_IDS = dict(
    vision_start_token_id=START,
    vision_end_token_id=END,
    audio_start_token_id=AUDIO_START,
    audio_end_token_id=AUDIO_END,
    position_id_per_seconds=3,
)
_MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]})
_QWEN_2_5_VISION = _QWEN_VISION | dict(hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH)
_WINDOWS = _QWEN_2_5_VISION | dict(window_size=16, fullatt_block_indexes=[1, 3])
"""Windows of 2x2 merged tokens, so that the tower reorders them."""
_QWEN3_VISION = _QWEN_2_5_VISION | dict(num_position_embeddings=64)
_LINEAR = dict(
    layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    head_dim=16,
    rope_parameters=_MROPE["rope_parameters"] | {"mrope_interleaved": True, "partial_rotary_factor": 0.5},
)
_YARN = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    original_max_position_embeddings=16,  # shorter than the prompts
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_ALTERNATING = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=512)
_PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
_SIDE_4 = [[32, 64], [64, 32], [64, 64]]


def _clip(size: int, patch: int):
    return hf.CLIPVisionConfig(**_VISION, image_size=size, patch_size=patch)


def _siglip(size: int, patch: int, **fields):
    return hf.SiglipVisionConfig(**_VISION, image_size=size, patch_size=patch, vision_use_head=False, **fields)


def _pixtral():
    return hf.PixtralVisionConfig(**_VISION, image_size=56, patch_size=PATCH)


def _llama(**text):
    return hf.LlamaConfig(**TEXT | text)


def _mistral(**text):
    return hf.MistralConfig(**TEXT | dict(head_dim=8, sliding_window=None) | text)


def _qwen2(**text):
    return hf.Qwen2Config(**TEXT | text)


def _idefics(config: str) -> Callable:
    vision = _VISION | dict(image_size=TILE, patch_size=PATCH)
    return lambda **text: getattr(hf, config)(
        vision_config=vision, text_config=_llama(**text), image_token_id=IMAGE, scale_factor=MERGE, pad_token_id=PAD
    )


def _qwen3_vl(config: str, **text_fields) -> Callable:
    return lambda **text: getattr(hf, config)(
        vision_config=_QWEN3_VISION | dict(deepstack_visual_indexes=[0, 1, 2]),
        text_config=TEXT | _MROPE | dict(head_dim=8) | text_fields | text,
        **_QWEN_IDS,
    )


def _qwen3_5(config: str, **text_fields) -> Callable:
    return lambda **text: getattr(hf, config)(
        vision_config=_QWEN3_VISION, text_config=TEXT | _LINEAR | text_fields | text, **_QWEN_IDS
    )


def _internvl(text_config: Callable) -> Callable:
    return lambda **text: hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_VISION, image_size=[TILE] * 2, patch_size=[PATCH] * 2),
        text_config=text_config(**text),
        image_token_id=IMAGE,
        image_seq_length=9,
    )


def _mistral3(text_config: Callable) -> Callable:
    return lambda **text: hf.Mistral3Config(
        vision_config=_pixtral(),
        text_config=text_config(**text),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
    )


def _gpt_oss(**text):
    fields = dict(head_dim=8, sliding_window=512, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_YARN)
    return hf.GptOssConfig(**TEXT | fields | text)


def _ministral3(**text):
    fields = dict(head_dim=8, rope_parameters=_YARN | {"llama_4_scaling_beta": 0.5})
    return hf.Ministral3Config(**TEXT | fields | text)


MODELS: dict[str, tuple[str, Callable]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        lambda **text: hf.LlavaConfig(vision_config=_clip(42, 7), text_config=_llama(**text), image_token_index=IMAGE),
    ),
    "pixtral": (
        "LlavaForConditionalGeneration",
        lambda **text: hf.LlavaConfig(
            vision_config=_pixtral(),
            text_config=_mistral(**text),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        lambda **text: hf.LlavaNextConfig(
            vision_config=_clip(TILE, 8),
            text_config=_llama(**text),
            image_token_index=IMAGE,
            image_grid_pinpoints=_PINPOINTS,
        ),
    ),
    "llava_next_video": (  # an even number of patches a side: frames are pooled 2x2
        "LlavaNextVideoForConditionalGeneration",
        lambda **text: hf.LlavaNextVideoConfig(
            vision_config=_clip(32, 8),
            text_config=_llama(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_SIDE_4,
        ),
    ),
    "llava_onevision": (  # 2x2 tiles exceed the maximum, so that their mosaic is resized
        "LlavaOnevisionForConditionalGeneration",
        lambda **text: hf.LlavaOnevisionConfig(
            vision_config=_siglip(TILE, 8),
            text_config=_qwen2(**text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=_PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        ),
    ),
    "video_llava": (
        "VideoLlavaForConditionalGeneration",
        lambda **text: hf.VideoLlavaConfig(
            vision_config=_clip(32, 8), text_config=_llama(**text), image_token_index=IMAGE, video_token_index=VIDEO
        ),
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        lambda **text: hf.Qwen2VLConfig(
            vision_config=_QWEN_VISION | dict(embed_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2),
            text_config=TEXT | _MROPE | text,
            **_QWEN_IDS,
        ),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda **text: hf.Qwen2_5_VLConfig(
            vision_config=_WINDOWS | dict(tokens_per_second=2),
            text_config=TEXT | _MROPE | text,
            **_QWEN_IDS,
        ),
    ),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl("Qwen3VLConfig")),
    "qwen3_vl_moe": (  # one layer without experts
        "Qwen3VLMoeForConditionalGeneration",
        _qwen3_vl("Qwen3VLMoeConfig", **_EXPERTS, mlp_only_layers=[2]),
    ),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", _qwen3_5("Qwen3_5Config")),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        _qwen3_5("Qwen3_5MoeConfig", **_EXPERTS, shared_expert_intermediate_size=16),
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        lambda **text: hf.Qwen2_5OmniThinkerConfig(
            vision_config=_WINDOWS,
            text_config=TEXT | _MROPE | text,
            audio_config=_AUDIO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=AUDIO,
            **_OMNI_IDS,
        ),
    ),
    "qwen3_omni": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        lambda **text: hf.Qwen3OmniMoeThinkerConfig(
            vision_config=_QWEN3_VISION | dict(deepstack_visual_indexes=[0, 1, 2]),
            text_config=TEXT | _MROPE | _EXPERTS | dict(head_dim=8) | text,
            audio_config=_AUDIO | dict(downsample_hidden_size=8),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            **_OMNI_IDS,
        ),
    ),
    "internvl": ("InternVLForConditionalGeneration", _internvl(_qwen2)),
    "internvl_gpt_oss": ("InternVLForConditionalGeneration", _internvl(_gpt_oss)),
    "idefics3": ("Idefics3ForConditionalGeneration", _idefics("Idefics3Config")),
    "smolvlm": ("SmolVLMForConditionalGeneration", _idefics("SmolVLMConfig")),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda **text: hf.Gemma3Config(
            vision_config=_siglip(32, 4),
            text_config=hf.Gemma3TextConfig(
                **TEXT | _ALTERNATING | dict(layer_types=["sliding_attention", "full_attention"] * 4) | text
            ),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        lambda **text: hf.PaliGemmaConfig(
            vision_config=_siglip(35, 7, projection_dim=WIDTH),
            text_config=hf.GemmaConfig(**TEXT | dict(head_dim=8) | text),
            image_token_index=IMAGE,
            projection_dim=WIDTH,
        ),
    ),
    "paligemma2": (  # caps low enough to bend what they cap
        "PaliGemmaForConditionalGeneration",
        lambda **text: hf.PaliGemmaConfig(
            vision_config=_siglip(35, 7, projection_dim=WIDTH),
            text_config=hf.Gemma2Config(
                **TEXT | _ALTERNATING | dict(attn_logit_softcapping=4.0, final_logit_softcapping=8.0) | text
            ),
            image_token_index=IMAGE,
            projection_dim=WIDTH,
        ),
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3(_mistral)),
    "ministral3": ("Mistral3ForConditionalGeneration", _mistral3(_ministral3)),
}
"""Family -> name of its class in transformers, and what makes its config from fields of the text config.

Classes stand by name: a release of transformers that lacks one still has the others."""
