# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight models, one file for families that are alike."""

from __future__ import annotations

from vtprune.testing.tiny import (
    cohere_compass,
    cohere_vision,
    cosmos3,
    ernie4_5_vl,
    fuyu,
    gemma,
    gemma3n,
    gemma4,
    glm_v,
    granite,
    grid,
    hunyuan_vl,
    idefics3,
    internvl,
    latent,
    lfm_vl,
    llama4,
    llava,
    minicpm,
    mistral3,
    molmo2,
    muse,
    nemotron_h_omni,
    ovis2,
    paddleocr_vl,
    perception_lm,
    phi4_multimodal,
    qwen4,
    qwen_omni,
    qwen_towers,
    qwen_vl,
    sam,
    step3p7,
    video_llama3,
)
from vtprune.testing.tiny.family import Family

__all__ = ["FAMILIES", "Family"]

_FILES = (
    llava,
    qwen_vl,
    qwen_omni,
    internvl,
    idefics3,
    gemma,
    mistral3,
    cohere_vision,
    sam,
    hunyuan_vl,
    minicpm,
    glm_v,
    paddleocr_vl,
    granite,
    lfm_vl,
    nemotron_h_omni,
    qwen4,
    llama4,
    cosmos3,
    video_llama3,
    latent,
    grid,
    molmo2,
    ovis2,
    fuyu,
    step3p7,
    perception_lm,
    gemma4,
    cohere_compass,
    muse,
    qwen_towers,
    phi4_multimodal,
    gemma3n,
    ernie4_5_vl,
)

FAMILIES: dict[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
"""Name -> family."""
