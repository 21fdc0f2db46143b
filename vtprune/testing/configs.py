# SPDX-License-Identifier: Apache-2.0
"""Fields of the configs of tiny models, as far as several families share them."""

from __future__ import annotations

from typing import Any

import transformers as hf

from vtprune.testing.media import BOS, PAD, PATCH, VOCABULARY

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
VISION: dict[str, Any] = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
"""Fields of the config of most vision encoders."""
MROPE: dict[str, Any] = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]})
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
YARN: dict[str, Any] = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    original_max_position_embeddings=16,  # shorter than the prompts
)


def clip(size: int, patch: int):
    return hf.CLIPVisionConfig(**VISION, image_size=size, patch_size=patch)


def siglip(size: int, patch: int, **fields):
    return hf.SiglipVisionConfig(**VISION, image_size=size, patch_size=patch, vision_use_head=False, **fields)


def pixtral():
    return hf.PixtralVisionConfig(**VISION, image_size=56, patch_size=PATCH)


def llama(**text):
    return hf.LlamaConfig(**TEXT | text)


def mistral(**text):
    return hf.MistralConfig(**TEXT | dict(head_dim=8, sliding_window=None) | text)


def qwen2(**text):
    return hf.Qwen2Config(**TEXT | text)


def qwen3(**text):
    return hf.Qwen3Config(**TEXT | dict(head_dim=8) | text)
