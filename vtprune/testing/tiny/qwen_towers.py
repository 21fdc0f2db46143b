# SPDX-License-Identifier: Apache-2.0
"""Tiny models of EXAONE 4.5 and HyperCLOVA X, which have towers like Qwen2.5-VL's."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import TEXT
from vtprune.testing.media import IMAGE, VIDEO
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import IMAGES, VIDEOS, WINDOWS

_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO)
_LAYOUTS = {"image": IMAGES, "video": VIDEOS}

FAMILIES = {
    "exaone4_5": Family(
        "Exaone4_5_ForConditionalGeneration",
        lambda **text: hf.Exaone4_5_Config(
            vision_config=WINDOWS | dict(num_key_value_heads=2),
            text_config=hf.Exaone4Config(**TEXT | dict(sliding_window=512, sliding_window_pattern=4) | text),
            **_IDS,
        ),
        _LAYOUTS,
        kindred=True,
    ),
    "hyperclovax_vision_v2": Family(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        lambda **text: hf.HyperCLOVAXVisionV2Config(
            vision_config=hf.Qwen2_5_VLConfig(vision_config=WINDOWS).vision_config,
            text_config=hf.HyperCLOVAXConfig(
                **TEXT
                | dict(embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=0.5)
                | text
            ),
            tie_word_embeddings=False,
            **_IDS,
        ),
        _LAYOUTS,
        kindred=True,
    ),
}
