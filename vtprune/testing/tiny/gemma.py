# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Gemma 3 and PaliGemma."""

from __future__ import annotations

import torch
import transformers as hf

from vtprune.testing.configs import TEXT, WIDTH, siglip
from vtprune.testing.media import END, IMAGE, NEWLINE, START, Layout, lay_square, stack
from vtprune.testing.tiny.family import Family

_ALTERNATING = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=512)
_PALIGEMMA = {"image": Layout((25,) * 4, lay_square(), stack("pixel_values"))}


def _paligemma(text_config):
    return hf.PaliGemmaConfig(
        vision_config=siglip(35, 7, projection_dim=WIDTH),
        text_config=text_config,
        image_token_index=IMAGE,
        projection_dim=WIDTH,
    )


def _no_types(ids):
    return {"token_type_ids": torch.zeros_like(ids)}


FAMILIES = {
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        lambda **text: hf.Gemma3Config(
            vision_config=siglip(32, 4),
            text_config=hf.Gemma3TextConfig(
                **TEXT | _ALTERNATING | dict(layer_types=["sliding_attention", "full_attention"] * 4) | text
            ),
            mm_tokens_per_image=16,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        {"image": Layout((16,) * 4, lay_square((NEWLINE, START), (END, NEWLINE)), stack("pixel_values"))},
        lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        lambda **text: _paligemma(hf.GemmaConfig(**TEXT | dict(head_dim=8) | text)),
        _PALIGEMMA,
        _no_types,
        images_first=True,
    ),
    "paligemma2": Family(  # caps low enough to bend what they cap
        "PaliGemmaForConditionalGeneration",
        lambda **text: _paligemma(
            hf.Gemma2Config(
                **TEXT | _ALTERNATING | dict(attn_logit_softcapping=4.0, final_logit_softcapping=8.0) | text
            )
        ),
        _PALIGEMMA,
        _no_types,
        always_eager=True,
        images_first=True,
    ),
}
