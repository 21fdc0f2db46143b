# SPDX-License-Identifier: Apache-2.0
"""A tiny model of Cohere Compass."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import MROPE, TEXT
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import IDS, STAMPED, VISION_3, mm_token_types

_ROPE = {"sliding_attention": MROPE["rope_parameters"], "full_attention": None}

FAMILIES = {
    "cohere_compass": Family(  # layers with a full view have no rotation
        "CohereCompassForConditionalGeneration",
        lambda **text: hf.CohereCompassConfig(
            vision_config=VISION_3 | dict(deepstack_visual_indexes=[0, 1, 2]),
            text_config=TEXT
            | dict(layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2)
            | dict(rope_parameters=_ROPE, sliding_window=512, logit_scale=0.5, tie_word_embeddings=False)
            | text,
            **IDS,
        ),
        STAMPED,
        mm_token_types,
        kindred=True,
    ),
}
