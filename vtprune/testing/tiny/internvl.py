# SPDX-License-Identifier: Apache-2.0
"""Tiny models of InternVL and Qianfan-OCR."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import TEXT, VISION, YARN, qwen2, qwen3
from vtprune.testing.media import IMAGE, PATCH, TILE, Layout, collate_tiles, lay_tiles
from vtprune.testing.tiny.family import Family


def _internvl(text_config: Callable) -> Callable:
    return lambda **text: hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION, image_size=[TILE] * 2, patch_size=[PATCH] * 2),
        text_config=text_config(**text),
        image_token_id=IMAGE,
        image_seq_length=9,
    )


def _gpt_oss(**text):
    fields = dict(head_dim=8, sliding_window=512, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN)
    return hf.GptOssConfig(**TEXT | fields | text)


_LAYOUTS = {"image": Layout((3, 1, 2, 4), lay_tiles, collate_tiles)}

FAMILIES = {
    "internvl": Family("InternVLForConditionalGeneration", _internvl(qwen2), _LAYOUTS),
    "internvl_gpt_oss": Family(  # attention has sinks
        "InternVLForConditionalGeneration", _internvl(_gpt_oss), _LAYOUTS, always_eager=True, kindred=True
    ),
    "qianfan_ocr": Family(
        "QianfanOCRForConditionalGeneration",
        lambda **text: hf.QianfanOCRConfig(
            vision_config=hf.QianfanOCRVisionConfig(**VISION, image_size=[TILE] * 2, patch_size=[PATCH] * 2),
            text_config=qwen3(**text),
            image_token_id=IMAGE,
            image_seq_length=9,
        ),
        _LAYOUTS,
        kindred=True,
    ),
}
